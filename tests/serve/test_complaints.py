"""What users of this model ran into with other servers; each test names the complaint."""

import json
import time

import pytest

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hi"}]
BODY = {"model": "tiny", "messages": HELLO, "max_tokens": 8}
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
TOOL = {"type": "function", "function": {"name": "add", "parameters": SCHEMA}}
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"n": 1}'}}
TOOL_CALLS = 9  # the id of the token that announces calls


def choice(http, **fields) -> dict:
    answer = http.post(CHAT, json={**BODY, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def test_the_border_of_the_context(http, server):
    """An input as long as the context crashed a server; others cut it silently."""
    n = server.llm.engine.max_context
    for length, status in ((n - 1, 200), (n, 400), (n + 1, 400)):
        body = {"model": "tiny", "prompt": [70] * length, "max_tokens": 5}
        answer = http.post("/v1/completions", json=body)
        assert answer.status_code == status
        if status == 200:
            assert answer.json()["choices"][0]["finish_reason"] == "length"
            assert answer.json()["usage"]["completion_tokens"] == 1
        else:
            error = answer.json()
            assert error["code"] == "context_length_exceeded"
            assert f"{length + 1}" in error["message"].replace(",", "")
            assert f"{n}" in error["message"].replace(",", "")


@pytest.mark.parametrize(
    "id", ["call_Abc-123_very_long_indeed", "chatcmpl-tool-5f", "", "abcdefghi"]
)
def test_ids_of_calls_may_be_anybodys(http, id):
    """UUIDs and `chatcmpl-tool-...` were refused on the next turn."""
    turns = [{"role": "assistant", "content": None, "tool_calls": [{"id": id, **CALL}]}]
    turns += [{"role": "tool", "tool_call_id": id, "content": "2"}]
    assert choice(http, messages=[*HELLO, *turns], tools=[TOOL], tool_choice="none")


@pytest.mark.parametrize(
    "messages",
    [
        [*HELLO, *HELLO],  # "roles must alternate"
        [
            *HELLO,
            {"role": "assistant", "content": "Yes"},
            {"role": "system", "content": "Be nice"},
            *HELLO,
        ],
        [
            {"role": "developer", "content": "Be brief"},
            {"role": "user", "content": "Hi", "name": "Bo"},
        ],
        [
            *HELLO,
            {"role": "assistant", "content": "", "tool_calls": [{"id": "1", **CALL}]},
            {"role": "tool", "tool_call_id": "1", "content": "2"},
            *HELLO,
        ],  # a user after a result
        [
            *HELLO,
            {"role": "assistant", "content": "x", "reasoning_content": "y", "refusal": None},
            *HELLO,
        ],
        [
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            }
        ],
    ],
)
def test_conversations_that_the_reference_refuses(http, messages):
    assert choice(http, messages=messages)["finish_reason"] in ("stop", "length")


def test_fields_that_others_answer_with_422(http):
    fields = {
        "tools": [], "tool_choice": None, "functions": None, "safe_prompt": False,
        "reasoning_effort": "low", "parallel_tool_calls": True, "user": "me", "stop": None,
        "metadata": {"a": "b"}, "store": True, "logit_bias": None, "response_format": None,
        "prediction": {"type": "content", "content": "x"}, "service_tier": "auto",
    }  # fmt: skip
    assert "tool_calls" not in choice(http, **fields)["message"]


@pytest.mark.parametrize("fields", [{}, {"response_format": {"type": "json_object"}}])
def test_calls_are_not_announced_without_tools(http, fields):
    """JSON mode broke where the model wrote [TOOL_CALLS] though there were no tools."""
    fields |= {"logit_bias": {TOOL_CALLS: 100}, "return_token_ids": True, "max_tokens": 60}
    assert TOOL_CALLS not in choice(http, **fields)["token_ids"]


@pytest.mark.parametrize("skip", [True, False])
def test_calls_are_found_whatever_is_done_with_special_tokens(http, skip):
    fields = {"tools": [TOOL], "skip_special_tokens": skip, "max_tokens": 2000, "seed": 1}
    only = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [TOOL]}}
    named = {"type": "function", "function": {"name": "add"}}
    for wanted in ("required", "any", named, only):
        answer = choice(http, **fields, tool_choice=wanted, parallel_tool_calls=False)
        (call,) = answer["message"]["tool_calls"]
        assert answer["finish_reason"] == "tool_calls" and len(call["id"]) == 9
        assert isinstance(json.loads(call["function"]["arguments"])["n"], int)


