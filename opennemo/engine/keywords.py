"""JSON Schema's keywords and values, shared by the files that rewrite schemas."""

from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]

ANNOTATIONS = {
    "$schema", "$comment", "title", "description", "default", "examples", "example", "deprecated",
    "readOnly", "writeOnly", "contentEncoding", "contentMediaType", "contentSchema", "x-guidance",
}  # fmt: skip
DEFINITIONS = ("$defs", "definitions")
ONE, MANY = ("additionalProperties", "items"), ("prefixItems", "anyOf", "oneOf", "allOf")
NAMED = ("properties", "patternProperties")
TYPES = ("null", "boolean", "object", "array", "number", "integer", "string")


class InexpressibleError(ValueError):
    """No schema that the compiler understands means the same."""


def as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def types_but(*kinds: str) -> list[str]:
    """All types but these."""
    return [kind for kind in TYPES if kind not in kinds]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_of(value: Any, kind: Any) -> bool:
    """Whether a value is of a type; of an unknown type every value is."""
    return {
        "null": value is None,
        "boolean": isinstance(value, bool),
        "object": isinstance(value, dict),
        "array": isinstance(value, list),
        "string": isinstance(value, str),
        "number": is_number(value),
        "integer": is_number(value) and value % 1 == 0,
    }.get(str(kind), True)


def is_same(a: Any, b: Any) -> bool:
    """Whether two values are equal as JSON: 1 and 1.0 are, 1 and true are not."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def each(
    schema: Schema,
    path: str,
    change: Callable[[Any, str], Any],
    named: tuple[str, ...] = (*NAMED, *DEFINITIONS),
) -> Schema:
    """A copy in which `change`, called with a schema and its path, replaces each inner schema."""
    new = dict(schema)
    for name in ONE:
        if name in new:
            new[name] = change(new[name], f"{path}{name}.")
    for name in MANY:
        if isinstance(parts := new.get(name), list):
            new[name] = [change(p, f"{path}{name}[{i}].") for i, p in enumerate(parts)]
    for name in named:
        if isinstance(parts := new.get(name), dict):
            new[name] = {k: change(v, f"{path}{name}.{k}.") for k, v in parts.items()}
    return new


def any_of(parts: list[Any]) -> Any:
    """A schema of what one of the parts accepts, without those that accept nothing."""
    parts = [part for part in parts if part is not False]
    if True in parts or {} in parts:
        return True
    return {"anyOf": parts} if len(parts) > 1 else parts[0] if parts else False


def all_of(parts: list[Any]) -> Any:
    """A schema of what all of the parts accept, without those that accept everything."""
    parts = [part for part in parts if part is not True and part != {}]
    if False in parts:
        return False
    return {"allOf": parts} if len(parts) > 1 else parts[0] if parts else True
