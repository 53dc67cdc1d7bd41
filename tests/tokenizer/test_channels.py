"""Words, thinking and calls of an answer: streams and whole answers are split alike."""

import json
from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opennemo.tokenizer import Tokenizer, load_tokenizer
from opennemo.tokenizer.calls import NAMED_WITH_IDS, Call, CallParser
from opennemo.tokenizer.channels import Channels
from opennemo.tokenizer.chat import (
    call_syntax,
    encode_chat,
    encode_for_training,
    is_thinking,
    parse_reply,
    thinking_marks,
)
from opennemo.tokenizer.tekken import SINGLE_BYTES, Tekken
from tests.tokenizer.layout_files import LATER, tokenizer_file

BYTES = Tekken(r"(?s:.)", SINGLE_BYTES, n_special=64)  # one token a byte, none for thinking
TAGS = ("<think>", "</think>")
ASK = [{"role": "user", "content": "A"}]
WORDS = st.text("aé🦙 \n[]{}<>/THINKARGS", max_size=12)
ARGUMENTS = st.dictionaries(WORDS, st.none() | WORDS | st.lists(st.integers(), max_size=3))


@lru_cache
def load(version: str) -> Tokenizer:
    return load_tokenizer(tokenizer_file(version))


def stream(tokenizer: Tokenizer, ids: list[int], begun: bool = False) -> tuple[str, str, list]:
    """Thinking, words, and calls (name, arguments) of an answer, id by id."""
    syntax = call_syntax(tokenizer)
    channels = Channels(tokenizer, syntax, thinking_marks(tokenizer), begun=begun)
    parser = CallParser(syntax, "any")
    texts = {"thinking": "", "text": ""}
    calls: list[Call] = []
    for channel, text in [p for id in ids for p in channels.push(id)] + channels.flush():
        if channel in texts:
            texts[channel] += text
            continue
        for call in parser.feed(text) if channel == "calls" else parser.mark(text):
            if call.name:
                calls.append(call)
            else:
                calls[call.index].arguments += call.arguments
    return texts["thinking"], texts["text"], [(call.name, call.arguments) for call in calls]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_streams_and_whole_answers_are_what_a_layout_writes(data: st.DataObject):
    tokenizer = load(data.draw(st.sampled_from(LATER)))
    thinks = thinking_marks(tokenizer) is not None
    thinking = data.draw(WORDS) if thinks else ""
    functions = [
        {"name": data.draw(st.sampled_from(["f", "get_weather"])), "arguments": json.dumps(value)}
        for value in data.draw(st.lists(ARGUMENTS, max_size=3))
    ]
    words = data.draw(WORDS.map(str.strip))
    answer: dict = {"role": "assistant", "content": words, "reasoning_content": thinking}
    if functions:
        answer["tool_calls"] = [{"type": "function", "function": f} for f in functions]
    ids, mask = encode_for_training(tokenizer, [*ASK, answer])
    ids = [id for id, learn in zip(ids, mask, strict=True) if learn]
    whole = parse_reply(tokenizer, ids)
    assert whole.get("reasoning_content", "") == thinking
    assert (whole["content"] or "") == words
    calls = [c["function"] for c in whole.get("tool_calls", [])]
    assert [(c["name"], json.loads(c["arguments"])) for c in calls] == [
        (f["name"], json.loads(f["arguments"])) for f in functions
    ]
    told, said, called = stream(tokenizer, ids)
    assert (told, said) == (thinking, words)
    assert [(n, json.loads(a)) for n, a in called] == [
        (f["name"], json.loads(f["arguments"])) for f in functions
    ]


def test_a_call_with_an_id_is_read_at_every_split_point():
    tokenizer = load("v11-tekken")
    text = '{"a": "[ARGS]", "é🦙": [1, {"b": null}]}'
    for at in range(len(text) + 1):
        ids = []
        for name, piece in (("[TOOL_CALLS]", "f"), ("[CALL_ID]", "abcdefghi"), ("[ARGS]", "")):
            ids += [tokenizer.control[name], *tokenizer.encode(piece)]
        ids += [*tokenizer.encode(text[:at]), *tokenizer.encode(text[at:]), tokenizer.eos_id]
        assert stream(tokenizer, ids) == ("", "", [("f", text)])
        (call,) = parse_reply(tokenizer, ids)["tool_calls"]
        assert call["id"] == "abcdefghi" and call["function"] == {"name": "f", "arguments": text}
        cut = parse_reply(tokenizer, ids[:-3])
        assert "tool_calls" not in cut and text[:8] in cut["content"]
    parser = CallParser(NAMED_WITH_IDS, "key")
    news = [*parser.mark("[TOOL_CALLS]"), *parser.feed("f"), *parser.mark("[ARGS]")]
    assert [call.name for call in news] == ["f"] and parser.feed("{")[0].arguments == "{"


