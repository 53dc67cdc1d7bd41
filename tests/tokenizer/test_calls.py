"""Tool calls read from a stream, at every split point, against the parser of whole answers."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opennemo.tokenizer.calls import Call, CallParser
from opennemo.tokenizer.chat import parse_reply
from opennemo.tokenizer.tekken import SINGLE_BYTES, Tekken

BYTES = Tekken(r"(?s:.)", SINGLE_BYTES, n_special=64)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
CALLS = st.lists(
    st.fixed_dictionaries(
        {"name": st.sampled_from(["add", "get_weather"])},
        optional={"arguments": st.dictionaries(st.text(max_size=4), VALUES, max_size=3)},
    ),
    min_size=1,
    max_size=3,
)


def read(pieces: list[str]) -> list[tuple[str, str, str]]:
    parser, calls = CallParser("request"), []
    for piece in pieces:
        for call in parser.feed(piece):
            if call.name:
                calls.append(Call(**vars(call)))
            else:
                calls[call.index].arguments += call.arguments
    return [(call.id, call.name, call.arguments) for call in calls]


@given(CALLS, st.booleans(), st.booleans(), st.data())
def test_any_split_gives_what_the_whole_gives(calls, tagged, compact, data):
    style: dict[str, Any] = {"separators": (",", ":")} if compact else {"ensure_ascii": False}
    if tagged:
        text = "\n".join(f"\n{json.dumps(c, **style)}\n</tool_call>" for c in calls)
        text = text.replace("</tool_call>\n", "</tool_call>\n<tool_call>")
    else:
        text = json.dumps(calls, **style)
    whole = read([text])
    assert whole == read(list(text))  # every split point at once
    at = data.draw(st.integers(0, len(text)))
    assert whole == read([text[:at], text[at:]])
    assert [(name, json.loads(arguments)) for _, name, arguments in whole] == [
        (call["name"], call.get("arguments", {})) for call in calls
    ]
    assert len({id for id, _, _ in whole}) == len(calls)
    if not tagged:
        ids = [BYTES.control["[TOOL_CALLS]"], *BYTES.encode(text)]
        reference = parse_reply(BYTES, ids)["tool_calls"]
        assert [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in reference]
        for (_, name, arguments), other in zip(whole, reference, strict=True):
            assert name == other["function"]["name"]
            assert json.loads(arguments) == json.loads(other["function"]["arguments"])


@given(st.text('[]{}":,\\ namergut1x\n', max_size=60), st.integers(0, 60))
def test_nonsense_never_fails_and_splits_alike(text, at):
    assert read([text]) == read([text[:at], text[at:]])


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ('[{"name": "a", "arguments": {"x": "1', [("a", '{"x": "1')]),  # cut off
        ('[{"arguments": {"x": 1}, "name": "a"}]', [("a", '{"x": 1}')]),
        ('[{"name": "a", "arguments": {"}": "]{\\""}, "id": "123"}]', [("a", '{"}": "]{\\""}')]),
        ('[{"name": "a"}, {"name": "b", "arguments": {}}]', [("a", "{}"), ("b", "{}")]),
        ('[{"nom": "a", "arguments": {}}]', []),
    ],
)
def test_what_is_odd(text, want):
    assert [(name, arguments) for _, name, arguments in read([text])] == want
