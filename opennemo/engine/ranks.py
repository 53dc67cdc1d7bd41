"""The other ranks of a divided model: processes that compute what the engine computes.

Rank 0 is the engine. It alone knows of requests: it lays out each step, sends it to the others over
a pipe (plain lists of numbers), and all compute it, each with its share of heads and channels;
inside the model they sum their results (model/tensor_parallel.py), by gloo on CPUs and NCCL on
GPUs. The others end with the process that started them. When one of them ends, or does not keep up,
the model is broken for good: every request gets that error, and none waits.
"""

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from opennemo.engine.runner import Runner
from opennemo.engine.sizes import CacheSize
from opennemo.errors import OpenNemoError
from opennemo.model.transformer import Transformer

PATIENCE = timedelta(minutes=5)  # with a rank that does not join
Load = Callable[[int, str], Transformer]  # a rank's share, by its number and its device


class Ranks:
    """The ranks besides this process, which is rank 0.

    Attributes:
        model: the share of rank 0.
        failure: why nothing can be computed any more.
    """

    def __init__(self, n_ranks: int, load: Load, device: str):
        """Start n_ranks - 1 processes, which unpickle `load`, and load every share.

        Raises:
            OpenNemoError: a rank could not begin, or what `load` raises.
        """
        self.failure: str | None = None
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        self._folder = tempfile.TemporaryDirectory(prefix="opennemo-ranks-")
        self._n_threads_before = torch.get_num_threads()
        n_threads = max(1, self._n_threads_before // n_ranks)
        spawn = multiprocessing.get_context("spawn")  # this process may have threads, and CUDA
        place = (f"file://{self._folder.name}/store", n_ranks, device, n_threads)
        for rank in range(1, n_ranks):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=follow, args=(theirs, load, rank, *place), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        try:
            self._await_all()  # until all have joined
            _join(0, *place)
            self.model = load(0, _device(device, 0))
            self._await_all()  # until all have loaded
        except BaseException:
            self.close()
            raise

    def begin(self, size: CacheSize) -> None:
        """Send the others the size of the KV cache."""
        with self.together("begin", size):
            pass

    @contextmanager
    def together(self, verb: str, *args: Any) -> Iterator[None]:
        """The other ranks' runners do the same as this one does in the block.

        Raises:
            RuntimeError: a rank has ended, now or before, or this one failed alone.
        """
        if self.failure:
            raise RuntimeError(self.failure)
        try:
            for pipe in self._pipes:
                pipe.send((verb, args))
            yield
        except (RuntimeError, OSError) as error:
            self.failure = self._end_of_a_rank() or f"rank 0 failed: {error}"
            self._kill()  # they wait for a sum that will not come
            raise RuntimeError(self.failure) from error

    def close(self) -> None:
        """End the other ranks."""
        self.failure = self.failure or "the other ranks have ended with the engine"
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(5)
        self._kill()
        if dist.is_initialized():
            dist.destroy_process_group()
            torch.set_num_threads(self._n_threads_before)
        self._folder.cleanup()

    def _await_all(self) -> None:
        """Wait until each has sent an error, or "" for none."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            wait([pipe, process.sentinel], PATIENCE.total_seconds())
            error = "did not answer"
            with suppress(EOFError):
                error = pipe.recv() if pipe.poll() else error
            if error:
                raise OpenNemoError(self._end_of_a_rank() or f"{process.name}: {error}")

    def _end_of_a_rank(self) -> str | None:
        # The message may have come since.
        ended = wait([process.sentinel for process in self._processes], 1)
        for rank, process in enumerate(self._processes, 1):
            if process.sentinel in ended:  # its files are closed, but it may not be gone yet
                process.join(5)
            if process.exitcode is not None:
                n = len(self._processes) + 1
                return f"rank {rank} of {n} has ended (exit code {process.exitcode}); start again"
        return None

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()


def follow(
    pipe: Connection, load: Load, rank: int, store: str, n_ranks: int, device: str, n_threads: int
) -> None:
    """The loop of another rank: do what rank 0 sends, until that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 gets it, too, and ends this one
    try:
        pipe.send("")
        _join(rank, store, n_ranks, device, n_threads)
        model = load(rank, _device(device, rank))
        pipe.send("")
    except Exception as error:  # noqa: BLE001  rank 0 raises it
        pipe.send(str(error) or type(error).__name__)
        return
    with suppress(EOFError, OSError):  # rank 0 has ended
        _, (size,) = pipe.recv()
        runner = Runner(model, size)
        while True:
            verb, args = pipe.recv()
            getattr(runner, verb)(*args)


def _join(rank: int, store: str, n_ranks: int, device: str, n_threads: int) -> None:
    torch.set_num_threads(n_threads)
    options: dict[str, Any] = {"backend": "gloo"}
    if device != "cpu":
        options = {"backend": "nccl", "device_id": torch.device(_device(device, rank))}
    with _on_loopback():
        dist.init_process_group(
            init_method=store, rank=rank, world_size=n_ranks, timeout=PATIENCE, **options
        )


@contextmanager
def _on_loopback() -> Iterator[None]:
    """All ranks are on this machine, so gloo and NCCL, which read the environment, listen there."""
    names = {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"} - os.environ.keys()
    names = names if os.path.exists("/sys/class/net/lo") else set()
    os.environ |= dict.fromkeys(names, "lo")
    try:
        yield
    finally:
        for name in names:
            del os.environ[name]


def _device(device: str, rank: int) -> str:
    return device if device == "cpu" else f"cuda:{rank}"
