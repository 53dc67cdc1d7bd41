"""Servers in processes of their own, which tests may kill, starve and look into."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests import processes

needs_ray = pytest.mark.skipif(
    not find_spec("ray"), reason="needs Ray: pip install -e '.[scale]'"
)  # not imported to see: Ray reads the environment as it is
CHAT = "/v1/chat/completions"
KEY = "a-key-for-abuse"


@dataclass
class Server:
    process: Any
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def status(self, path: str) -> int:
        return status(self.port, path)

    def metric(self, name: str) -> float:
        lines = httpx2.get(f"{self.url}/metrics", timeout=20).text.splitlines()
        return next(float(s.split()[-1]) for s in lines if s.startswith(f"opennemo_{name}{{"))

    @property
    def is_idle(self) -> bool:
        names = ("requests_running", "requests_waiting", "kv_cache_pages_used")
        return not any(self.metric(name) for name in names)

    @property
    def resident_bytes(self) -> int:
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    @property
    def n_descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def events(self) -> list[dict]:
        lines = self.log.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def status(port: int, path: str = "/health") -> int:
    """What a server on this machine answers, 0 without one; costs it and us little."""
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, HTTPException):
        return 0
    finally:
        connection.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@contextmanager
def serving(folder: Path, tmp_path: Path, *options: str) -> Iterator[Server]:
    port = free_port()
    command = ["-m", "opennemo.cli", "serve", folder, "--port", port]
    command += ["--state-dir", tmp_path / "state", "--api-key", KEY, *options]
    with (tmp_path / "log").open("w") as log:
        process = processes.start(*command, stderr=log)
    server = Server(process, port, tmp_path / "log")
    try:
        wait_until(lambda: process.poll() is not None or server.status("/health") == 200, 240)
        assert process.poll() is None, server.log.read_text()[-2000:]
        yield server
    finally:
        process.kill()
        process.wait()
