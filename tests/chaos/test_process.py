"""A server's process without descriptors, without room on the disk, and killed in mid-sentence."""

import asyncio
import json
import os
import random
import resource
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from tests.serve.conftest import VOCABULARY
from tests.servers import CHAT, KEY, Server, serving, wait_until

BODY = {"model": "tiny-folder", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 20}
HEADERS = {"authorization": f"Bearer {KEY}"}
needs_prlimit = pytest.mark.skipif(
    not hasattr(resource, "prlimit"), reason="needs Linux's prlimit, to starve a running process"
)


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory) -> Iterator[Server]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))  # as on most systems
    with serving(folder, tmp_path_factory.mktemp("server"), "--max-num-batch-seqs", "4") as server:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        yield server
        assert not [event for event in server.events() if event["event"] == "defect"]
        assert "Traceback" not in server.log.read_text()


@contextmanager
def starved(server: Server, what: int, most: int) -> Iterator[None]:
    """The process may use no more of it than that."""
    before = resource.prlimit(server.process.pid, what)
    resource.prlimit(server.process.pid, what, (most, before[1]))
    try:
        yield
    finally:
        resource.prlimit(server.process.pid, what, before)


def ask(server: Server, client: httpx2.Client | None = None, **fields) -> httpx2.Response:
    url = f"{server.url}{CHAT}"
    return (client or httpx2).post(url, json={**BODY, **fields}, headers=HEADERS, timeout=60)


def start_batch(server: Server, n: int, **fields) -> tuple[int, str]:
    """-> status, and where the batch is, or what went wrong."""
    lines = [
        {"custom_id": f"line-{i}", "method": "POST", "url": CHAT, "body": {**BODY, **fields}}
        for i in range(n)
    ]
    data = "\n".join(json.dumps(line) for line in lines).encode()
    with httpx2.Client(base_url=server.url, headers=HEADERS, timeout=60) as http:
        file = http.post("/v1/files", data={"purpose": "batch"}, files={"file": data})
        if file.status_code != 200:
            return file.status_code, file.text
        asked = {"endpoint": CHAT, "completion_window": "24h", "input_file_id": file.json()["id"]}
        batch = http.post("/v1/batches", json=asked)
        return batch.status_code, batch.json().get("id", batch.text)


def batch_of(server: Server, id: str) -> dict:
    return httpx2.get(f"{server.url}/v1/batches/{id}", headers=HEADERS, timeout=60).json()


def answers_of(server: Server, batch: dict) -> Counter:
    url = f"{server.url}/v1/files/{batch['output_file_id']}/content"
    lines = httpx2.get(url, headers=HEADERS, timeout=60).text.splitlines()
    return Counter(json.loads(line)["custom_id"] for line in lines)


@needs_prlimit  # and Linux's /proc
def test_it_listens_at_one_port_only(server):
    proc = Path(f"/proc/{server.process.pid}")
    own = {os.readlink(fd) for fd in (proc / "fd").iterdir()}
    listening = set()
    for name in ("tcp", "tcp6"):
        for line in (proc / "net" / name).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
                listening.add((fields[1].split(":")[0], int(fields[1].split(":")[1], 16)))
    assert listening == {("0100007F", server.port)}  # 127.0.0.1


@needs_prlimit
def test_it_may_open_more_files_than_the_usual_1024(server):
    soft, hard = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
    assert soft > 1024 or soft == hard


@needs_prlimit
def test_without_descriptors_it_waits_and_then_goes_on(server):
    assert ask(server).status_code == 200
    n_files = server.n_descriptors
    with httpx2.Client() as client:
        assert ask(server, client).status_code == 200  # a connection that is there already
        with starved(server, resource.RLIMIT_NOFILE, n_files + 10):
            crowd = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(100)]
            time.sleep(0.3)
            assert server.process.poll() is None
            assert server.n_descriptors <= n_files + 10
            assert ask(server, client).status_code == 200
            for raw in crowd:
                raw.close()
            wait_until(lambda: server.status("/health") == 200)  # new ones come in again
    assert ask(server).status_code == 200
    wait_until(lambda: server.n_descriptors <= n_files + 1)


@needs_prlimit
def test_a_log_on_a_full_disk_costs_lines_and_no_answer(server):
    assert ask(server).status_code == 200
    size = server.log.stat().st_size
    with starved(server, resource.RLIMIT_FSIZE, size):
        for stream in (False, True):
            answer = ask(server, stream=stream)
            assert answer.status_code == 200 and (not stream or "data: [DONE]" in answer.text)
        assert server.status("/v1/health/live") == 200 and server.is_idle
        assert server.log.stat().st_size == size
    assert ask(server).status_code == 200
    events = server.events()
    missing = next(e for e in events if e["event"] == "lines of log are missing")
    assert "File too large" in missing["why"] and events[-1]["event"] in ("answer", "request")


