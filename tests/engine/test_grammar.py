"""Answers of a random model at high temperature: nonsense, but always in the grammar."""

import json
import re
from copy import deepcopy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opennemo.engine import LocalEngine, SamplingParams
from opennemo.engine.grammar import GrammarCompiler
from opennemo.engine.lark import Thinking, call_grammar
from opennemo.errors import InvalidRequest
from opennemo.tokenizer.calls import ARRAY

# A vocabulary of 320: 64 control tokens, then every single byte.
CONTROL = {"<unk>": 0, "<s>": 1, "</s>": 2, "[TOOL_CALLS]": 9}
CONTROL |= {f"<SPECIAL_{i}>": i for i in range(64) if i not in CONTROL.values()}
TOKENS = [b""] * 64 + [bytes([i]) for i in range(256)]
SCHEMA = {
    "type": "object",
    "properties": {
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["a", "bc"]},
        "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["n", "kind", "flags"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": {**SCHEMA}}},
    {"type": "function", "function": {"name": "now"}},
]


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(TOKENS, CONTROL, eos_id=2)


def ask(model, grammars: list, **params) -> list[list[int]]:
    engine = LocalEngine(deepcopy(model), [2])
    answers: dict[int, list[int]] = {}
    ends = {}

    def listen(event) -> None:
        answers.setdefault(event.request_id, [])
        if event.id is not None:
            answers[event.request_id].append(event.id)
        if event.finish_reason:
            ends[event.request_id] = (event.finish_reason, event.error)

    settings = {"temperature": 2.0, "max_tokens": 200, **params}
    ids = [
        engine.submit([5, i], SamplingParams(grammar=g, seed=i, **settings), listen)
        for i, g in enumerate(grammars)
    ]
    while engine.step():
        pass
    assert all(error is None for _, error in ends.values())
    whole = [answers[id] for id in ids if ends[id][0] == "stop"]
    assert len(whole) > len(ids) / 2  # the others met the length limit
    return whole


def text(ids: list[int]) -> str:
    return b"".join(TOKENS[id] for id in ids).decode()


def test_schemas_regexes_and_choices_hold_side_by_side(model, compiler):
    schema = compiler.compile("json_schema", json.dumps(SCHEMA))
    regex = compiler.compile("regex", "(north|south)-[0-9]{3}")
    choice = compiler.compile("choice", '["yes", "no", "n\\u00e9 \\"quoted\\""]')
    lark = compiler.compile("lark", 'start: "<" /[a-f]{2,5}/ ">"')
    answers = [text(ids) for ids in ask(model, [schema, regex, choice, lark] * 6)]
    assert len(answers) == 24
    for i in range(0, 24, 4):
        value = json.loads(answers[i])
        assert 0 <= value["n"] <= 99 and value["kind"] in ("a", "bc")
        assert set(value) == {"n", "kind", "flags"} and len(value["flags"]) <= 3
        assert answers[i] == json.dumps(value)
        assert re.fullmatch("(north|south)-[0-9]{3}", answers[i + 1])
        assert answers[i + 2] in ("yes", "no", 'né "quoted"')
        assert re.fullmatch("<[a-f]{2,5}>", answers[i + 3])


def test_greedy_and_min_tokens_give_way_to_the_grammar(model, compiler):
    choice = compiler.compile("choice", '["yes"]')
    assert [text(i) for i in ask(model, [choice], temperature=0, min_tokens=50)] == ["yes"]


@pytest.mark.parametrize("parallel", [True, False])
def test_a_required_tool_call_is_always_a_valid_call(model, compiler, parallel):
    source = call_grammar(ARRAY, TOOLS, CONTROL, parallel=parallel)
    numbers = set()
    for ids in ask(model, [compiler.compile("lark", source)] * 12, max_tokens=230):
        assert ids[0] == 9
        calls = json.loads(text(ids))
        numbers.add(len(calls))
        for call in calls:
            assert set(call) == {"name", "arguments"} and call["name"] in ("add", "now")
            if call["name"] == "add":
                assert call["arguments"]["kind"] in ("a", "bc")
    assert parallel or numbers == {1}