def test_a_tool_with_any_schema_blocks_no_conversation(http):
    """One MCP tool whose schema no grammar can hold made every request with it a 400."""
    tags = {"type": "array", "items": {"type": "string"}, "uniqueItems": True}
    odd = {"name": "odd", "parameters": {"type": "object", "properties": {"tags": tags}}}
    body = {**BODY, "tools": [TOOL, {"type": "function", "function": odd}]}
    answer = http.post(CHAT, json=body)
    assert answer.status_code == 200
    assert answer.headers["x-not-held"] == "odd: parameters.properties.tags.uniqueItems"
    for choice in ("required", {"type": "function", "function": {"name": "odd"}}):
        refused = http.post(CHAT, json={**body, "tool_choice": choice})
        assert refused.status_code == 400
        assert "'odd': parameters.properties.tags.uniqueItems" in refused.json()["message"]
    named = {"type": "function", "function": {"name": "add"}}
    assert http.post(CHAT, json={**body, "tool_choice": named}).status_code == 200


def test_a_schema_of_hundreds_of_optional_properties_is_no_defect(http):
    properties = {f"p{i}": {"type": "integer", "minimum": 0} for i in range(600)}
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert choice(http, response_format=format, max_tokens=50)


def test_a_call_that_is_cut_off_is_no_error(http):
    answer = choice(http, tools=[TOOL], tool_choice="required", max_tokens=12)
    assert answer["finish_reason"] == "length"


def test_silent_streams_are_kept_alive(running, tiny_llm):
    with running(tiny_llm(), sse_keep_alive_interval=0.05) as server, server.client() as http:
        runner = server.llm.engine.runner
        whole_step = runner.run
        runner.run = lambda chunks: (time.sleep(0.3), whole_step(chunks))[1]
        for path, ping in ((CHAT, ": keep-alive"), ("/v1/messages", "event: ping")):
            body = {**BODY, "stream": True, "max_tokens": 2, "temperature": 0}
            with http.stream("POST", path, json=body) as answer:
                lines = [line for line in answer.iter_lines() if line]
            assert ping in lines and lines.index(ping) < len(lines) - 1


def test_words_of_vllm_for_going_on(http):
    turns = [*HELLO, {"role": "assistant", "content": "Sure"}]
    fields = {"messages": turns, "continue_final_message": True, "add_generation_prompt": False}
    answer = choice(http, **fields, seed=4)["message"]["content"]
    assert choice(http, **fields, seed=4, echo=True)["message"]["content"] == "Sure" + answer
    text = choice(http, seed=4, temperature=0, max_tokens=6)["message"]["content"]
    stop = next(c for c in text if c.isascii() and c.isprintable())
    cut = choice(http, seed=4, temperature=0, max_tokens=6, stop=stop)
    assert cut["message"]["content"] == text[: text.index(stop)] and cut["finish_reason"] == "stop"
    kept = choice(http, temperature=0, max_tokens=6, stop=[stop], include_stop_str_in_output=True)
    assert kept["message"]["content"] == text[: text.index(stop) + 1]
    scored = choice(http, prompt_logprobs=2, max_completion_tokens=1, max_tokens=50)
    first, *others = scored["prompt_logprobs"]
    assert first is None and all(2 <= len(token) <= 3 for token in others)


def test_load_is_told(http):
    assert http.get("/load").json() == {"server_load": 0}


def test_the_name_that_was_typed_is_served_beside_the_models_own(running, tiny_llm, tmp_path):
    """A client got a 404 for the model name that the server was started with."""
    typed = str(tmp_path / "models" / "of-mine")
    with running(tiny_llm(), model=typed) as server, server.client() as http:
        for name in (typed, "tiny"):
            assert http.post(CHAT, json={**BODY, "model": name}).json()["model"] == name
        card = http.get(f"/v1/models/{typed}").json()
        assert card["id"] == typed and card["parent"] is None
        assert server.service.serves(typed)
    other = running(tiny_llm(), model=typed, served_model_name=["mine"])
    with other as server, server.client() as http:  # then only that name is accepted
        assert http.post(CHAT, json={**BODY, "model": typed}).status_code == 404


def test_a_model_that_is_not_there_says_what_to_do(http):
    for name, words in (("gpt-4o", ["OpenAI", "'tiny'"]), ("other", []), ("a b;c", ["'a b;c'"])):
        answer = http.post(CHAT, json={**BODY, "model": name})
        assert answer.status_code == 404
        for word in ("no model", "tiny", "--served-model-name", *words):
            assert word in answer.json()["message"]