@needs_prlimit
def test_a_full_disk_stops_batches_with_a_word_and_they_go_on(server):
    status, running = start_batch(server, 30)
    assert status == 200
    wait_until(lambda: batch_of(server, running)["request_counts"]["completed"] > 5)
    with starved(server, resource.RLIMIT_FSIZE, 4096):
        status, why = start_batch(server, 1000)
        assert status == 503 and "files cannot be kept" in why
        assert ask(server).status_code == 200  # requests that need no disk succeed
        time.sleep(2.5)
        assert batch_of(server, running)["id"] == running  # so do reads
    events = [event["event"] for event in server.events()]
    assert "defect" not in events and events.count("batch interrupted") <= 2
    wait_until(lambda: batch_of(server, running)["status"] == "completed")
    batch = batch_of(server, running)
    assert batch["request_counts"] == {"total": 30, "completed": 30, "failed": 0}
    assert answers_of(server, batch) == {f"line-{i}": 1 for i in range(30)}


async def talk(server: Server, n_clients: int, kill_after: int, delay: float) -> Counter:
    """Ask until the server is killed, which `delay` s after some answers it is -> what was seen."""
    seen: Counter = Counter()

    async def one(client: httpx2.AsyncClient, i: int) -> None:
        for n in range(10_000):
            text, stream = f"client {i}, question {n}", n % 2 == 1
            body = {**BODY, "messages": [{"role": "user", "content": text}], "stream": stream}
            body |= {"return_token_ids": True, "n": 2, "ignore_eos": True}
            seen["asked"] += 1
            try:
                answer = await client.post(CHAT, json=body)
            except httpx2.TransportError:  # refused, reset, or cut off: the client sees it
                seen["told"] += 1
                return
            assert answer.status_code == 200
            if stream:
                *events, done = answer.text.strip().split("\n\n")
                assert done == "data: [DONE]"
                chunks = [json.loads(event.removeprefix("data: ")) for event in events]
                choices = [c for chunk in chunks for c in chunk["choices"] if c["finish_reason"]]
            else:
                choices = answer.json()["choices"]
            assert [choice["finish_reason"] for choice in choices] == ["length"] * 2
            for choice in choices:  # an answer, whole, and to this very question
                assert len(choice["token_ids"]) == BODY["max_tokens"]
                assert VOCABULARY.encode(text) == choice["prompt_token_ids"][-len(text) - 1 : -1]
            seen["whole"] += 1

    async def kill() -> None:
        while seen["whole"] < kill_after:
            await asyncio.sleep(0.01)
        await asyncio.sleep(delay)
        server.process.kill()

    url = {"base_url": server.url, "headers": HEADERS, "timeout": 60}
    async with httpx2.AsyncClient(**url) as client, asyncio.TaskGroup() as group:
        group.create_task(kill())
        for i in range(n_clients):
            group.create_task(one(client, i))
    return seen


@pytest.mark.parametrize("n_kills", [1, pytest.param(10, marks=pytest.mark.chaos)])
def test_a_kill_cuts_no_answer_short_in_silence_and_repeats_no_line(folder, tmp_path, n_kills):
    rng, n_lines, done, seen, batch = random.Random(n_kills), 40 * n_kills, 0, Counter(), ""
    for _ in range(n_kills):
        with serving(folder, tmp_path, "--max-num-batch-seqs", "3") as server:
            if not batch:
                status, batch = start_batch(server, n_lines, max_tokens=60)
                assert status == 200
            before, done = done, batch_of(server, batch)["request_counts"]["completed"]
            assert before <= done < n_lines
            seen += asyncio.run(talk(server, 6, kill_after=10, delay=rng.random() / 3))
    assert seen["asked"] == seen["whole"] + seen["told"]
    assert seen["told"] == 6 * n_kills and seen["whole"] >= 10 * n_kills
    with serving(folder, tmp_path) as server:
        wait_until(lambda: batch_of(server, batch)["status"] == "completed", 240)
        found = batch_of(server, batch)
        assert found["request_counts"] == {"total": n_lines, "completed": n_lines, "failed": 0}
        assert answers_of(server, found) == {f"line-{i}": 1 for i in range(n_lines)}