@given(st.permutations(["a", "b", "c", "d"]), st.integers(0, 5), st.booleans())
def test_arguments_come_in_any_order_each_once_and_none_is_missing(compiler, names, n, twice):
    values = {"a": 1, "b": "x", "c": [True, False], "d": {"e": None}}
    kinds = [{"type": t} for t in ("integer", "string", "array", "object")]
    schema = {
        "type": "object", "properties": dict(zip(values, kinds, strict=True)),
        "required": ["b", "d"], "additionalProperties": False,
    }  # fmt: skip
    tool = {"function": {"name": "f", "parameters": schema}}
    said = [*names[:n], *(names[:1] if twice else [])]
    pairs = ", ".join(f"{json.dumps(name)}: {json.dumps(values[name])}" for name in said)
    call = f'[{{"name": "f", "arguments": {{{pairs}}}}}]'
    matcher = compiler.compile("lark", call_grammar(ARRAY, [tool], CONTROL)).start()
    taken = [matcher.advance(id) is None for id in (9, *(64 + byte for byte in call.encode()))]
    right = len({*said}) == len(said) and {"b", "d"} <= {*said}
    assert (all(taken) and matcher.advance(2) is None) == right


def test_what_a_schema_says_beyond_its_properties_holds(compiler):
    """Then arguments come in the order of the schema, as its compiler has it."""
    tool = {
        "function": {
            "name": "f",
            "parameters": {
                "type": "object",
                "properties": {"a": {"$ref": "#/$defs/few"}, "b": {"type": "integer"}},
                "$defs": {"few": {"enum": ["x"]}},
                "additionalProperties": False,
            },
        }
    }
    for arguments, right in (('{"a": "x", "b": 1}', True), ('{"a": "y"}', False)):
        matcher = compiler.compile("lark", call_grammar(ARRAY, [tool], CONTROL)).start()
        call = f'[{{"name": "f", "arguments": {arguments}}}]'.encode()
        taken = [matcher.advance(id) is None for id in (9, *(64 + byte for byte in call))]
        assert all(taken) == right


@pytest.mark.parametrize(
    "strange",
    [{"required": value} for value in ([["a"]], [1], 3, True, "a", {"a": 1}, float("inf"))]
    + [{"type": value} for value in (["object", 1], 3, "objectx")],
)
def test_a_tool_whose_schema_is_none_is_refused(compiler, strange):
    schema = {"type": "object", "properties": {"a": {}}, "additionalProperties": False} | strange
    tool = {"function": {"name": "f", "parameters": schema}}
    with pytest.raises(InvalidRequest):
        compiler.compile("lark", call_grammar(ARRAY, [tool], CONTROL))


def test_any_json_object_and_text_or_calls_can_be_walked(compiler):
    free = compiler.compile("lark", call_grammar(ARRAY, TOOLS, CONTROL, required=False))
    for answer in ([*b"Hello"], [*b""]):
        matcher = free.start()
        assert all(matcher.advance(64 + b) is None for b in answer)
        assert matcher.advance(2) is None and matcher.complete
    matcher = compiler.compile("json_object").start()
    assert all(matcher.advance(64 + b) is None for b in b'{"a": [1, {"b": null}]}')
    assert matcher.complete
    assert compiler.compile("json_object").start().advance(64 + ord("[")) is not None


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("json_schema", '{"type": "objectx"}', "objectx"),
        ("json_schema", "{", "not valid"),
        ("json_schema", "[1]", "JSON object is expected"),
        ("json_schema", '{"anyOf":[' * 300 + "{}" + "]}" * 300, "nested"),
        ("json_schema", "[" * 30_000, "not valid"),
        ("json_schema", '{"$ref": "#/nowhere"}', "not valid"),
        ("json_schema", '{"type":"string","pattern":"' + "(" * 200 + '"}', "not valid"),
        ("regex", "(", "not valid"),
        ("lark", "start: nothing", "not valid"),
        ("choice", "[]", "one or more"),
        ("choice", '{"a": 1}', "list"),
        ("lark", "x" * 70_000, "70,000"),
    ],
)
def test_grammars_that_cannot_be_are_refused_in_one_line(compiler, kind, source, message):
    with pytest.raises(InvalidRequest, match=message) as caught:
        compiler.compile(kind, source)
    assert "\n" not in str(caught.value)


