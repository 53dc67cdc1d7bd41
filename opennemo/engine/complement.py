"""The complement of a JSON schema: a schema of the values that it refuses.

The compiler has no `not`, so `not`, `if` and `oneOf` are expressed by complements. A keyword
refuses the values of its type that fail it (`maximum: 3` refuses numbers above 3 and nothing else),
and a schema refuses what one of its keywords refuses. Where no schema expresses this exactly, the
complement is smaller, so that what is generated is valid: fractions count as integers, for
instance. It is never larger.
"""

import itertools
import math
import re
from collections.abc import Callable
from typing import Any

from opennemo.engine.keywords import (
    ANNOTATIONS,
    DEFINITIONS,
    TYPES,
    InexpressibleError,
    Schema,
    all_of,
    any_of,
    as_list,
    is_number,
    types_but,
)

MAX_PARTS = 100  # schemas in one complement
MAX_LETTERS = 20_000  # of a pattern that excludes strings
OPPOSITE_BOUNDS = {
    "minimum": "exclusiveMaximum", "exclusiveMinimum": "maximum",
    "maximum": "exclusiveMinimum", "exclusiveMaximum": "minimum",
}  # fmt: skip
SIZES = {"Length": "string", "Items": "array", "Properties": "object"}
BESIDE = {"then", "else", "minContains", "maxContains"}  # read with `if` and `contains`


def complement(schema: Any, resolve: Callable[[str], Any], lossy: list[str] | None = None) -> Any:
    """A schema, or True or False, of values that `schema` refuses.

    Args:
        resolve: the schema that a `$ref` names.
        lossy: gets the keywords that cannot be expressed; what they refuse is left out.

    Raises:
        InexpressibleError: no schema that can be compiled means it, or only a very large one.
    """
    return _Complement(resolve, lossy).of(schema, ())


class _Complement:
    def __init__(self, resolve: Callable[[str], Any], lossy: list[str] | None):
        self._resolve, self._lossy, self._n_parts = resolve, lossy, 0

    def of(self, schema: Any, inside: tuple[str, ...]) -> Any:
        """`inside` are the references that led here."""
        self._n_parts += 1
        if self._n_parts > MAX_PARTS:
            raise InexpressibleError("its complement is too large")
        if isinstance(schema, bool):
            return not schema
        if not isinstance(schema, dict) or schema.get("nullable") is True:
            raise InexpressibleError
        said = schema.keys() - ANNOTATIONS - {*DEFINITIONS} - BESIDE - {"nullable"}
        parts = []
        for name in schema:
            if name in said:
                try:
                    parts.append(self._refused(name, schema, inside))
                except InexpressibleError:
                    if self._lossy is None or self._n_parts > MAX_PARTS:
                        raise
                    self._lossy.append(name)
        return any_of(parts)

    def _refused(self, name: str, schema: Schema, inside: tuple[str, ...]) -> Any:
        """The values that one keyword refuses."""
        value = schema[name]
        if name in OPPOSITE_BOUNDS and is_number(value):
            return {"type": "number", OPPOSITE_BOUNDS[name]: value}
        if name[3:] in SIZES and name[:3] in ("min", "max"):
            return _other_size(name, value)
        if name in ("const", "enum"):
            return _other_values([value] if name == "const" else as_list(value))
        if name == "uniqueItems" and value is False:
            return False
        refused = getattr(self, f"_{name.removeprefix('$')}", None)
        if name not in SAID or refused is None:
            raise InexpressibleError
        return refused(value, schema, inside)

    def _type(self, kinds: Any, *_: Any) -> Any:
        kinds = as_list(kinds)
        if not all(isinstance(kind, str) and kind in TYPES for kind in kinds):
            raise InexpressibleError
        numbers = ("number", "integer")
        others = types_but(*kinds, *(numbers if {*numbers} & {*kinds} else ()))
        return {"type": others} if others else False

    def _required(self, names: Any, *_: Any) -> Any:
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InexpressibleError
        return any_of([{"type": "object", "properties": {name: False}} for name in names])

    def _properties(self, properties: Any, _: Schema, inside: tuple[str, ...]) -> Any:
        if not isinstance(properties, dict):
            raise InexpressibleError
        parts = [(name, self.of(schema, inside)) for name, schema in properties.items()]
        return any_of(
            [
                {"type": "object", "required": [name], "properties": {name: other}}
                for name, other in parts
                if other is not False
            ]
        )

    def _additionalProperties(self, value: Any, schema: Schema, inside: tuple[str, ...]) -> Any:
        if self.of(value, inside) is False:
            return False
        if value is not False or schema.get("properties") or schema.get("patternProperties"):
            raise InexpressibleError
        return {"type": "object", "minProperties": 1}

    def _items(self, value: Any, schema: Schema, inside: tuple[str, ...]) -> Any:
        other, n_before = self.of(value, inside), len(as_list(schema.get("prefixItems")))
        if other is False:
            return False
        if other is True:
            return {"type": "array", "minItems": n_before + 1}
        if n_before:
            raise InexpressibleError
        return {"type": "array", "contains": other}

    def _prefixItems(self, items: Any, _: Schema, inside: tuple[str, ...]) -> Any:
        others = [self.of(item, inside) for item in as_list(items)]
        return any_of(
            [
                {"type": "array", "minItems": i + 1, "prefixItems": [*[True] * i, other]}
                for i, other in enumerate(others)
                if other is not False
            ]
        )

    def _contains(self, value: Any, schema: Schema, inside: tuple[str, ...]) -> Any:
        if schema.get("minContains", 1) != 1 or "maxContains" in schema:
            raise InexpressibleError
        return {"type": "array", "items": self.of(value, inside)}

    def _not(self, value: Any, *_: Any) -> Any:
        return value

    def _allOf(self, parts: Any, _: Schema, inside: tuple[str, ...]) -> Any:
        return any_of([self.of(part, inside) for part in as_list(parts)])

    def _anyOf(self, parts: Any, _: Schema, inside: tuple[str, ...]) -> Any:
        return all_of([self.of(part, inside) for part in as_list(parts)])

    def _oneOf(self, parts: Any, schema: Schema, inside: tuple[str, ...]) -> Any:
        none = self._anyOf(parts, schema, inside)
        two = [all_of([*pair]) for pair in itertools.combinations(as_list(parts), 2)]
        self._n_parts += len(two)
        return any_of([none, *two])

    def _if(self, condition: Any, schema: Schema, inside: tuple[str, ...]) -> Any:
        parts = []
        if "then" in schema:
            parts.append(all_of([condition, self.of(schema["then"], inside)]))
        if "else" in schema:
            parts.append(all_of([self.of(condition, inside), self.of(schema["else"], inside)]))
        return any_of(parts)

    def _ref(self, name: Any, _: Schema, inside: tuple[str, ...]) -> Any:
        if name in inside:
            raise InexpressibleError("it refers to itself")
        return self.of(self._resolve(name), (*inside, name))


