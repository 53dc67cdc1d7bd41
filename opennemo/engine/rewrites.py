"""Keywords of JSON Schema that the compiler lacks, expressed by keywords that it has.

Each function takes a schema with the keyword, removes it, and returns a schema that must hold as
well. Where a keyword can be satisfied in too many ways, fewer are allowed: a list's `contains` is
met among its first items, for instance. The answer is valid in any case.
"""

import itertools
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from opennemo.engine.keywords import (
    ANNOTATIONS,
    TYPES,
    InexpressibleError,
    Schema,
    all_of,
    any_of,
    as_list,
    is_of,
    is_same,
    types_but,
)

Complement = Callable[[Any], Any]
LATER = 3  # items that may come before those that `contains` asks for
MAX_SHAPES = 64  # of a list, by which of its items satisfy `contains`
MAX_DEPTH = 8  # of nested schemas whose types are examined
MAX_LISTS = 70  # in a schema that are written out, since their items must be unique


def refuse(schema: Schema, complement: Complement) -> Any:
    """Instead of `not`."""
    refused = schema.pop("not")
    listed = schema.get("enum")
    if isinstance(listed, list) and isinstance(refused, dict) and len(refused) == 1:
        gone = [refused["const"]] if "const" in refused else refused.get("enum")
        if isinstance(gone, list):
            schema["enum"] = [v for v in listed if not any(is_same(v, other) for other in gone)]
            return True
    return complement(refused)


def choose(schema: Schema, complement: Complement) -> Any:
    """Instead of `if`, `then` and `else`."""
    condition = schema.pop("if")
    then, other = schema.pop("then", True), schema.pop("else", True)
    if isinstance(condition, bool):
        return then if condition else other
    if other is True:
        return any_of([complement(condition), then])
    return any_of([all_of([condition, then]), all_of([complement(condition), other])])


def only_one(
    branches: list[Any], complement: Complement, resolve: Callable[[str], Any]
) -> list[Any]:
    """Instead of `oneOf`: schemas of which one must hold."""
    kinds = [_kinds(branch, resolve) for branch in branches]
    pairs = [(i, j) for i, j in itertools.permutations(range(len(branches)), 2)]
    pairs = [(i, j) for i, j in pairs if kinds[i] & kinds[j]]
    if len(pairs) > MAX_SHAPES:
        raise InexpressibleError
    parts = [[branch] for branch in branches]
    for i, j in pairs:
        others = [complement(branches[j]), *_surely_refused(branches[i], branches[j], resolve)]
        parts[i].append(any_of(others))
    return [all_of(part) for part in parts]


def _kinds(schema: Any, resolve: Callable[[str], Any], depth: int = 0) -> set[str]:
    """Types of the values that a schema may accept; a number may be an integer."""
    kinds = {*TYPES} - {"integer"}
    if not isinstance(schema, dict) or depth > MAX_DEPTH:
        return set() if schema is False else kinds
    if "type" in schema:
        kinds &= {"number" if kind == "integer" else kind for kind in as_list(schema["type"])}
    if "const" in schema or "enum" in schema:
        values = [schema["const"]] if "const" in schema else as_list(schema["enum"])
        kinds = {kind for kind in kinds if any(is_of(value, kind) for value in values)}
    if "$ref" in schema:
        with suppress(InexpressibleError):
            kinds &= _kinds(resolve(schema["$ref"]), resolve, depth + 1)
    for part in as_list(schema.get("allOf")):
        kinds &= _kinds(part, resolve, depth + 1)
    for keyword in ("anyOf", "oneOf"):
        if keyword in schema:
            parts = [_kinds(part, resolve, depth + 1) for part in as_list(schema[keyword])]
            kinds &= set().union(*parts)
    return kinds | ({"null"} if schema.get("nullable") is True else set())


