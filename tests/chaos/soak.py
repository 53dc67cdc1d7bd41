"""Eight clients at one server for as long as you like: memory, descriptors and pages must be flat.

    make soak                      # a minute
    make soak MINUTES=60

The clients are those of tests/serve/test_abuse.py: they ask in all protocols, hang up, send
nonsense, read slowly. The model is tiny, so that the server spends little of its time computing. A
row of the table is a twentieth of the time; pages are counted while nobody asks.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.serve.conftest import make_tiny_folder  # noqa: E402
from tests.serve.test_abuse import MAX_BODY, Abuser  # noqa: E402
from tests.servers import Server, serving, wait_until  # noqa: E402

N_CLIENTS = 8
OPTIONS = ["--max-num-seqs", "12", "--max-num-queued-reqs", "4", "--max-model-len", "4096"]
OPTIONS += ["--max-body-size", str(MAX_BODY)]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What the server holds while nobody asks."""

    seconds: float
    n_requests: int
    resident_bytes: int
    n_descriptors: int
    n_pages: int

    def __str__(self) -> str:
        return (
            f"{self.seconds:8.0f} s {self.n_requests:10,} {self.resident_bytes / 2**20:10.1f} MB "
            f"{self.n_descriptors:8} {self.n_pages:6}"
        )


HEAD = f"{'time':>10} {'requests':>10} {'resident':>13} {'files':>8} {'pages':>6}"


def soak(server: Server, seconds: float, *, n_samples: int = 20) -> tuple[list[Sample], Counter]:
    """-> samples, the first after some warming up, and how often which status came."""
    statuses: Counter = Counter()
    seed = 0

    def fire(for_seconds: float) -> None:
        nonlocal seed

        async def all() -> None:
            deadline = time.monotonic() + for_seconds
            clients = [Abuser(server.port, seed + i, statuses) for i in range(N_CLIENTS)]
            await asyncio.gather(*(client.run(deadline) for client in clients))

        asyncio.run(all())
        seed += N_CLIENTS
        wait_until(lambda: server.is_idle)

    n_files = server.n_descriptors
    fire(max(10, seconds / 6))  # caches and the allocator's arenas fill
    began, samples = time.monotonic(), []
    for _ in range(n_samples):
        fire(seconds / n_samples)
        wait_until(lambda: server.n_descriptors <= n_files + 4)  # sockets take a while to close
        sample = Sample(
            seconds=time.monotonic() - began,
            n_requests=sum(statuses.values()),
            resident_bytes=server.resident_bytes,
            n_descriptors=server.n_descriptors,
            n_pages=int(server.metric("kv_cache_pages_used")),
        )
        print(sample, flush=True)
        samples.append(sample)
    return samples, statuses


def main() -> None:
    parser = argparse.ArgumentParser(description="Eight clients at one server.")
    parser.add_argument("--minutes", type=float, default=1)
    minutes = parser.parse_args().minutes
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_tiny_folder(Path(scratch) / "tiny-folder")
        with serving(folder, Path(scratch), *OPTIONS) as server:
            print(HEAD)
            samples, statuses = soak(server, 60 * minutes)
            grown = samples[-1].resident_bytes - samples[0].resident_bytes
            print(f"grown by {grown / 2**20:+.1f} MB; {dict(statuses)}")


if __name__ == "__main__":
    main()