SAID = {
    "type", "required", "properties", "additionalProperties", "items", "prefixItems", "contains",
    "not", "allOf", "anyOf", "oneOf", "if", "$ref",
}  # fmt: skip


def _other_size(name: str, size: Any) -> Any:
    """What `minItems` and its like refuse."""
    if not is_number(size) or size % 1:
        raise InexpressibleError
    kind = SIZES[name[3:]]
    if name.startswith("max"):
        return {"type": kind, f"min{name[3:]}": int(size) + 1}
    return {"type": kind, f"max{name[3:]}": int(size) - 1} if size >= 1 else False


def _other_values(values: list[Any]) -> Any:
    """All values but these, as one schema where no number is among them."""
    strings = {value for value in values if isinstance(value, str)}
    numbers = sorted({value for value in values if is_number(value)})
    flags = [flag for flag in (True, False) if any(value is flag for value in values)]
    if any(value for value in values if isinstance(value, list | dict)):
        raise InexpressibleError
    gone = {"null"} if None in values else set()
    gone |= {"boolean"} if len(flags) == 2 else set()
    other: Schema = {"type": types_but(*gone)} if gone else {}
    other |= {"pattern": _pattern_without(strings)} if strings else {}
    other |= {"minItems": 1} if [] in values else {}
    other |= {"minProperties": 1} if {} in values else {}
    parts = [other]
    if len(flags) == 1:
        parts.append({"anyOf": [{"type": types_but("boolean")}, {"const": not flags[0]}]})
    if numbers:
        edges = itertools.pairwise([-math.inf, *numbers, math.inf])
        between = [{"exclusiveMinimum": low, "exclusiveMaximum": high} for low, high in edges]
        parts.append({"anyOf": [{k: v for k, v in b.items() if math.isfinite(v)} for b in between]})
    return all_of(parts)


def _pattern_without(strings: set[str]) -> str:
    """A regular expression of all other strings: each departs from these after a prefix."""
    beginnings: dict[str, set[str]] = {"": set()}  # and the letters that follow them
    for string in strings:
        for i, letter in enumerate(string):
            beginnings.setdefault(string[:i], set()).add(letter)
        beginnings.setdefault(string, set())
    if sum(map(len, beginnings)) > MAX_LETTERS:
        raise InexpressibleError("too many values are excluded")
    ways = []
    for beginning, letters in beginnings.items():
        start = "".join(map(_literal, beginning))
        ways += [start] if beginning not in strings else []
        other = f"[^{''.join(map(_in_class, sorted(letters)))}]" if letters else r"[\s\S]"
        ways.append(rf"{start}{other}[\s\S]*")
    return f"^(?:{'|'.join(ways)})$"


def _in_class(letter: str) -> str:
    return f"\\{letter}" if letter in "\\]^-[&~" else letter


def _literal(letter: str) -> str:
    return re.escape(letter) if letter.isascii() and not letter.isspace() else letter