PROPERTY = {
    "uniqueItems": {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
    "not": {"not": {"pattern": "^a"}},
    "if": {"if": {"pattern": "^a"}, "then": {"maxLength": 3}},
    "contains": {"type": "array", "contains": {"pattern": "^a"}, "maxContains": 1},
    "pattern": {"type": "string", "pattern": "^(?!foo)[a-z]{3}$"},
    "enum": {"type": "string", "enum": [1, 2]},
    "oneOf": {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    "$ref": {"$ref": "https://example.com/schema.json"},
    "type": {"type": "strin"},
    "maximum": {"type": "integer", "minimum": 5, "maximum": 1},
}


def tool_of(parameters, **more) -> dict:
    return {"type": "function", "function": {"name": "odd", "parameters": parameters, **more}}


@pytest.mark.parametrize("keyword", PROPERTY)
def test_a_tool_that_no_grammar_can_hold_blocks_nothing_unless_it_must_be_held(compiler, keyword):
    """MCP servers send any schema: the request succeeds, and what is left out is named."""
    parameters = {"type": "object", "properties": {"v": PROPERTY[keyword]}, "required": ["v"]}
    tools = [*TOOLS, tool_of(parameters)]
    grammar, left_out = compiler.compile_calls(ARRAY, tools, required=False)
    assert left_out == (f"odd: parameters.properties.v.{keyword}",)
    assert grammar.start().advance(64 + ord("H")) is None
    strict = [*TOOLS, tool_of(parameters, strict=True)]
    for held, required in ((tools, True), (strict, False)):
        with pytest.raises(InvalidRequest) as caught:
            compiler.compile_calls(ARRAY, held, required=required)
        assert "'odd'" in str(caught.value)
        assert f"parameters.properties.v.{keyword}" in str(caught.value)
        assert "\n" not in str(caught.value)


INTEGER = {"type": "integer"}


def closed(properties: dict, **more) -> dict:
    kind = {"type": "object", "properties": properties}
    return {**kind, "additionalProperties": False, **more}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "string", "format": "password"}, ['"x"'], ["1"]),
        ({"type": "string", "nullable": True}, ['"x"', "null"], ["1"]),
        ({"enum": ["a"], "type": "string", "nullable": True}, ['"a"', "null"], ['"b"']),
        ({"minimum": 0, "exclusiveMinimum": True, "type": "integer"}, ["1"], ["0"]),
        ({"type": "array", "items": [INTEGER], "additionalItems": False}, ["[1]"], ["[1, 2]"]),
        ({"type": "array", "items": INTEGER, "maxItems": 2.0}, ["[1, 2]"], ["[1, 2, 3]"]),
        ({"type": "STRING"}, ['"x"'], ["1"]),
        ({"not": {"type": "null"}}, ["1", "[]"], ["null"]),
        ({"not": {"const": ""}, "type": "string"}, ['"x"'], ['""']),
        ({"enum": ["a", "b"], "not": {"enum": ["b"]}}, ['"a"'], ['"b"']),
        ({"type": "array", "uniqueItems": True, "maxItems": 1}, ["[1]"], ["[1, 1]"]),
        (
            {"propertyNames": {"type": "string"}, "additionalProperties": INTEGER},
            ['{"a": 1}'],
            ['{"a": "x"}'],
        ),
        (
            {"type": "object", "propertyNames": {"pattern": "^[a-z]+$"}},
            ['{"ab": 1}'],
            ['{"A": 1}'],
        ),
        (
            {"type": "object", "propertyNames": {"enum": ["a"]}, "additionalProperties": INTEGER},
            ['{"a": 1}', "{}"],
            ['{"b": 1}'],
        ),
        (
            closed({"a": INTEGER, "b": INTEGER}, dependentRequired={"a": ["b"]}),
            ['{"a": 1, "b": 2}', '{"b": 2}'],
            ['{"a": 1}'],
        ),
        (closed({"a": INTEGER, "b": {"not": {}}}), ['{"a": 1}'], ['{"a": 1, "b": 2}']),
        (
            {"properties": {"a": INTEGER}, "type": "object", "unevaluatedProperties": False},
            ["{}"],
            ['{"b": 1}'],
        ),
    ],
)
def test_every_dialect_of_json_schema_is_held(compiler, schema, good, bad):
    grammar = compiler.compile("json_schema", json.dumps(schema))
    for texts, right in ((good, True), (bad, False)):
        for value in texts:
            matcher = grammar.start()
            taken = all(matcher.advance(64 + byte) is None for byte in value.encode())
            assert (taken and matcher.advance(2) is None) == right, value


