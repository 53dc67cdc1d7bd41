"""What clients may send: one normal form, and errors that say what, where, and what is allowed."""

from typing import Any

import pytest

from opennemo.errors import InvalidRequest
from opennemo.tokenizer.messages import check_tools, hash_id, normalize

HI = {"role": "user", "content": "Hi"}
CALL = {"id": "a" * 9, "type": "function", "function": {"name": "f", "arguments": "{}"}}
ASK = {"role": "assistant", "tool_calls": [CALL]}


def part(text: str) -> dict:
    return {"type": "text", "text": text}


def test_normal_form():
    messages = [
        {"role": "user", "content": [part("A"), part(""), part("B")], "name": "ann"},
        {"role": "system", "content": "S1"},
        {"role": "assistant", "content": None, "refusal": None, "annotations": []},
        {"role": "assistant", "content": "C", "weight": 1},
        {"role": "developer", "content": [part("S2")]},
        {"role": "user", "content": "D"},
        {"role": "user", "content": "E"},
        {"role": "assistant", "content": "F", "weight": 0},
        {"role": "assistant", "content": "G", "prefix": True},
    ]
    assert normalize(messages) == [
        {"role": "system", "content": "S1\n\nS2"},
        {"role": "user", "content": "A\n\nB"},
        {"role": "assistant", "content": "C"},
        {"role": "user", "content": "D\n\nE"},
        {"role": "assistant", "content": "F", "weight": 0},
        {"role": "assistant", "content": "G", "prefix": True},
    ]
    assert normalize([{"role": "system", "content": ""}]) == [{"role": "system", "content": ""}]


def call(arguments: Any, id: Any = "a" * 9) -> dict:
    return {"id": id, "function": {"name": "f", "arguments": arguments}}


@pytest.mark.parametrize(
    ("sent", "parsed"),
    [
        ('{"a": [1, 2.0, "é"]}', {"a": [1, 2.0, "é"]}),
        ({"a": 1}, {"a": 1}),
        ("", {}),
        (None, {}),
        ("not JSON", "not JSON"),
        ("[1]", [1]),
        ("[" * 100_000, "[" * 100_000),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_arguments_are_json_or_text(sent: Any, parsed: Any):
    (turn,) = normalize([{"role": "assistant", "tool_calls": [call(sent)]}])
    assert turn["tool_calls"][0]["function"]["arguments"] == parsed
    assert turn["tool_calls"][0]["type"] == "function" and turn["content"] == ""


def test_tool_call_ids_are_nine_letters_or_digits_in_call_and_result_alike():
    ids = ["call_1", "f2a8…", "A1b2C3d4E", None, "null", ""]
    asks = {"role": "assistant", "tool_calls": [call("{}", id) for id in ids]}
    results = [{"role": "tool", "tool_call_id": id, "content": "x"} for id in ids[:3]]
    results += [{"role": "tool", "content": "x"}] * 3
    ask, *answers = normalize([HI, asks, *results])[1:]
    given = [c["id"] for c in ask["tool_calls"]]
    assert given == [answer["tool_call_id"] for answer in answers]
    assert given[:3] == [hash_id("call_1"), hash_id("f2a8…"), "A1b2C3d4E"]
    assert len(set(given)) == 6 and all(
        len(id) == 9 and id.isascii() and id.isalnum() for id in given
    )


def test_words_behind_a_call_stay_behind_it():
    said = {"role": "assistant", "content": "Let me see."}
    (turn,) = normalize([said, ASK])
    assert turn["content"] == "Let me see." and len(turn["tool_calls"]) == 1
    assert [("tool_calls" in t, t["content"]) for t in normalize([ASK, said])] == [
        (True, ""),
        (False, "Let me see."),
    ]
    (turn,) = normalize([ASK, ASK])
    assert len(turn["tool_calls"]) == 2


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "messages: must be a list"),
        ("Hi", "messages: must be a list"),
        ([HI, "Hi"], r"messages\[1\].role: None is not one of system, developer, user"),
        ([{"role": "bot", "content": "x"}], r"messages\[0\].role: 'bot' is not one of"),
        ([{"role": "user", "content": 3}], r"messages\[0\].content: must be a string, a list"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            r"messages\[0\].content\[0\]: 'image_url' is not supported, only .*text",
        ),
        ([{"role": "user", "content": ["x"]}], r"messages\[0\].content\[0\]: 'x' is not"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\].content\[0\]"),
        ([HI | {"prefix": True}], r"messages\[0\].prefix: only for text of the assistant's"),
        ([{"role": "assistant", "content": "x", "prefix": True}, HI], r"messages\[0\].prefix"),
        ([HI, ASK | {"prefix": True}], r"messages\[1\].prefix"),
        ([{"role": "assistant", "content": "x", "weight": 0.5}], r"weight: 0.5 is neither 0 nor 1"),
        ([ASK | {"tool_calls": {"id": "x"}}], r"messages\[0\].tool_calls: must be a list"),
        ([ASK | {"tool_calls": ["f"]}], r"messages\[0\].tool_calls\[0\].type: 'f' is not"),
        ([ASK | {"tool_calls": [{}]}], r"messages\[0\].tool_calls\[0\].function.name: must be"),
        (
            [ASK | {"tool_calls": [call([1])]}],
            r"tool_calls\[0\].function.arguments: must be a JSON",
        ),
        (
            [ASK | {"tool_calls": [call("", 7)]}],
            r"messages\[0\].tool_calls\[0\].id: must be a string",
        ),
        (
            [HI, {"role": "tool", "content": "x"}],
            r"messages\[1\]: a tool message must answer a call",
        ),
        ([ASK, {"role": "tool"}, {"role": "tool"}], r"messages\[2\]: a tool message must answer"),
        (
            [ASK, {"role": "tool", "tool_call_id": 5}],
            r"messages\[1\].tool_call_id: must be a string",
        ),
    ],
)
def test_bad_messages(messages: Any, complaint: str):
    with pytest.raises(InvalidRequest, match=f"^.*{complaint}"):
        normalize(messages)


@pytest.mark.parametrize(
    ("tools", "complaint"),
    [
        ({"type": "function"}, "tools: must be a list"),
        ([{"type": "web_search"}], r"tools\[0\].type: 'web_search' is not supported"),
        ([3], r"tools\[0\].type: 3 is not supported"),
        ([{"type": "function", "function": {}}], r"tools\[0\].function.name: must be a string"),
        (
            [{"function": {"name": "f", "parameters": []}}],
            r"tools\[0\].function.parameters: must be",
        ),
        ([{"function": {"name": "f", "description": 1}}], r"tools\[0\].function.description: must"),
    ],
)
def test_bad_tools(tools: Any, complaint: str):
    with pytest.raises(InvalidRequest, match=f"^{complaint}"):
        check_tools(tools)


def test_no_tools():
    assert check_tools(None) == check_tools([]) == []
