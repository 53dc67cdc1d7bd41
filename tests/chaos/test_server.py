"""A server under common faults: an engine dies, clocks jump, clients idle, stall, vanish."""

import json
import resource
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx2
import pytest

from opennemo.serve import auth
from opennemo.serve.error_bodies import Refusal
from tests.servers import CHAT, wait_until

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}
# What a request holds in the engine while it is under way.
HELD = ("requests_running", "requests_waiting", "kv_cache_pages_used")
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
        client = auth.Client("alice", auth.KeyLimits(requests_per_minute=2, tokens_per_minute=100))
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
        gate.release(client, 5)  # an answer that was under way all the time
        now += 20
        gate.release(client, 99)
        with pytest.raises(Refusal, match="100 tokens a minute") as refused:
            gate.admit(client)
        # 204 were used where two minutes allow 200; the last of them count in the third.
        assert refused.value.retry_after == 100


def test_a_large_answer_counts_for_as_many_minutes_as_it_takes(monkeypatch):
    now = 1e6
    monkeypatch.setattr(auth.time, "monotonic", lambda: now)
    client = auth.Client("alice", auth.KeyLimits(tokens_per_minute=200))
    gate = auth.Gatekeeper([client], client.limits)
    gate.admit(client)
    for _ in range(3):  # the other two are parts of the same request
        gate.admit(client, is_part=True)
    for n_tokens in (961, 0, 30, 10):
        gate.release(client, n_tokens)
    for passed, left in ((0, 300), (299.5, 0.5)):  # 1,001 are five minutes' worth and one more
        now += passed
        with pytest.raises(Refusal, match="200 tokens a minute") as refused:
            gate.admit(client)
        assert refused.value.retry_after == left
    now += 0.5
    gate.admit(client)


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


# Connections


def raw_request(server, body: dict, path: str = CHAT) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    key = f"authorization: Bearer {server.key}\r\n" if server.key else ""
    return f"{head}{key}content-length: {len(data)}\r\n\r\n".encode() + data


def connect(server, receive_buffer: int | None = None) -> socket.socket:
    raw = socket.socket()
    if receive_buffer:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    raw.settimeout(60)
    raw.connect(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
    return raw


def is_clean(server) -> bool:
    """Nothing is held any more: no answers, no sequences, no pages."""
    engine, gate = server.llm.engine, server.service.gatekeeper
    clients = (gate.anonymous, *gate.clients)
    return not (
        server.service.active or any(c.n_running for c in clients)
        or any(engine.stats()[name] for name in HELD)
    )  # fmt: skip


def raise_descriptors(n: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < n:
        pytest.skip(f"a process may have {hard} open files here, and the test needs {n}")
    if soft < n:
        resource.setrlimit(resource.RLIMIT_NOFILE, (n, hard))


def test_a_thousand_idle_connections_keep_nobody_out_and_are_closed(running, tiny_llm):
    raise_descriptors(2500)  # both ends are in this process
    with running(tiny_llm(), keep_alive=3) as server, server.client() as http:
        whole = raw_request(server, BODY)
        sent = (b"", b"\r\n", whole[:30], whole[:-5], whole[: whole.index(b"\r\n\r\n") + 4])
        idle = []
        for i in range(1000):
            idle.append(connect(server))
            idle[-1].sendall(sent[i % len(sent)])
        assert http.get("/health").status_code == 200 and post(http).status_code == 200
        for raw in idle:
            with raw, suppress(ConnectionResetError):
                assert raw.recv(99)[:12] in (b"", b"HTTP/1.1 408")  # within its timeout
        assert post(http).status_code == 200 and is_clean(server)


def test_more_idle_connections_than_there_may_be_lock_nobody_out(running, tiny_llm):
    """1,400 connections of one client made every other request a 503, even health checks."""
    with running(tiny_llm(), connections=40) as server, server.client() as http:
        whole = raw_request(server, BODY)
        idle = []
        for i in range(300):
            idle.append(connect(server))
            idle[-1].sendall((b"", b"GET /", whole[:-5])[i % 3])
            if i % 20 == 0:
                assert http.get("/health").status_code == 200 and post(http).status_code == 200
        for raw in idle:
            raw.close()
        wait_until(lambda: is_clean(server))


def test_where_every_connection_is_busy_the_next_one_is_told_so(running, tiny_llm):
    with running(tiny_llm(), connections=4) as server, server.client() as http:
        busy = []
        for _ in range(4):
            busy.append(connect(server))
            busy[-1].sendall(raw_request(server, {**LONG, "stream": True}))
            assert busy[-1].recv(12) == b"HTTP/1.1 200"
        refused = http.get("/v1/models")
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "service_unavailable"
        for raw in busy:
            raw.close()
        wait_until(lambda: is_clean(server))
        assert post(http).status_code == 200


def test_a_body_that_trickles_ends_by_time(running, tiny_llm):
    with running(tiny_llm(), keep_alive=1) as server, connect(server) as raw:
        whole = raw_request(server, BODY)
        raw.sendall(whole[: whole.index(b"\r\n\r\n") + 4])
        raw.settimeout(0.05)
        answer = b""
        with suppress(ConnectionError):
            while not answer:
                raw.sendall(b" ")
                with suppress(TimeoutError):
                    answer = raw.recv(4096)
        assert answer.startswith(b"HTTP/1.1 408") and b'"error"' in answer


def test_who_reads_nothing_is_let_go_and_who_reads_slowly_is_not(running, tiny_llm):
    body = {**LONG, "n": 4, "logprobs": True, "top_logprobs": 20, "stream": True}
    with running(tiny_llm(), keep_alive=1) as server:
        still, slow = connect(server, 4096), connect(server, 4096)
        still.sendall(raw_request(server, body))
        slow.sendall(raw_request(server, {**body, "max_tokens": 60, "n": 2}))
        data = b""
        while not data.endswith(b"0\r\n\r\n"):
            data += slow.recv(3000)
            time.sleep(0.002)
        assert data.count(b"data: [DONE]") == 1
        wait_until(lambda: is_clean(server))  # though `still` has not gone
        got = b""
        with still, suppress(ConnectionResetError):
            while data := still.recv(2**20):
                got += data
        assert b"[DONE]" not in got


@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/v1/responses", "/v1/completions"])
@pytest.mark.parametrize("step", [97, pytest.param(1, marks=pytest.mark.chaos)])
def test_clients_that_vanish_at_every_point_leave_nothing(running, tiny_llm, path, step):
    body = {**BODY, "input": "Hi", "prompt": "Hi", "max_output_tokens": 8, "stream": True}
    if path in ("/v1/responses", "/v1/completions"):
        del body["messages"]
    with running(tiny_llm(), api_key=KEYS) as server:
        request = raw_request(server, body, path)
        with connect(server) as raw:
            raw.sendall(request)
            answer = b""
            while not answer.endswith(b"0\r\n\r\n"):
                answer += raw.recv(65536)
        assert answer.startswith(b"HTTP/1.1 200")
        for n in range(0, len(request), step):  # in the middle of asking
            with connect(server) as raw:
                raw.sendall(request[:n])
        for n in range(1, len(answer), step):  # in the middle of the answer; by a reset or an end
            with connect(server) as raw:
                if n // step % 2:
                    linger = struct.pack("ii", 1, 0)
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                raw.sendall(request)
                left = n
                while left > 0 and (data := raw.recv(min(left, 4096))):
                    left -= len(data)
        wait_until(lambda: is_clean(server))
        with server.client() as http:
            assert post(http).status_code == 200