KEYWORDS = [
    *PROPERTY, "enum", "const", "properties", "required", "additionalProperties", "items",
    "patternProperties", "propertyNames", "dependentRequired", "dependencies", "prefixItems",
    "additionalItems", "minItems", "maxLength", "format", "exclusiveMinimum", "multipleOf", "then",
    "allOf", "anyOf", "$defs", "$id", "nullable", "unevaluatedProperties", "x-guidance",
]  # fmt: skip
LEAVES = st.sampled_from(
    [None, True, False, 0, -1, 2.5, 10**30, float("inf"), "string", "object", "x", "^a", "(",
     "#/$defs/a", "#", "uuid", "\ud800"]
)  # fmt: skip
STRANGE = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from([*KEYWORDS, "a", "("]), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(KEYWORDS), STRANGE, max_size=4))
def test_whatever_a_schema_says_a_tool_with_it_may_be_declared(compiler, schema):
    compiler.compile_calls(ARRAY, [tool_of(schema)], required=False)
    try:
        compiler.compile_calls(ARRAY, [tool_of(schema)], required=True)
    except InvalidRequest as error:
        assert "'odd'" in str(error)


@pytest.mark.parametrize("n", [60, 1000])
def test_any_number_of_tools_and_of_properties(compiler, n):
    parameters = closed({f"p{i}": INTEGER for i in range(8)}, required=["p0"])
    tools = [
        {"type": "function", "function": {"name": f"tool_{i}", "parameters": parameters}}
        for i in range(n)
    ]
    grammar, left_out = compiler.compile_calls(ARRAY, tools, required=True)
    call = f'[{{"name": "tool_{n - 1}", "arguments": {{"p7": 1, "p0": 2}}}}]'.encode()
    matcher = grammar.start()
    assert all(matcher.advance(id) is None for id in (9, *(64 + byte for byte in call)))
    assert left_out == () and matcher.accepts
    wide = compiler.compile("json_schema", json.dumps(closed({f"p{i}": INTEGER for i in range(n)})))
    matcher = wide.start()
    taken = [matcher.advance(64 + byte) is None for byte in f'{{"p3": 1, "p{n - 1}": 2}}'.encode()]
    assert all(taken) and matcher.accepts


def test_white_space_is_the_style_of_models_wherever_a_schema_stands(compiler):
    """Random models wrote blanks without end where it was not bounded."""
    schema = {**closed({"a": INTEGER}), "x-guidance": {"whitespace_flexible": True}}
    format, tools = ("json_schema", json.dumps(schema)), [tool_of({"type": "object"})]
    mixed, _ = compiler.compile_calls(ARRAY, tools, required=False, format=format)
    for grammar in (mixed, compiler.compile(*format)):
        for text in ('{"a":  1}', '{ "a": 1}', '{"a": 1 }'):
            matcher = grammar.start()
            assert not all(matcher.advance(64 + byte) is None for byte in text.encode())


def test_stop_ids_end_no_answer_in_the_middle_of_its_grammar(model, compiler):
    call, _ = compiler.compile_calls(ARRAY, TOOLS[1:], required=True, parallel=False)
    (ids,) = ask(model, [call], stop_ids=frozenset(range(320)))
    assert [c["name"] for c in json.loads(text(ids))] == ["now"]


def test_no_tools_to_call_is_said(compiler):
    with pytest.raises(InvalidRequest, match="no tools"):
        call_grammar(ARRAY, [], CONTROL)