def _surely_refused(schema: Any, other: Any, resolve: Callable[[str], Any]) -> list[Any]:
    """Schemas of values of `schema` that `other` refuses, if these are easy to name."""
    schema, other = (
        resolve(part["$ref"])
        if isinstance(part, dict) and part.keys() - ANNOTATIONS == {"$ref"}
        else part
        for part in (schema, other)
    )
    if not _kinds(schema, resolve) & _kinds(other, resolve):
        return [True]
    if not (isinstance(schema, dict) and isinstance(other, dict)):
        return []
    parts: list[Any] = []
    names, others = _all_names(schema), _all_names(other)
    if others is not None:
        lone = [name for name in schema.get("properties", ()) if name not in others]
        parts += [{"type": "object", "required": [name]} for name in lone]
    if names is not None and {*as_list(other.get("required"))} - names:
        parts.append({"type": "object"})
    for keyword in ("anyOf", "oneOf"):
        for part in as_list(schema.get(keyword)):
            parts.append(all_of([part, any_of(_surely_refused(part, other, resolve))]))
        if keyword in other:
            branches = [_surely_refused(schema, part, resolve) for part in as_list(other[keyword])]
            parts.append(all_of([any_of(branch) for branch in branches]))
    if isinstance(pattern := other.get("pattern"), str):
        with suppress(InexpressibleError):
            strings = [value for value in _values(schema) if isinstance(value, str)]
            parts.append({"enum": [v for v in strings if not _matches(pattern, v)]})
    return parts


def _all_names(schema: Schema) -> set[str] | None:
    """Names that properties may have, where there are no others."""
    if schema.get("additionalProperties") is not False or "patternProperties" in schema:
        return None
    return {*schema.get("properties", ())}


def contain(schema: Schema, complement: Complement) -> Any:
    """Instead of `contains`, `minContains` and `maxContains`."""
    item = schema.pop("contains")
    least, most = schema.pop("minContains", 1), schema.pop("maxContains", None)
    if not all(is_of(n, "integer") and n >= 0 for n in (least, 0 if most is None else most)):
        raise InexpressibleError
    other = True if most is None else complement(item)
    least, most = int(least), int(least if most is None else most)
    numbers = range(least, most + 1)
    if least <= LATER:
        lengths = range(most + LATER)
        places = (c for n in numbers for length in lengths for c in _places(n, length))
    else:
        places = (tuple(range(n)) for n in numbers)
    shapes = list(itertools.islice(places, MAX_SHAPES + 1))
    if len(shapes) > MAX_SHAPES:
        shapes = [tuple(range(n)) for n in itertools.islice(numbers, MAX_SHAPES)]
    lists = []
    for shape in shapes:
        length = shape[-1] + 1 if shape else 0
        items = [item if i in shape else other for i in range(length)]
        prefix = {"prefixItems": items} if items else {}
        lists.append({"type": "array", "minItems": length, "items": other, **prefix})
    return _for_type(schema, "array", any_of(lists))


def _places(n: int, length: int) -> Iterable[tuple[int, ...]]:
    """Ways to place n items, the last of them at the end of so many."""
    if n == 0:
        return [()] if length == 0 else []
    if length == 0:
        return []
    return ((*c, length - 1) for c in itertools.combinations(range(length - 1), n - 1))


class Uniqueness:
    """`uniqueItems`, where a list may hold few values: all such lists are written out."""

    def __init__(self) -> None:
        self._n_lists = 0  # written out so far

    def __call__(self, schema: Schema, _: Complement) -> Any:
        schema.pop("uniqueItems")
        prefix = [_values(item) for item in as_list(schema.get("prefixItems"))]
        rest = schema.get("items", True)
        more = [] if rest is False else _values(rest)
        most = min(schema.get("maxItems", MAX_LISTS), len(prefix) + len(more))
        lists, level = [], [[]]
        for length in range(int(most) + 1):
            lists += level if length >= schema.get("minItems", 0) else []
            values = prefix[length] if length < len(prefix) else more
            level = [[*known, v] for known in level for v in values if not _holds(known, v)]
            if self._n_lists + len(lists) + len(level) > MAX_LISTS:
                raise InexpressibleError("there are too many lists of different items")
        self._n_lists += len(lists)
        return _for_type(schema, "array", {"enum": lists} if lists else False)


def _values(schema: Any) -> list[Any]:
    """The values that a schema accepts, if it accepts few."""
    if isinstance(schema, dict):
        if isinstance(values := schema.get("enum"), list) or "const" in schema:
            values = [schema["const"]] if "const" in schema else values
            if not schema.keys() - {"enum", "const", "type", "title", "description"}:
                kinds = as_list(schema.get("type"))
                return [v for v in values or () if not kinds or any(is_of(v, k) for k in kinds)]
        if schema in ({"type": "boolean"}, {"type": "null"}):
            return [True, False] if schema["type"] == "boolean" else [None]
    raise InexpressibleError


def _holds(values: list[Any], value: Any) -> bool:
    return any(is_same(value, other) for other in values)


