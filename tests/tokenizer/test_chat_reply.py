"""Generated ids to a message: tool calls found by id, and nothing a model writes is an error."""

import importlib.resources
import json
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opennemo.tokenizer.chat import encode_chat, encode_for_training, parse_reply
from opennemo.tokenizer.load import load_tokenizer
from opennemo.tokenizer.tokenizer import Tokenizer

DATA = Path(str(importlib.resources.files("mistral_common"))) / "data"
FILES = {
    "v1": "tokenizer.model.v1",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v3-tekken": "tekken_240718.json",
}
NEMO = "v3-tekken"


@lru_cache
def load(version: str) -> Tokenizer:
    return load_tokenizer(DATA / FILES[version])


def calling(version: str, *texts: str, content: str = "") -> list[int]:
    """Ids of a reply that announces calls and goes on with each of the texts."""
    tokenizer = load(version)
    ids = tokenizer.encode(content)
    for text in texts:
        ids += [tokenizer.control["[TOOL_CALLS]"], *tokenizer.encode(text)]
    return [*ids, tokenizer.eos_id]


def function(name: str, arguments: str, id: str) -> dict:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


REPLIES = [
    {"role": "assistant", "content": "Où ça ? [TOOL_CALLS][] <tool_call>"},
    {"role": "assistant", "content": " two\n\nlines"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            function("get_weather", '{"city": "Orléans", "days": [1, 2.5, null]}', "VvvODy9mT"),
            function("f", "{}", "000000000"),
        ],
    },
    {"role": "assistant", "content": "I look.", "tool_calls": [function("f", "{}", "abcdefghi")]},
]


@pytest.mark.parametrize("version", ["v3", NEMO])
@pytest.mark.parametrize("reply", REPLIES, ids=["text", "space", "calls", "both"])
def test_parses_what_encode_writes(version: str, reply: dict):
    tokenizer = load(version)
    question = {"role": "user", "content": "A"}
    ids, mask = encode_for_training(tokenizer, [question, reply])
    learned = [id for id, learn in zip(ids, mask, strict=True) if learn]
    # A model learns to call without ids, which it could only guess ...
    assert without_ids(parse_reply(tokenizer, learned)) == without_ids(reply)
    # ... and finds them in its prompt when they are known.
    results = [
        {"role": "tool", "tool_call_id": call["id"], "content": "1"}
        for call in reply.get("tool_calls", [])
    ]
    later = encode_chat(tokenizer, [question, reply, *results, {"role": "user", "content": "B"}])
    earlier = encode_chat(tokenizer, [question])
    assert later[: len(earlier)] == ids[: len(earlier)] == earlier
    end = later.index(tokenizer.eos_id) + 1
    assert parse_reply(tokenizer, later[len(earlier) : end]) == reply
    assert "tool_calls" in reply or later[:end] == ids


def without_ids(reply: dict) -> dict:
    calls = [{**call, "id": None} for call in reply.get("tool_calls", [])]
    return {**reply, "tool_calls": calls}


@pytest.mark.parametrize(
    ("text", "name", "arguments"),
    [
        ('[{"name": "f", "arguments": {"a": 1}}]', "f", '{"a": 1}'),
        (' \n{"name": "f", "arguments": {"a": 1}} ', "f", '{"a": 1}'),
        ('[{"name":"f","arguments":"{\\"a\\":1}"}]', "f", '{"a":1}'),
        ('[{"name": "f", "parameters": {"é": "\\u00e9"}}]', "f", '{"é": "é"}'),
        ('[{"name": "f"}]', "f", "{}"),
        ('[{"name": "f", "arguments": {}, "id": "too long to be one"}]', "f", "{}"),
        ('[{"name": "f", "arguments": {}, "id": 7}]', "f", "{}"),
    ],
)
def test_calls_as_models_write_them(text: str, name: str, arguments: str):
    reply = parse_reply(load(NEMO), calling(NEMO, text))
    (call,) = reply["tool_calls"]
    assert call["function"] == {"name": name, "arguments": arguments}
    assert len(call["id"]) == 9 and call["id"].isalnum() and call["id"].isascii()
    assert reply["content"] is None and call["type"] == "function"