@pytest.mark.parametrize("regex", ["a+", "(a|b)+c{100000}"])
def test_a_grammar_that_never_ends_stops_its_own_request_only(model, compiler, regex):
    engine, ends = LocalEngine(deepcopy(model), [2]), {}

    def listen(event) -> None:
        if event.finish_reason:
            ends[event.request_id] = event

    no_end = {2: -100.0}
    endless = SamplingParams(
        grammar=compiler.compile("regex", regex), max_tokens=30, logit_bias=no_end
    )
    first = engine.submit([1], endless, listen)
    other = engine.submit([1], SamplingParams(max_tokens=40, ignore_eos=True), listen)
    while engine.step():
        pass
    assert ends[other].finish_reason == "length"
    if ends[first].error:  # llguidance gives up on what takes too much work
        assert isinstance(ends[first].error, InvalidRequest)
        assert "grammar" in str(ends[first].error) and "\n" not in str(ends[first].error)
    else:
        assert ends[first].finish_reason == "length"


@pytest.mark.parametrize("marks", [("<SPECIAL_20>", "<SPECIAL_21>"), ("<think>", "</think>")])
@pytest.mark.parametrize(
    ("kind", "source", "words"),
    [
        ("json_object", "", '{"a": 1}'),
        ("json_schema", json.dumps(SCHEMA), '{"n": 7, "kind": "bc", "flags": []}'),
        ("regex", r"a/b\/c", "a/b/c"),
        ("choice", '["yes", "no"]', "no"),
    ],
)
def test_words_follow_their_grammar_after_thinking(compiler, marks, kind, source, words):
    def ids_of(*texts: str) -> list[int]:
        return [
            id
            for t in texts
            for id in ([CONTROL[t]] if t in CONTROL else [64 + b for b in t.encode()])
        ]

    opening, closing = marks
    for begun in (False, True):
        grammar = compiler.compile_after_thinking(kind, source, Thinking(marks[0], marks[1], begun))

        def is_allowed(*texts: str, grammar=grammar) -> bool:
            matcher = grammar.start()
            return all(matcher.advance(id) is None for id in [*ids_of(*texts), 2])

        assert is_allowed(words) != begun and is_allowed("Hm.", closing, words) == begun
        assert begun or is_allowed(opening, "Hm.", closing, words)
        assert not is_allowed(opening, "Hm.", closing, "Hm.")
        assert not is_allowed("Hm.", closing, "Hm.")


def test_a_grammar_in_lark_does_not_begin_within_thinking(compiler):
    marks = ("<think>", "</think>")
    compiler.compile_after_thinking("lark", 'start: "a"', Thinking(*marks))
    with pytest.raises(InvalidRequest, match="the lark would begin within thinking"):
        compiler.compile_after_thinking("lark", 'start: "a"', Thinking(*marks, begun=True))


def test_schemas_that_take_long_are_refused_by_name(monkeypatch):
    compiler = GrammarCompiler(TOKENS, CONTROL, eos_id=2)
    pairs = [{"required": [f"p{i}", f"q{i}"]} for i in range(4)]
    names = {name: {"type": "string"} for pair in pairs for name in pair["required"]}
    schema = {"type": "object", "properties": names, "not": {"anyOf": pairs}}
    monkeypatch.setattr("opennemo.engine.grammar.MAX_SECONDS", 0.0)
    with pytest.raises(InvalidRequest, match=r"schema cannot be enforced .*: it takes too long"):
        compiler.compile("json_schema", json.dumps(schema))
    monkeypatch.setattr("opennemo.engine.grammar.MAX_TOOLS_SECONDS", 0.0)
    tools = [tool_of(schema), tool_of({"type": "object", "properties": {}})]
    _, left_out = compiler.compile_calls(ARRAY, tools, required=False)
    assert len(left_out) == 2 and all(place.endswith(": parameters") for place in left_out), (
        left_out
    )
    with pytest.raises(InvalidRequest, match="takes too long to compile; tool_choice asks for it"):
        compiler.compile_calls(ARRAY, tools, required=True)
    monkeypatch.undo()
    compiler.compile("json_schema", json.dumps(schema | {"minProperties": 0}))
