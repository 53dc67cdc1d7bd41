"""Who gets in: keys, hosts, limits, bounds; and that nothing a client sends is a 500."""

import hmac
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest

from opennemo.batch.api import mount
from opennemo.serve import auth
from opennemo.serve.app import WEB, create_app

CHAT = "/v1/chat/completions"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}


def routes(app):
    """(method, path) of everything that the application answers."""
    found = set()
    for route in app.routes:
        inner = getattr(getattr(route, "original_router", None), "routes", None)
        for r in inner or [route]:
            for method in getattr(r, "methods", None) or ():
                found.add((method, r.path.replace("{name:path}", "tiny")))
    return found


def test_every_route_but_the_open_ones_asks_for_a_key(server):
    open_paths = {
        "/health",
        "/ping",
        "/v1/health/live",
        "/v1/health/ready",
        "/metrics",
        "/v1/metrics",
    }
    open_paths |= {"/"} | {f"/{path.relative_to(WEB)}" for path in WEB.rglob("*") if path.is_file()}
    app = create_app(server.service)
    mount(app)
    seen = routes(app)
    assert len(seen) > 30 and ("POST", CHAT) in seen and ("POST", "/sleep") in seen
    with httpx2.Client(base_url=server.url) as client:
        for method, path in [*sorted(seen), ("GET", "/no"), ("POST", "/invocations")]:
            for headers in ({}, {"authorization": "Bearer nonsense"}, {"x-api-key": "nonsense"}):
                status = client.request(method, path, headers=headers).status_code
                assert (status == 401) == (path not in open_paths), f"{method} {path}: {status}"
    with server.client() as client:  # an ordinary key does not open the admin's routes
        assert client.post("/sleep").status_code == 401
        assert client.get("/is_sleeping").status_code == 401


def test_keys_are_compared_in_constant_time_and_found_in_both_headers(server, monkeypatch):
    compared, original = [], hmac.compare_digest

    def compare(a, b):
        compared.append((a, b))
        return original(a, b)

    monkeypatch.setattr(auth.hmac, "compare_digest", compare)
    assert httpx2.get(f"{server.url}/v1/models", headers={"x-api-key": server.key}).is_success
    assert compared and all(server.key.encode() not in pair for pair in compared)
    assert httpx2.get(f"{server.url}/v1/models").headers["www-authenticate"] == "Bearer"


def test_hosts_that_are_not_local_are_turned_away(server):
    for host, status in (
        ("127.0.0.1", 200), ("localhost:99", 200), ("[::1]:80", 200),
        ("evil.example", 403), ("127.0.0.1.evil.example:80", 403), ("", 403),
    ):  # fmt: skip
        assert httpx2.get(f"{server.url}/health", headers={"host": host}).status_code == status


def test_limits_of_a_key(running, tiny_llm):
    with running(tiny_llm(), requests_per_minute=2, tokens_per_minute=0) as server:
        with server.client() as http:
            answers = [http.post(CHAT, json=BODY) for _ in range(3)]
        assert [a.status_code for a in answers] == [200, 200, 429]
        assert 1 <= int(answers[2].headers["retry-after"]) <= 60
    with running(tiny_llm(), tokens_per_minute=5) as server, server.client() as http:
        assert [http.post(CHAT, json=BODY).status_code for _ in range(2)] == [200, 429]
    with running(tiny_llm(), max_concurrent=1) as server, server.client() as http:
        long = {**BODY, "max_tokens": 3000, "stream": True, "ignore_eos": True}
        with http.stream("POST", CHAT, json=long) as stream:
            lines = stream.iter_lines()
            next(lines)
            assert http.post(CHAT, json=BODY).status_code == 429
        while server.service.active:
            pass
        assert http.post(CHAT, json=BODY).status_code == 200


def test_bodies_and_headers_are_bounded(running, tiny_llm):
    with running(tiny_llm(), max_body_size=10_000) as server:
        with server.client() as http:
            big = {**BODY, "messages": [{"role": "user", "content": "x" * 20_000}]}
            assert http.post(CHAT, json=big).status_code == 413
            assert http.post(CHAT, json=BODY).status_code == 200
            for n_bytes, status in ((60_000, 200), (70_000, 431), (100_000, 431), (200_000, 431)):
                answer = http.get("/health", headers={"x": "y" * n_bytes})
                assert answer.status_code == status, n_bytes
        port = int(server.url.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port)) as raw:
            raw.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: ")
            answer = b""
            try:
                for _ in range(100):
                    raw.sendall(b"y" * 10_000)
                raw.settimeout(5)
                answer = raw.recv(100)
            except (ConnectionError, TimeoutError) as error:
                assert isinstance(error, ConnectionError), "it went on reading"
            assert answer[:12] in (b"HTTP/1.1 431", b"")