@pytest.mark.parametrize(
    "pieces",
    [
        ("[TOOL_CALLS]", "f"),
        ("[TOOL_CALLS]", "f", "[ARGS]", "{"),
        ("[TOOL_CALLS]", "f", "[ARGS]", "[1]"),
        ("[TOOL_CALLS]", "f", "[ARGS]", "{}", "[ARGS]", "{}"),
        ("[TOOL_CALLS]", '[{"name": "f", "arguments": {}}]'),
    ],
)
def test_what_is_no_call_stays_text(pieces: tuple[str, ...]):
    tokenizer = load("v13-tekken")
    ids = tokenizer.encode("Well. ")
    for piece in pieces:
        control = tokenizer.control.get(piece)
        ids += tokenizer.encode(piece) if control is None else [control]
    text = "".join(piece for piece in pieces if piece not in tokenizer.control)
    assert parse_reply(tokenizer, ids) == {"role": "assistant", "content": "Well. " + text}


def test_words_behind_a_call_are_kept_and_empty_arguments_are_an_object():
    tokenizer = load("v13-tekken")
    call, args = tokenizer.control["[TOOL_CALLS]"], tokenizer.control["[ARGS]"]
    ids = [call, *tokenizer.encode("f"), args, *tokenizer.encode("{} Done.")]
    reply = parse_reply(tokenizer, [*ids, call, *tokenizer.encode("g"), args])
    assert reply["content"] == "Done."
    assert [c["function"] for c in reply["tool_calls"]] == [
        {"name": "f", "arguments": "{}"},
        {"name": "g", "arguments": "{}"},
    ]


def read(text: str, begun: bool = False) -> list[tuple[str, str]]:
    channels, joined = Channels(BYTES, thinking=TAGS, begun=begun), []
    for channel, piece in [p for id in BYTES.encode(text) for p in channels.push(id)] + [
        *channels.flush()
    ]:
        if joined and joined[-1][0] == channel:
            joined[-1] = (channel, joined[-1][1] + piece)
        else:
            joined.append((channel, piece))
    return joined


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("<think>\nHm.</think>\n\nYes.", [("thinking", "Hm."), ("text", "Yes.")]),
        ("<think></think>Yes.", [("text", "Yes.")]),
        ("<think>a</thin</think>b", [("thinking", "a</thin"), ("text", "b")]),
        ("<think>a</thin", [("thinking", "a</thin")]),
        ("<thin", [("text", "<thin")]),
        ("I <think> so</think>", [("text", "I <think> so</think>")]),
    ],
)
def test_tags_around_thinking(text: str, want: list[tuple[str, str]]):
    assert read(text) == want
    if text.startswith("<think>"):
        assert read(text.removeprefix("<think>"), begun=True) == want


@given(st.text("<think>/ab ", max_size=40), st.booleans(), st.integers(0, 40))
def test_any_split_of_tags_gives_what_the_whole_gives(text: str, begun: bool, at: int):
    """Tokens of two bytes and more hold the end of one channel and the beginning of another."""
    texts = sorted(
        {text[:at].encode(), text[at:].encode(), text.encode()} - {b""} - {*SINGLE_BYTES}
    )
    halves = Tekken(r"(?s:.)", [*SINGLE_BYTES, *texts], n_special=64)
    id_of = {halves.token_bytes(id): id for id in range(halves.vocab_size)}
    for pieces in ((text[:at], text[at:]), (text,)):
        channels = Channels(halves, thinking=TAGS, begun=begun)
        ids = [id_of[piece.encode()] for piece in pieces if piece]
        told = {"thinking": "", "text": ""}
        for channel, piece in [p for id in ids for p in channels.push(id)] + channels.flush():
            told[channel] += piece
        want = {"thinking": "", "text": ""} | {}
        for channel, piece in read(text, begun):
            want[channel] += piece
        assert told == want


def test_a_prompt_that_has_begun_to_think_is_known():
    tokenizer = load("v13-tekken")
    parts = [{"type": "thinking", "thinking": "Well,", "closed": False}]
    ids = encode_chat(tokenizer, [*ASK, {"role": "assistant", "content": parts, "prefix": True}])
    assert is_thinking(tokenizer, ids)
    assert not is_thinking(tokenizer, encode_chat(tokenizer, ASK))
    closed = [*ASK, {"role": "assistant", "content": "B", "reasoning": "Hm."}, *ASK]
    assert not is_thinking(tokenizer, encode_chat(tokenizer, closed))
    goes_on = [*tokenizer.encode(" yes."), tokenizer.control["[/THINK]"], *tokenizer.encode("B")]
    assert stream(tokenizer, goes_on, begun=True) == (" yes.", "B", [])
    reply = parse_reply(tokenizer, goes_on, begun=True)
    assert (reply["reasoning_content"], reply["content"]) == (" yes.", "B")
    by_template = Tekken(r"(?s:.)", SINGLE_BYTES, n_special=64)
    by_template.instruct_version = None
    by_template.chat_template = "{{ messages[0].content }}{# <think> </think> #}<think>\n"
    assert is_thinking(by_template, encode_chat(by_template, ASK))
