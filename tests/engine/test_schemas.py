"""What a schema asks for in keywords that the compiler lacks holds, or is named as a gap.

The examples follow JSON-Schema-Test-Suite; `jsonschema` is the oracle.
"""

import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from opennemo.engine.grammar import GrammarCompiler, Matcher
from opennemo.errors import InvalidRequest

FIRST = 64  # id of byte 0; ids below are control tokens
STRING, INTEGER, FIVE = {"type": "string"}, {"type": "integer"}, {"const": 5}
KIND = {"properties": {"kind": {"enum": ["a", "b"]}, "n": INTEGER}, "required": ["kind"]}
IF_A = {"properties": {"kind": {"const": "a"}}}
NEEDS_N = {"required": ["n"]}
UNHELD = {"pattern": "^x"}  # no complement of it is known


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    control = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<SPECIAL_{i}>": i for i in range(3, FIRST)}
    return GrammarCompiler([b""] * FIRST + [bytes([i]) for i in range(256)], control, eos_id=2)


def accepts(matcher: Matcher, value) -> bool:
    ids = [FIRST + byte for byte in json.dumps(value).encode()]
    return all(matcher.advance(id) is None for id in ids) and matcher.advance(2) is None


def only(*names: str) -> dict:
    properties = dict.fromkeys(names, INTEGER)
    return {"type": "object", "properties": properties, "additionalProperties": False}


SAID = [
    (True, [1, "x"], []),
    ({"not": INTEGER}, ["x", [1]], [1]),
    ({"not": {"not": {"required": ["a"]}}}, [{"a": 1}], [{}]),
    ({"not": {"properties": {"a": STRING}}}, [{"a": 1}], [{"a": "x"}, {}]),
    ({"not": {"enum": ["ab", "", 2, None, True]}}, ["a", "abc", 3, False], ["ab", "", 2, None]),
    ({"not": {"minimum": 3}}, [2], [3, "x"]),
    ({"not": {"maxItems": 1, "type": "array"}, "items": INTEGER}, [[1, 2]], [[1]]),
    ({"not": {"items": {"const": 1}}}, [[1, 2]], [[1], []]),
    ({**KIND, "if": IF_A, "then": NEEDS_N}, [{"kind": "b"}, {"kind": "a", "n": 1}],
     [{"kind": "a"}]),
    ({"if": {"maxLength": 1}, "then": {"const": "a"}, "else": STRING}, ["a", "bb"], ["b", 1]),
    ({"if": {"$ref": "#/$defs/one"}, "then": False, "$defs": {"one": {"const": 1}}}, [2], [1]),
    ({"$id": "http://x/y", "$ref": "http://x/y#/$defs/one", "$defs": {"one": FIVE}}, [5], [1]),
    ({"$id": "http://x/y#", "not": {"$ref": "http://x/y#/$defs/one"}, "$defs": {"one": FIVE}},
     [1], [5]),
    ({"oneOf": [INTEGER, {"minimum": 2}]}, [1, "x"], [3]),
    ({"oneOf": [NEEDS_N, {"required": ["m"]}]}, [{"n": 1}], [{"n": 1, "m": 1}, {}]),
    # Branches that overlap, of which none has a complement: what one has alone is allowed.
    ({"oneOf": [only("a"), only("b"), only("c")]}, [{"a": 1}, {"c": 2}], [{}, {"a": 1, "b": 1}]),
    ({"oneOf": [{"type": "string", "pattern": "^[0-9 x]+$"}, {"enum": ["any", "x"]}]}, ["any"],
     ["x"]),
    ({"oneOf": [{**only("a"), "required": ["a"]}, {"oneOf": [only("b"), only("c")]}]},
     [{"a": 1}, {"c": 1}], [{"b": 1, "c": 1}, {}, {"a": 1, "b": 2}]),
    ({"type": "object", "additionalProperties": {"oneOf": [{"oneOf": [only("a"), only("b")]},
     STRING]}}, [{"x": "y", "z": {"a": 1}}], [{"x": {}}]),
    # A definition that refers to itself where branches overlap.
    ({"$ref": "#/$defs/tree", "$defs": {"tree": {"properties": {"more": {"$ref": "#/$defs/tree"}},
     "oneOf": [NEEDS_N, {"required": ["m"]}]}}}, [{"more": {"more": {"m": 1}, "n": 1}, "n": 1}],
     [{"more": {}, "n": 1}, {"n": 1, "m": 1}]),
    # A value that is not of its branch's type: the branch holds nothing.
    ({"anyOf": [{"type": "boolean", "const": "auto"}, INTEGER]}, [1], ["auto", True]),
    ({"contains": FIVE}, [[5], [1, 5], "x"], [[], [1, 2]]),
    ({"contains": FIVE, "maxContains": 1}, [[5], [1, 5, 2]], [[5, 5], []]),
    ({"contains": FIVE, "minContains": 2}, [[5, 1, 5]], [[5]]),
    ({"contains": FIVE, "minContains": 0, "maxContains": 0}, [[], [1]], [[5]]),
    ({"propertyNames": {"maxLength": 2}}, [{"ab": 1}], [{"abc": 1}]),
    ({"propertyNames": False}, [{}], [{"a": 1}]),
    ({"properties": {"a": INTEGER, "bc": INTEGER}, "propertyNames": {"maxLength": 1}}, [{"a": 1}],
     [{"bc": 1}]),
    ({"type": "array", "items": {"enum": ["a", "b"]}, "uniqueItems": True}, [["b", "a"], []],
     [["a", "a"]]),
    ({"allOf": [{"properties": {"a": {}}}], "unevaluatedProperties": False}, [{"a": 1}],
     [{"b": 1}]),
    ({"anyOf": [NEEDS_N | {"properties": {"n": {}}}, {}], "unevaluatedProperties": False},
     [{"n": 1}, {}], [{"m": 1}]),
    ({"if": IF_A | {"required": ["kind"]}, "then": {"properties": {"n": {}}},
      "unevaluatedProperties": False}, [{"kind": "a", "n": 1}], [{"kind": "b", "n": 1}]),
    ({"allOf": [{"prefixItems": [{}, INTEGER]}], "unevaluatedItems": False}, [["x", 1]],
     [["x", 1, 2]]),
    ({"type": "array", "items": {"$dynamicRef": "#n"}, "$defs": {"a": INTEGER | {"$dynamicAnchor":
      "n"}}}, [[1]], [["x"]]),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "good", "bad"), SAID)