def test_what_is_no_http_gets_an_error_body_too(server):
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as raw:
        raw.sendall(b"GET /health NONSENSE\r\n\r\n")
        head, _, body = raw.makefile("rb").read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400") and b"application/json" in head
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": -1}, {"temperature": 1e308}, {"top_p": 0}, {"n": 17}, {"n": 0},
        {"max_tokens": 0}, {"max_tokens": 2**70}, {"top_logprobs": 21, "logprobs": True},
        {"top_logprobs": 2}, {"stop": ["x"] * 17}, {"stop": "x" * 2000}, {"logit_bias": {"x": 1}},
        {"logit_bias": {"5": 101}}, {"logit_bias": {"999999": 1}}, {"seed": 2**64},
        {"logit_bias": {str(i): 1 for i in range(1025)}}, {"messages": "hello"},
        {"messages": []}, {"messages": [[]]},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, {"tools": [{}]},
        {"tools": [{"type": "function", "function": {"name": 5}}]}, {"tool_choice": "maybe"},
        {"tool_choice": "required"}, {"tool_choice": {"function": {"name": "x"}}},
        {"response_format": {"type": "xml"}}, {"response_format": {"type": "json_schema"}},
        {"structured_outputs": {"regex": "("}}, {"structured_outputs": {"json": {}, "regex": "x"}},
        {"structured_outputs": {"choice": []}}, {"chat_template": "{{ 7 * 7 }}"},
        {"chat_template_kwargs": {"x": 1}}, {"cache_salt": "\n"}, {"stop_token_ids": [-1]},
        {"model": None}, {"best_of": 5},
    ],
)  # fmt: skip
def test_what_is_wrong_is_a_400_or_422_that_names_it(http, change):
    answer = http.post(CHAT, json={**BODY, **change})
    assert answer.status_code in (400, 422), answer.text
    error = answer.json()
    assert error["object"] == "error" and error["message"] == error["error"]["message"]
    assert isinstance(error["code"], str | None)


def test_schemas_that_are_bombs_do_not_go_off(http):
    deep = {}
    for _ in range(300):
        deep = {"anyOf": [deep, {"type": "string"}]}
    for source in ({"json": deep}, {"grammar": "start: x"}, {"regex": "a" * 70_000}):
        answer = http.post(CHAT, json={**BODY, "structured_outputs": source})
        assert answer.status_code == 400, answer.text
    nested = {"regex": "(a{1,1000}){1,1000}{1,1000}"}  # harmless: it is never spelt out
    assert http.post(CHAT, json={**BODY, "structured_outputs": nested}).status_code == 200
    assert http.post(CHAT, json=BODY).status_code == 200


def test_unknown_fields_are_told_of_or_refused(http, running, tiny_llm):
    answer = http.post(CHAT, json={**BODY, "reasoning_content": 1, "user": "me", "a\nb": 2})
    assert answer.headers["x-ignored-params"] == "reasoning_content, user"
    with running(tiny_llm(), strict_params=True) as server, server.client() as strict:
        refused = strict.post(CHAT, json={**BODY, "reasoning_content": 1})
        assert refused.status_code == 422 and refused.json()["detail"][0]["loc"][1]
        assert strict.post(CHAT, json={**BODY, "user": "me"}).status_code == 200


def test_bodies_that_are_no_json(http):
    json_type = {"content-type": "application/json"}
    nan = json.dumps({**BODY, "temperature": float("nan")}).encode()
    for data in (b"", b"{", b"[" * 100_000, b'"x"', b"\xff\xfe", b"1" * 5000, nan):
        assert http.post(CHAT, content=data, headers=json_type).status_code in (400, 422)
    plain = http.post(CHAT, content=json.dumps(BODY), headers={"content-type": "text/plain"})
    assert plain.status_code == 422  # a form of a foreign site can send this, but not JSON
    half = json.dumps({**BODY, "model": "\ud800"}).encode()
    assert http.post(CHAT, content=half, headers=json_type).status_code == 422


def test_request_ids_and_logs_cannot_be_forged(http):
    assert http.get("/health", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    for odd in ("a b", "a" * 129, 'x"y'):
        assert http.get("/health", headers={"x-request-id": odd}).headers["x-request-id"] != odd


def test_schemathesis_finds_nothing(server, http, tmp_path):
    """Requests made from our own OpenAPI: no 5xx, no undeclared status or type of content."""
    pytest.importorskip("schemathesis")
    api = http.get("/openapi.json").json()
    for schema in api["components"]["schemas"].values():
        if "model" in schema.get("properties", {}):  # or every request would be a 404
            schema["properties"]["model"] = {"const": "tiny"}
        for name in ("max_tokens", "max_output_tokens"):
            if name in schema.get("properties", {}):
                schema["properties"][name] = {"type": "integer", "minimum": 1, "maximum": 20}
                schema["required"] = sorted({*schema["required"], name})
    (tmp_path / "openapi.json").write_text(json.dumps(api))
    command = [Path(sys.executable).with_name("schemathesis"), "run", tmp_path / "openapi.json"]
    command += ["-u", server.url, "-H", f"authorization: Bearer {server.key}", "-n", "10"]
    command += ["--phases", "coverage,fuzzing", "--seed", "1", "--no-color", "--max-time", "15"]
    # It leaves out max_tokens, too: an answer of 4,000 tokens takes longer than its usual 10 s.
    command += ["--request-timeout", "120"]
    command += ["-c", "not_a_server_error,status_code_conformance,content_type_conformance"]
    command += ["--exclude-path", "/v1/embeddings", "--exclude-path-regex", "sleep|wake|lora"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-4000:]
    while server.service.active:
        time.sleep(0.01)
    assert server.llm.engine.cache.n_used == 0