MALFORMED = [
    *("", "   ", "[", "[{", "[]", "{}", "null", "3", '"text"', "[1]", "['f']", "I will call f."),
    *('[{"name": "f", "arguments": {"a": 1}', '[{"name": "f", "arguments": {"a": }}]'),
    *("[{'name': 'f', 'arguments': {}}]", '[{"name": 3, "arguments": {}}]', '[{"arguments": {}}]'),
    *('[{"name": "f", "arguments": [1]}]', '[{"name": "f", "arguments": "not JSON"}]'),
    *('[{"name": "f", "arguments": null}]', '[{"name": "f", "arguments": {"a": NaN}}]'),
    *('[{"name": "f", "arguments": {"a": "\\ud83e"}}]', '[{"name": "\\udd99"}]'),
    *('[{"name": "f"}, "g"]', '[{"name": "f", "arguments": {"a": ' + "9" * 5000 + "}}]"),
    *("[" * 200_000, '{"a":' * 100_000, '[{"name": "f", "arguments": ' + '[{"a":' * 50_000),
]


@pytest.mark.parametrize("text", MALFORMED, ids=lambda text: text[:40])
def test_malformed_calls_are_content(text: str):
    tokenizer = load(NEMO)
    reply = parse_reply(tokenizer, calling(NEMO, text, content="Well. "))
    assert reply == {"role": "assistant", "content": "Well. " + text}


def test_what_follows_the_calls_is_kept():
    call = '[{"name": "f", "arguments": {}, "id": "abcdefghi"}]'
    reply = parse_reply(load(NEMO), calling(NEMO, f"{call} Done.", content="Well. "))
    assert reply["content"] == "Well. Done." and len(reply["tool_calls"]) == 1
    twice = parse_reply(load(NEMO), calling(NEMO, call, call))
    assert [c["function"]["name"] for c in twice["tool_calls"]] == ["f", "f"]
    assert twice["tool_calls"][0]["id"] == "abcdefghi" != twice["tool_calls"][1]["id"]


def test_ids_that_the_model_left_out_depend_on_the_request():
    ids = calling(NEMO, '[{"name": "f"}, {"name": "f"}]')

    def given_ids(request_id: str) -> list[str]:
        reply = parse_reply(load(NEMO), ids, request_id=request_id)
        return [call["id"] for call in reply["tool_calls"]]

    assert given_ids("a") == given_ids("a")
    assert len({*given_ids("a"), *given_ids("b")}) == 4


def test_only_the_control_id_announces_calls():
    tokenizer = load(NEMO)
    text = '[TOOL_CALLS][{"name": "f", "arguments": {}}]'
    assert parse_reply(tokenizer, tokenizer.encode(text)) == {"role": "assistant", "content": text}


def test_calls_in_tags_where_there_is_no_control_token():
    tokenizer = load("v1")
    text = (
        'Let me.\n<tool_call>\n{"name": "f", "arguments": {"a": "<b>"}}\n</tool_call>\n'
        '<tool_call>{"name": "g", "arguments": {}}</tool_call> Wait.'
    )
    reply = parse_reply(tokenizer, [*tokenizer.encode(text), tokenizer.eos_id])
    assert [call["function"] for call in reply["tool_calls"]] == [
        {"name": "f", "arguments": '{"a": "<b>"}'},
        {"name": "g", "arguments": "{}"},
    ]
    assert reply["content"] == "Let me.\n Wait."
    for broken in ('<tool_call>{"name": "f"', "<tool_call>", "a <tool_call> is a tag"):
        reply = parse_reply(tokenizer, tokenizer.encode(broken))
        assert reply == {"role": "assistant", "content": broken}


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_ids_make_a_message(data: st.DataObject):
    tokenizer = load(data.draw(st.sampled_from([*FILES])))
    pieces = st.sampled_from(
        [*MALFORMED[:24], '[{"name": "f", "arguments": {}}]', "<tool_call>", "🦙"]
    )
    control = st.sampled_from(sorted(tokenizer.control.values())[:20]).map(lambda id: [id])
    words = st.one_of(
        control, pieces.map(tokenizer.encode), st.integers(0, 31_999).map(lambda i: [i])
    )
    ids = [id for word in data.draw(st.lists(words, max_size=8)) for id in word]
    reply = parse_reply(tokenizer, iter(ids))
    assert reply["role"] == "assistant" and reply.keys() <= {"role", "content", "tool_calls"}
    if "tool_calls" not in reply:
        assert reply["content"] == tokenizer.decode(ids)
    for call in reply.get("tool_calls", []):
        assert isinstance(json.loads(call["function"]["arguments"]), dict)
    json.dumps(reply).encode()
