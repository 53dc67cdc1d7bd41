"""A server under what befalls servers: an engine dies, clocks jump, clients idle, stall, vanish."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from tests.servers import CHAT, wait_until

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}
LONG = {**BODY, "max_tokens": 3000, "ignore_eos": True}


def post(http: httpx2.Client, **fields) -> httpx2.Response:
    return http.post(CHAT, json={**BODY, **fields})


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
