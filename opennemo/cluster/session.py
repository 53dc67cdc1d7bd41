"""Join or start Ray for engines, with everything that this changes in the process.

That is: variables that Ray reads when it is imported (with local_ray.py), the levels of its
loggers, a handler of SIGTERM, and one function of another package: `listen_on_loopback` changes
`add_port_to_grpc_server` of Ray 2.60, which has no option for the address of that port.
"""

# Ray is an extra, which few users install.
# pyright: reportMissingImports=false
import importlib
import logging
import os
import signal
import sys
import threading
from typing import Any

import structlog
import torch

from opennemo.cluster.local_ray import keep_ray_here
from opennemo.errors import OpenNemoError
from opennemo.serve.settings import Settings

log = structlog.get_logger("opennemo.serve")


def listen_on_loopback() -> None:
    """Ray Serve opens each replica's port on all addresses; here all are on this machine."""
    replica: Any = importlib.import_module("ray.serve._private.replica")
    if bind := getattr(replica, "add_port_to_grpc_server", None):
        replica.add_port_to_grpc_server = lambda server, address: bind(
            server, address.replace("[::]", "127.0.0.1")
        )


def start_ray(settings: Settings) -> Any:
    """Ray, joined or started for this process: on loopback, with a token, without a dashboard."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # it would send usage reports
    n = settings.max_replicas or settings.replicas
    options: dict[str, Any] = {"address": settings.ray_address}
    if settings.ray_address is None:
        keep_ray_here()
        # In milliseconds; its default of 15 seconds is too short on a busy machine.
        os.environ |= {"RAY_agent_register_timeout_ms": "100000"}
        n_cpus = max(os.cpu_count() or 1, cpus_of(settings) * n)
        options = {
            "num_cpus": n_cpus, "include_dashboard": False, "object_store_memory": 2**28,
        }  # fmt: skip
    try:
        import ray
        import ray.serve  # what it needs may be missing, too
    except ImportError as error:
        raise OpenNemoError(
            f"{error.name} is missing: --replicas needs Ray Serve; in the checkout: "
            "pip install -e '.[scale]'"
        ) from None
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
    try:
        ray.init(**options, **quiet)
    except Exception as error:  # Ray raises many kinds, and bare exceptions
        ray.shutdown()
        where = settings.ray_address or "a cluster of its own"
        raise OpenNemoError(f"--replicas: cannot use {where}: {reason(error)}") from error
    if threading.current_thread() is threading.main_thread():  # Ray's own prints pages
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    there = ray.cluster_resources()
    for kind, each in (("CPU", cpus_of(settings)), ("GPU", gpus_of(settings))):
        if each * settings.replicas > (n_there := there.get(kind, 0)):
            need = f"{settings.replicas} replicas need {each:g} {kind}s each, there are {n_there:g}"
            if settings.ray_address is None:
                ray.shutdown()
                raise OpenNemoError(f"--replicas: {need}")
            log.warning("waiting for machines", reason=need)  # a cluster may grow
    return ray


def cpus_of(settings: Settings) -> int:
    """Threads of a replica: by default its share of this host's; on a cluster, one."""
    n = settings.max_replicas or settings.replicas
    share = 1 if settings.ray_address else max(1, (os.cpu_count() or 1) // n)
    return settings.replica_cpus or share


def gpus_of(settings: Settings) -> float:
    if settings.replica_gpus is not None:
        return settings.replica_gpus
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return 0.0 if device == "cpu" else float(settings.tensor_parallel_size)


def reason(error: BaseException) -> str:
    """The last line of Ray's message, which is the reason if it gives one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1][:300]
