"""Tool calls as layouts write them, streams and whole answers are read, and grammars allow them."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opennemo.engine.grammar import GrammarCompiler
from opennemo.engine.lark import Thinking, call_grammar
from opennemo.tokenizer.calls import (
    ARRAY,
    ARRAY_WITHOUT_IDS,
    NAMED,
    NAMED_WITH_IDS,
    TAGS,
    Call,
    CallParser,
    CallSyntax,
    read_calls,
)
from opennemo.tokenizer.chat import (
    call_syntax,
    encode_chat,
    encode_for_training,
    parse_reply,
)
from opennemo.tokenizer.chat_layouts import LAYOUTS, ChatLayout
from opennemo.tokenizer.tekken import SINGLE_BYTES, V3_SPECIAL_TOKENS, Tekken

BYTES = Tekken(
    r"(?s:.)",
    SINGLE_BYTES,
    n_special=64,
    special_tokens=(*V3_SPECIAL_TOKENS, "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]"),
)
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


def read(pieces: list[str], syntax: CallSyntax = ARRAY) -> list[tuple[str, str, str]]:
    parser, calls = CallParser(syntax, "request"), []
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
        ('[{"name": "a", "arguments": "{\\"x\\": 1}"}]', [("a", '{"x": 1}')]),
        ('[{"name": "a", "parameters": {"x": 1}}]', [("a", '{"x": 1}')]),
    ],
)
def test_what_is_odd(text, want):
    assert [(name, arguments) for _, name, arguments in read([text])] == want


# What no model has: a control token and a text as marks, other keys, another list.
TOY = CallSyntax(
    marks=("[TOOL_CALLS]", "<<end>>"),
    before="[TOOL_CALLS]do ",
    call='{"tool": $name, "with": $arguments$id}',
    id=', "number": $id',
    separator="; ",
    after=" done<<end>>",
)
TOOL = {"type": "function", "function": {"name": "é[TOOL_CALLS]", "parameters": {"type": "object"}}}


def call(name: str, arguments: dict, id: str | None = None) -> dict:
    ids = {} if id is None else {"id": id}
    return {**ids, "type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Tekken:
    """A model with a layout of its own; this row is all that it takes."""
    monkeypatch.setitem(LAYOUTS, "toy-tekken", ChatLayout(source="v1.jinja", calls=TOY))
    return Tekken(r"(?s:.)", SINGLE_BYTES, n_special=64, version="toy")


def test_a_toy_syntax_is_written_and_read(toy: Tekken):
    assert call_syntax(toy) == TOY
    question = {"role": "user", "content": "Go."}
    calls = [call("f", {"a": [1, "}"]}, "abcdefghi"), call("g", {"b": "<<end>>"}, "123456789")]
    results = [{"role": "tool", "tool_call_id": c["id"], "content": "1"} for c in calls]
    answer = {"role": "assistant", "content": "Well.", "tool_calls": calls}
    prompt = encode_chat(toy, [question])
    later = encode_chat(toy, [question, answer, *results])
    written = later[len(prompt) : later.index(toy.eos_id)]
    assert toy.decode(written, show_control=True) == (
        'Well.[TOOL_CALLS]do {"tool": "f", "with": {"a": [1, "}"]}, "number": "abcdefghi"}; '
        '{"tool": "g", "with": {"b": "<<end>>"}, "number": "123456789"} done<<end>>'
    )
    texts = [
        {**c, "function": {**c["function"], "arguments": json.dumps(c["function"]["arguments"])}}
        for c in calls
    ]
    assert parse_reply(toy, written) == {**answer, "tool_calls": texts}
    learned, mask = encode_for_training(toy, [question, answer])
    lesson = [id for id, learn in zip(learned, mask, strict=True) if learn]
    assert "number" not in toy.decode(lesson)
    reply = parse_reply(toy, lesson)
    assert [c["function"] for c in reply["tool_calls"]] == [c["function"] for c in texts]
    assert reply["content"] == "Well."


def test_a_toy_syntax_is_read_alike_at_every_split_point():
    text = 'do {"tool": "f", "with": {"a": "}"}}; {"tool": "g", "number": "123456789"} done<<end>>'
    whole = read([text], TOY)
    assert [(name, arguments) for _, name, arguments in whole] == [("f", '{"a": "}"}'), ("g", "{}")]
    assert all(read([text[:at], text[at:]], TOY) == whole for at in range(len(text)))
    calls, rest = read_calls(TOY, text)
    assert [tuple(c["function"].values()) for c in calls] == [
        (name, arguments) for _, name, arguments in whole
    ]
    assert rest == "" and calls[1]["id"] == "123456789"
    for broken in (text.replace("; ", ", "), text.replace(" done", ""), "it " + text):
        with pytest.raises(ValueError, match=r"array|begin"):
            read_calls(TOY, broken)


@pytest.mark.parametrize("syntax", [ARRAY, ARRAY_WITHOUT_IDS, NAMED, NAMED_WITH_IDS, TAGS, TOY])
@pytest.mark.parametrize("n", [1, 3])
def test_a_grammar_allows_what_a_layout_writes_and_nothing_else(syntax: CallSyntax, n: int):
    compiler = GrammarCompiler(
        [BYTES.token_bytes(id) for id in range(BYTES.vocab_size)], BYTES.control, BYTES.eos_id
    )
    name = TOOL["function"]["name"]
    ids: list[int] = []
    for i, piece in enumerate(syntax.write([call(name, {"a": 1})] * n, BYTES.control)):
        ids += [BYTES.control[piece]] if i % 2 else BYTES.encode(piece)
    for parallel in (True, False):
        source = call_grammar(syntax, [TOOL], BYTES.control, parallel=parallel)
        matcher = compiler.compile("lark", source).start()
        taken = [matcher.advance(id) is None for id in [*ids, BYTES.eos_id]]
        assert all(taken) == (parallel or n == 1)
    if_any = call_grammar(syntax, [TOOL], BYTES.control, required=False)
    matcher = compiler.compile("lark", if_any).start()
    assert all(matcher.advance(id) is None for id in [*BYTES.encode("No."), BYTES.eos_id])
    matcher = compiler.compile("lark", if_any).start()
    broken = BYTES.encode("a") + ids
    speaks_first = not syntax.is_object
    assert speaks_first == all(matcher.advance(id) is None for id in [*broken, BYTES.eos_id])


def test_a_template_says_which_syntax_a_fine_tune_has():
    """Its vocabulary may still have the tokens of another."""
    tokenizer = Tekken(r"(?s:.)", SINGLE_BYTES, n_special=64)
    tokenizer.instruct_version = None
    asked = [{"role": "user", "content": "Go."}]
    for template, syntax in (
        ("{{ messages[0].content }}", TAGS),
        ("{% for tool in tools %}{% endfor %}<tool_call>", TAGS),
        ("{% for tool in tools %}{% endfor %}[TOOL_CALLS][", ARRAY),
    ):
        tokenizer.chat_template = template
        assert call_syntax(tokenizer) == syntax
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert TAGS.marks[0] in tokenizer.decode(encode_chat(tokenizer, asked, [TOOL]))
    ids = tokenizer.encode('<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>')
    assert parse_reply(tokenizer, ids)["tool_calls"][0]["function"]["name"] == "f"


@pytest.mark.parametrize("thinking", [("[THINK]", "[/THINK]"), ("<think>", "</think>")])
def test_a_grammar_lets_a_model_think_before_it_calls(thinking: tuple[str, str]):
    compiler = GrammarCompiler(
        [BYTES.token_bytes(id) for id in range(BYTES.vocab_size)], BYTES.control, BYTES.eos_id
    )

    def ids_of(*texts: str) -> list[int]:
        ids = []
        for text in texts:
            ids += [BYTES.control[text]] if text in BYTES.control else BYTES.encode(text)
        return ids

    called = []
    for i, piece in enumerate(NAMED.write([call(TOOL["function"]["name"], {})], BYTES.control)):
        called += [BYTES.control[piece]] if i % 2 else BYTES.encode(piece)
    opening, closing = thinking
    thought = ids_of("Hm. <b>", closing)
    for begun in (False, True):
        source = call_grammar(NAMED, [TOOL], BYTES.control, thinking=Thinking(*thinking, begun))

        def is_allowed(ids: list[int], source: str = source) -> bool:
            matcher = compiler.compile("lark", source).start()
            return all(matcher.advance(id) is None for id in [*ids, BYTES.eos_id])

        assert is_allowed([*thought, *called]) == begun
        assert is_allowed([*ids_of(opening), *thought, *called]) != begun or opening[0] == "<"
        assert is_allowed(called) != begun
        assert not is_allowed([*ids_of(opening), *thought, *ids_of("a"), *called])
