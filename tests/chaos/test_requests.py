"""Requests that may be anything: an answer or a 4xx for each, and the server keeps running.

schemathesis makes requests out of our OpenAPI (tests/serve/test_gate.py). Here good bodies of every
protocol are made strange in their inner parts (messages, tools, schemas), which OpenAPI does not
describe.
"""

import json
from collections import Counter

import pytest
from hypothesis import strategies as st

from tests.chaos import mutations
from tests.servers import CHAT, wait_until

SCHEMA = {
    "type": "object",
    "properties": {
        "n": {"type": "integer", "minimum": 0},
        "s": {"type": "string", "pattern": "^a+$", "maxLength": 5},
        "l": {"type": "array", "items": {"anyOf": [{"type": "null"}, {"enum": ["a", 1]}]}},
    },
    "required": ["n"],
    "additionalProperties": False,
}
FUNCTION = {"name": "add", "description": "Adds", "parameters": SCHEMA}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": '{"n": 1}'}}
MESSAGES = [
    {"role": "system", "content": "Be brief"},
    {"role": "user", "content": [{"type": "text", "text": "1+1?"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "abcdefghi", "content": "2"},
    {"role": "user", "content": "Hi"},
]
SAMPLING = {
    "model": "tiny", "max_tokens": 4, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "seed": 1,
    "stop": ["x", "yz"], "logit_bias": {"70": 1.5}, "n": 2, "stream": False, "min_tokens": 0,
}  # fmt: skip
BODIES = {
    "chat": (CHAT, {**SAMPLING, "messages": MESSAGES, "tools": [TOOL], "tool_choice": "auto",
                    "logprobs": True, "top_logprobs": 2, "stream_options": None}),
    "structure": (CHAT, {**SAMPLING, "messages": MESSAGES[-1:], "response_format":
                         {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}),
    "vllm": (CHAT, {**SAMPLING, "messages": MESSAGES[-1:], "structured_outputs": {"regex": "a+"},
                    "bad_words": ["ab"], "prompt_logprobs": 1, "cache_salt": "x"}),
    "completions": ("/v1/completions", {**SAMPLING, "prompt": ["Hi", [70, 71]], "echo": True,
                                        "logprobs": 1, "truncate_prompt_tokens": 3}),
    "messages": ("/v1/messages", {
        "model": "tiny", "max_tokens": 4, "system": [{"type": "text", "text": "Be brief"}],
        "messages": [
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "content": [
                {"type": "tool_use", "id": "toolu_1", "name": "add", "input": {"n": 1}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": "2"}]},
        ],
        "tools": [{"name": "add", "description": "Adds", "input_schema": SCHEMA}],
        "tool_choice": {"type": "auto"}, "stop_sequences": ["x"], "temperature": 0.5}),
    "responses": ("/v1/responses", {
        "model": "tiny", "max_output_tokens": 4, "instructions": "Be brief",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "1+1?"}]},
            {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"n": 1}'},
            {"type": "function_call_output", "call_id": "c1", "output": "2"},
        ],
        "tools": [{"type": "function", **FUNCTION}], "tool_choice": "auto",
        "text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}}),
    "tokenize": ("/tokenize", {"model": "tiny", "messages": MESSAGES, "tools": [TOOL]}),
    "detokenize": ("/detokenize", {"model": "tiny", "tokens": [70, 71, 2]}),
}  # fmt: skip
FAILURES = (500, 501, 502, 503, 504)


@pytest.fixture(scope="module")
def server(running, tiny_llm):
    # A mutation may ask for thousands of tokens: the context bounds what an answer can take.
    with running(tiny_llm(max_context=1200), strict_params=False) as server:
        yield server


@pytest.mark.parametrize("name", BODIES)
def test_strange_bodies_are_answered_or_refused(fuzz, server, name):
    path, good = BODIES[name]
    seen: Counter = Counter()
    with server.client() as http:
        assert http.post(path, json=good).status_code == 200

        def check(body, stream: bool) -> None:
            if isinstance(body, dict) and stream:
                body["stream"] = True
            data = json.dumps(body)
            answer = http.post(path, content=data, headers={"content-type": "application/json"})
            seen[answer.status_code] += 1
            assert answer.status_code not in FAILURES, f"{data[:2000]}: {answer.text}"
            if answer.status_code != 200:
                assert answer.json()["error"]["message"]
            elif answer.headers["content-type"].startswith("text/event-stream"):
                assert "internal_server_error" not in answer.text, f"{data[:2000]}: {answer.text}"

        streams = st.booleans() if path.startswith("/v1") else st.just(False)
        fuzz(check, mutations.trees(good), streams, share=0.5)
        assert http.post(path, json=good).status_code == 200
    engine = server.llm.engine
    wait_until(lambda: not engine.cache.n_used and not server.service.active)
    print(f"\n{name}: {dict(seen)}")


@pytest.mark.parametrize("stream", [True, False])
def test_a_number_that_json_cannot_tell_comes_back_as_null(server, stream):
    path, good = BODIES["responses"]
    body = good | {"metadata": {"least": float("nan"), "most": float("inf")}}
    with server.client() as http:
        data = json.dumps(body | {"stream": stream})
        answer = http.post(path, content=data, headers={"content-type": "application/json"})
    assert answer.status_code == 200, answer.text
    assert '"metadata":{"least":null,"most":null}' in answer.text


def test_strange_bytes_are_refused(fuzz, server):
    path, good = BODIES["chat"]

    def check(data: bytes) -> None:
        answer = http.post(path, content=data, headers={"content-type": "application/json"})
        assert answer.status_code in (200, 400, 404, 422), answer.text

    with server.client() as http:
        fuzz(check, mutations.raw_files(json.dumps(good).encode()))