def name(schema: Schema, _: Complement) -> Any:
    """Instead of `propertyNames`: a pattern of names, or a list of them."""
    names = schema.pop("propertyNames")
    if names in (True, {}):
        return True
    if names is False:
        return {"maxProperties": 0}
    if not isinstance(names, dict) or "patternProperties" in schema:
        raise InexpressibleError
    names = dict(names)
    if names.pop("type", "string") != "string":
        raise InexpressibleError
    properties, value = schema.get("properties", {}), schema.get("additionalProperties", True)
    allowed = [names["const"]] if "const" in names else names.get("enum")
    if isinstance(allowed, list) and len(names) == 1:
        new = {name: value for name in allowed if isinstance(name, str)}
        kept = {k: v for k, v in properties.items() if k in new}
        schema["properties"] = {**kept, **{k: v for k, v in new.items() if k not in kept}}
    else:
        pattern = _pattern_of(names)
        if properties and value not in (True, False, {}):
            raise InexpressibleError  # a listed name may match the pattern, and have another schema
        kept = {k: v for k, v in properties.items() if _matches(pattern, k)}
        schema["properties"] = kept
        if value is not False:
            schema["patternProperties"] = {pattern: value}
    schema["additionalProperties"] = False
    return {"properties": {name: False for name in properties if name not in kept}}


def _pattern_of(names: Schema) -> str:
    """A schema of names as one pattern."""
    if not names:
        return r"^[\s\S]*$"
    if isinstance(pattern := names.get("pattern"), str) and len(names) == 1:
        return pattern
    least, most = names.get("minLength", 0), names.get("maxLength")
    sizes = [least] if most is None else [least, most]
    if names.keys() - {"minLength", "maxLength"} or not all(is_of(n, "integer") for n in sizes):
        raise InexpressibleError
    return rf"^[\s\S]{{{int(least)},{'' if most is None else int(most)}}}$"


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error:
        raise InexpressibleError from None


class Closing:
    """`unevaluatedProperties` and `unevaluatedItems`: what no other keyword has evaluated.

    What the schema's own branches evaluate counts; what is evaluated only deeper inside counts as
    unevaluated.
    """

    def __init__(self, kind: str, resolve: Callable[[str], Any]):
        self._kind, self._resolve = kind, resolve

    def __call__(self, schema: Schema, complement: Complement) -> Any:
        """A schema that closes what `schema` describes; removes the keyword from `schema`."""
        value = schema.pop(f"unevaluated{self._kind}")
        for keyword in ("anyOf", "oneOf"):
            if isinstance(branches := schema.get(keyword), list):
                closed = [all_of([b, self._rest([schema, b], value)]) for b in branches]
                return any_of(closed)
        if "if" in schema:
            condition, rest = schema["if"], self._rest
            then = [schema, condition, schema.get("then", True)]
            closed = [all_of([condition, rest(then, value)])]
            other = rest([schema, schema.get("else", True)], value)
            return any_of([*closed, all_of([complement(condition), other])])
        return self._rest([schema], value)

    def _rest(self, schemas: list[Any], value: Any) -> Any:
        """The schema of everything that none of these schemas, all of which hold, evaluates."""
        parts = [part for schema in schemas for part in self._parts(schema, ())]
        if self._kind == "Items":
            if any({"items", "unevaluatedItems"} & part.keys() for part in parts):
                return True
            n = max((len(as_list(part.get("prefixItems"))) for part in parts), default=0)
            return {"items": value, **({"prefixItems": [True] * n} if n else {})}
        if any({"additionalProperties", "unevaluatedProperties"} & part.keys() for part in parts):
            return True
        rest: Schema = {"additionalProperties": value}
        for keyword in ("properties", "patternProperties"):
            if known := {name: True for part in parts for name in part.get(keyword, ())}:
                rest[keyword] = known
        return rest

    def _parts(self, schema: Any, inside: tuple[str, ...]) -> list[Schema]:
        """The schema, and those that hold whenever it does."""
        if not isinstance(schema, dict):
            return []
        parts = [schema]
        for part in as_list(schema.get("allOf")):
            parts += self._parts(part, inside)
        if (name := schema.get("$ref")) is not None and name not in inside:
            parts += self._parts(self._resolve(name), (*inside, name))
        return parts


def _for_type(schema: Schema, kind: str, asked: Any) -> Any:
    """A schema that applies to values of one type; others may be anything."""
    if as_list(schema.get("type")) == [kind]:
        return asked
    return any_of([asked, {"type": types_but(kind)}])