def test_what_other_keywords_can_say_holds(compiler, schema, good, bad):
    grammar = compiler.compile("json_schema", json.dumps(schema))
    for values, right in ((good, True), (bad, False)):
        for value in values:
            assert accepts(grammar.start(), value) == right, value
            assert Draft202012Validator(schema).is_valid(value) == right, value


@pytest.mark.parametrize(
    ("schema", "gap"),
    [
        ({"not": UNHELD}, "not"),
        ({"if": UNHELD, "then": {"maxLength": 3}}, "if"),
        ({"contains": UNHELD, "maxContains": 1}, "contains"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"propertyNames": {"format": "uuid"}}, "propertyNames"),
        ({"oneOf": [INTEGER, {"type": "number"}]}, "oneOf"),
        ({"allOf": [True, False]}, "allOf"),
    ],
)
def test_what_nothing_says_is_named(compiler, schema, gap):
    properties = {"type": "object", "properties": {"v": schema}, "required": ["v"]}
    with pytest.raises(InvalidRequest, match=f"properties.v.{gap}"):
        compiler.compile("json_schema", json.dumps(properties))


def test_definitions_are_mended_before_what_refers_to_them(compiler):
    """One keyword that cannot be held takes nothing else with it."""
    odd = {"type": "object", "properties": {"s": {**STRING, "not": UNHELD}, "n": INTEGER}}
    schema = {"properties": {"a": {"$ref": "#/$defs/odd"}}, "$defs": {"odd": odd}}
    fitted = compiler.fit(json.dumps({**schema, "type": "object"}))
    assert fitted.gaps == ("$defs.odd.properties.s.not",)


def test_conditions_within_conditions_end(compiler):
    schema: dict = {"const": 1}
    for _ in range(5):
        schema = {"if": {"not": schema}, "then": schema, "else": {"oneOf": [schema, STRING]}}
    compiler.fit(json.dumps(schema))


LEAVES = st.sampled_from(
    [{}, True, {"type": "integer"}, {"type": ["string", "null"]}, {"const": 1}, {"const": "a"},
     {"enum": ["a", "b", True]}, {"minimum": 2}, {"exclusiveMaximum": 3}, {"minLength": 1},
     {"maxLength": 2}, {"minItems": 1}, {"required": ["a"]}, {"maxProperties": 1}, UNHELD]
)  # fmt: skip


def composed(inner):
    """Schemas of the keywords that are rewritten, and of those around them."""
    several = st.lists(inner, min_size=1, max_size=2)
    named = st.dictionaries(st.sampled_from(["a", "b"]), inner, min_size=1, max_size=2)
    return st.fixed_dictionaries(
        {},
        optional={
            "not": inner, "if": inner, "then": inner, "else": inner, "oneOf": several,
            "anyOf": several, "allOf": several, "contains": inner, "items": inner,
            "minContains": st.integers(0, 2), "maxContains": st.integers(0, 2),
            "properties": named, "required": st.just(["a"]), "prefixItems": several,
            "additionalProperties": st.sampled_from([False, {"type": "integer"}]),
            "propertyNames": st.sampled_from([{"maxLength": 1}, {"enum": ["a"]}, False]),
            "unevaluatedProperties": st.sampled_from([False, {"type": "null"}]),
            "unevaluatedItems": st.just(False), "uniqueItems": st.just(True),
        },
    ).filter(lambda schema: len(schema) <= 3)  # fmt: skip


@given(st.recursive(LEAVES, composed, max_leaves=5), st.integers(0, 1000))
def test_no_answer_is_invalid_whatever_a_schema_asks(compiler, schema, seed):
    """A random walk through the grammar of a schema that is held, by an independent validator."""
    try:
        grammar = compiler.compile("json_schema", json.dumps(schema))
    except InvalidRequest:
        return
    draw, matcher, answer = random.Random(seed), grammar.start(), bytearray()
    mask = np.zeros(10, np.int32)
    while len(answer) < 60:
        matcher.fill(mask)
        allowed = np.nonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))[0].tolist()
        ends = [id for id in allowed if id == 2 or id - FIRST in b'"]}0']
        plain = [id for id in allowed if id == 2 or id - FIRST in b'"]}[{,: 0123abtrufalsen']
        id = draw.choice(ends if ends and draw.random() < 0.5 else plain or allowed)
        if id == 2:
            break
        assert matcher.advance(id) is None
        answer.append(id - FIRST)
    if matcher.accepts:
        assert Draft202012Validator(schema).is_valid(json.loads(answer.decode("utf-8"))), answer