def test_parts_of_characters_are_told_apart_and_offsets_count_characters(http):
    """All had the name U+FFFD, so that one overwrote another, and each counted as a character."""
    text = "😀 日x"
    body = {"model": "tiny", "prompt": text, "max_tokens": 1, "temperature": 0, "echo": True}
    for more in ({}, {"stream": True}):
        answer = http.post("/v1/completions", json={**body, "logprobs": 20, **more})
        data = answer.text.split("data: ")[1] if more else answer.text
        logprobs = json.loads(data)["choices"][0]["logprobs"]
        n = len(text.encode()) + 1
        assert logprobs["text_offset"][:n] == [0, 0, 0, 0, 0, 1, 2, 2, 2, 3]
        assert logprobs["tokens"][1:5] == [f"bytes:\\x{byte:02x}" for byte in "😀".encode()]
        for token, own, top in zip(*list(logprobs.values())[:3], strict=True):
            assert top is None or (len(top) >= 20 and top[token] == own)


def test_offsets_go_on_from_part_to_part_of_a_stream(http):
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 40, "logprobs": 0, "seed": 3}
    whole = http.post("/v1/completions", json=body).json()["choices"][0]
    lines = http.post("/v1/completions", json={**body, "stream": True}).text.split("data: ")[1:-1]
    parts = [json.loads(line)["choices"][0] for line in lines]
    assert "".join(part["text"] for part in parts) == whole["text"]
    offsets = [offset for part in parts for offset in part["logprobs"]["text_offset"]]
    assert offsets == whole["logprobs"]["text_offset"] and max(offsets) > 1


def test_a_list_of_prompts_is_streamed(http, server):
    body = {"model": "tiny", "prompt": ["abc", "de", "f"], "n": 2, "seed": 3, "max_tokens": 12}
    whole = http.post("/v1/completions", json=body).json()
    usage = {"stream_options": {"include_usage": True}}
    answer = http.post("/v1/completions", json={**body, "stream": True, **usage})
    *lines, last, end = answer.text.split("data: ")[1:]
    assert end.strip() == "[DONE]"
    counts = json.loads(last)["usage"]
    assert counts["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert counts["prompt_tokens"] == whole["usage"]["prompt_tokens"]
    texts, reasons = [""] * 6, [None] * 6
    for line in lines:
        chunk = json.loads(line)
        (part,) = chunk["choices"]
        assert chunk["usage"] is None
        texts[part["index"]] += part["text"]
        reasons[part["index"]] = part["finish_reason"]
    assert texts == [c["text"] for c in whole["choices"]]
    assert reasons == [c["finish_reason"] for c in whole["choices"]]
    endless = {**body, "stream": True, "n": 1, "ignore_eos": True, "max_tokens": 3000}
    with http.stream("POST", "/v1/completions", json=endless) as stream:
        next(stream.iter_lines())
    while server.service.active:  # hanging up ends them all
        time.sleep(0.01)


def test_every_stream_says_usage_where_its_clients_look(http):
    usage = {"stream_options": {"include_usage": True}}
    lines = http.post(CHAT, json={**BODY, "stream": True, **usage}).text.split("data: ")[1:-1]
    *chunks, last = [json.loads(line) for line in lines]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] > 0
    events = http.post("/v1/messages", json={**BODY, "stream": True}).text.split("data: ")[1:]
    counts = [json.loads(event.partition("\n")[0]) for event in events]
    (end,) = [event["usage"] for event in counts if event["type"] == "message_delta"]
    whole = http.post("/v1/messages", json=BODY).json()["usage"]
    for name in ("input_tokens", "cache_read_input_tokens"):
        assert isinstance(end[name], int)
    total = whole["input_tokens"] + whole["cache_read_input_tokens"]
    assert end["input_tokens"] + end["cache_read_input_tokens"] == total


def test_a_body_that_is_no_json_names_no_field(http):
    """`param` was the place in the text at which it ends to be JSON."""
    answer = http.post(CHAT, content=b'{"model": ', headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["param"] is None and answer.json()["error"]["param"] is None


def test_more_tokens_than_there_is_room_for_are_reported(http, server):
    """Clients send large numbers by default: others refuse them, or cut them silently."""
    room = server.llm.engine.max_context - 3
    body = {"model": "tiny", "prompt": [70] * 3}
    for n, header in ((room, None), (room + 1, str(room))):
        answer = http.post("/v1/completions", json={**body, "max_tokens": n, "stop": ["\x00"]})
        assert answer.status_code == 200, answer.text
        assert answer.headers.get("x-max-tokens") == header
