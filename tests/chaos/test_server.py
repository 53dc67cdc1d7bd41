"""A server under what befalls servers: an engine dies, clocks jump, clients idle, stall, vanish."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from opennemo.serve import auth
from opennemo.serve.errors import Refusal
from tests.servers import CHAT, wait_until

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}
LONG = {**BODY, "max_tokens": 3000, "ignore_eos": True}


KEYS = ["the-key-of-alice"]


def post(http: httpx2.Client, **fields) -> httpx2.Response:
    return http.post(CHAT, json={**BODY, **fields})


def start_batch(http: httpx2.Client, lines: list[dict]) -> str:
    """-> where the batch is."""
    data = "\n".join(json.dumps(line) for line in lines).encode()
    file = http.post("/v1/files", data={"purpose": "batch"}, files={"file": data})
    asked = {"endpoint": CHAT, "completion_window": "24h", "input_file_id": file.json()["id"]}
    return f"/v1/batches/{http.post('/v1/batches', json=asked).json()['id']}"


# The engine


@pytest.mark.parametrize("exit", [SystemExit(3), KeyboardInterrupt(), MemoryError("gone")])
def test_an_engine_s_thread_that_ends_leaves_nobody_waiting(running, tiny_llm, exit):
    """An exit ends the thread and says so; an error, of whatever kind, ends only what ran."""
    llm = tiny_llm(max_sequences=2)
    with running(llm) as server, server.client() as http:
        run, go_on = llm.engine.runner.run, threading.Event()

        def last_step(chunks):
            if not go_on.wait(0):
                return run(chunks)
            go_on.clear()
            raise exit

        llm.engine.runner.run = last_step
        with ThreadPoolExecutor(4) as pool:  # two run, two wait
            bodies = [{"stream": True}, {}, {"stream": True}, {}]
            asked = [pool.submit(post, http, **{**LONG, **body}) for body in bodies]
            wait_until(lambda: len(server.service.active) == 4)
            go_on.set()
            answers = [one.result(timeout=60) for one in asked]
        for body, answer in zip(bodies, answers, strict=True):
            last = answer.text.strip().split("\n\n")[-1].removeprefix("data: ")
            assert answer.status_code == (200 if body else 500)
            assert json.loads(last)["error"]["message"].startswith("the engine")
        is_dead = not isinstance(exit, Exception)
        wanted = 503 if is_dead else 200
        for path in ("/health", "/v1/health/ready", "/v1/health/live"):
            assert http.get(path).status_code == wanted
        answer = post(http)
        assert answer.status_code == wanted
        if is_dead:
            assert answer.json()["code"] == "broken" and answer.headers["retry-after"]
        assert llm.engine.cache.n_used == 0 and not server.service.active


# Clocks


def test_limits_follow_a_clock_that_nobody_sets(monkeypatch):
    now = 1e6
    monkeypatch.setattr(auth.time, "monotonic", lambda: now)
    for wall in (0.0, 1e12):
        monkeypatch.setattr(auth.time, "time", lambda wall=wall: wall)
        client = auth.Client("alice", auth.Limits(requests_per_minute=2, tokens_per_minute=100))
        gate = auth.Gatekeeper([client], client.limits)
        for n_tokens in (10, 10):
            gate.admit(client)
            gate.release(client, n_tokens)
            now += 10
        with pytest.raises(Refusal, match="2 requests a minute") as refused:
            gate.admit(client)
        assert refused.value.retry_after == 40  # until the first of the two is a minute old
        now += 40
        gate.admit(client)
        gate.release(client, 100)
        now += 20  # the second request is forgotten, but the tokens of the third are not
        with pytest.raises(Refusal, match="100 tokens a minute") as refused:
            gate.admit(client)
        assert refused.value.retry_after == 40


@pytest.mark.parametrize("jump", [-400 * 86400.0, 3600 * 20.0])
def test_a_clock_that_jumps_ends_no_answer_and_no_batch(running, tiny_llm, monkeypatch, jump):
    """Back by more than a year, or ahead, but not so far that a batch of a day would be late."""
    limits = {"api_key": KEYS, "requests_per_minute": 50}
    with running(tiny_llm(), **limits) as server, server.client() as http:
        lines = [
            {"custom_id": str(i), "method": "POST", "url": CHAT, "body": BODY} for i in range(40)
        ]
        batch = start_batch(http, lines)
        with http.stream("POST", CHAT, json={**LONG, "max_tokens": 200, "stream": True}) as s:
            events = s.iter_lines()
            next(events)
            real = time.time
            monkeypatch.setattr(time, "time", lambda: real() + jump)
            assert [line for line in events if line][-1] == "data: [DONE]"
        for path in ("/health", "/v1/health/live"):
            assert http.get(path).status_code == 200
        statuses = [post(http).status_code for _ in range(55)]
        assert statuses == [200] * 49 + [429] * 6
        wait_until(lambda: http.get(batch).json()["status"] == "completed")
        assert http.get(batch).json()["request_counts"]["completed"] == 40
