"""JSON schemas as the grammar compiler takes them, and what of them it cannot hold.

llguidance holds most of JSON Schema 2020-12. Clients send every draft of it and OpenAPI's dialect,
so `fit` says what it can in other words (`nullable`, lists of `items`, `dependentRequired`, simple
uses of `not` and `propertyNames`), drops annotations, and reports the rest as gaps, by path and
keyword: what a gap asks for is not in the schema that comes back. `format` is an annotation, as the
specification has it: those that the compiler knows are held, others change nothing.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MAX_DEPTH = 64  # of nested objects and lists in a schema
MAX_TRIALS = 200  # of parts of a schema, to find the one that cannot be compiled

ANNOTATIONS = {
    "$schema", "$comment", "title", "description", "default", "examples", "example", "deprecated",
    "readOnly", "writeOnly", "contentEncoding", "contentMediaType", "contentSchema", "x-guidance",
}  # fmt: skip
UNHELD = (  # what no grammar of llguidance's can say
    "uniqueItems", "propertyNames", "not", "if", "contains", "unevaluatedProperties",
    "unevaluatedItems", "$dynamicRef", "$recursiveRef",
)  # fmt: skip
ONE, MANY = ("additionalProperties", "items"), ("prefixItems", "anyOf", "oneOf", "allOf")
DEFINITIONS = ("$defs", "definitions")
NAMED = ("properties", "patternProperties", *DEFINITIONS)
BOUNDS = ("minimum", "maximum")
TYPES = ("null", "boolean", "object", "array", "number", "integer", "string")
Schema = dict[str, Any]


@dataclass(frozen=True)
class FittedSchema:
    """A schema that can be compiled, and the parts of the original that are not in it.

    Attributes:
        gaps: paths of keywords, such as `properties.tags.uniqueItems`.
        why: the compiler's words about the last of them, if it had any.
    """

    schema: Schema
    gaps: tuple[str, ...] = ()
    why: str = ""


def fit(schema: Any, error_of: Callable[[Any], str]) -> FittedSchema:
    """A schema without what the compiler cannot hold.

    Args:
        error_of: why a schema cannot be compiled, "" if it can.
    """
    if not isinstance(schema, dict):
        return FittedSchema({}, ("the schema",), "a JSON object is expected")
    if _depth(schema) > MAX_DEPTH:
        why = f"it is nested more than {MAX_DEPTH} deep"
        return FittedSchema({}, ("the schema",), why)
    fitting = _Fitting(schema, error_of)
    fitted = fitting.say(schema, "")
    if not isinstance(fitted, dict):
        return FittedSchema({}, ("not",), "nothing satisfies it")
    return FittedSchema(fitting.mend(fitted, ""), tuple(fitting.gaps), fitting.why)


class _Fitting:
    """One schema on its way; `gaps` fills up."""

    def __init__(self, root: Schema, error_of: Callable[[Any], str]):
        self.gaps: list[str] = []
        self.why = ""
        self._error_of, self._n_trials = error_of, 0
        text = json.dumps(root)
        self._referred = set(re.findall(r'"#/(?:\$defs|definitions)/([^"/]*)', text))
        self._refers_otherwise = re.search(r'"\$(id|anchor|dynamicAnchor)"|#/[^"]*[~%]', text)
        self._definitions: Schema = {}

    def say(self, schema: Any, path: str) -> Any:
        """The same schema in keywords that the compiler knows, as far as possible."""
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            self._gap(path, "it is not a schema")
            return True
        if schema.get("not") in (True, {}):
            return False
        new = {k: v for k, v in schema.items() if k not in ANNOTATIONS and k != "nullable"}
        self._say_drafts(new)
        if isinstance(new.get("if"), bool):
            then = new.get("then" if new.pop("if") else "else", True)
            new["allOf"] = [*_list(new.get("allOf")), then]
        conditions = self._say_dependencies(new, path)
        self._say_names(new)
        self._say_not(new)
        self._drop_idle(new)
        for name in UNHELD:
            if new.pop(name, None) is not None:
                self._gap(f"{path}{name}")
        for name in ("then", "else", "minContains", "maxContains"):
            new.pop(name, None)
        self._check_strings(new, path)
        self._check_values(new, path)
        new = self._each(new, path, self.say)
        if conditions:
            new["allOf"] = [*_list(new.get("allOf")), *conditions]
        return {"anyOf": [new, {"type": "null"}]} if schema.get("nullable") is True else new

    def _each(self, schema: Schema, path: str, change: Callable[[Any, str], Any]) -> Schema:
        """A copy with each schema inside it changed; definitions that nothing refers to go."""
        new = dict(schema)
        for name in ONE:
            if name in new:
                new[name] = change(new[name], f"{path}{name}.")
        for name in MANY:
            if isinstance(parts := new.get(name), list):
                new[name] = [change(p, f"{path}{name}[{i}].") for i, p in enumerate(parts)]
        for name in NAMED:
            if isinstance(parts := new.get(name), dict):
                if name in DEFINITIONS and not self._refers_otherwise:
                    parts = {k: v for k, v in parts.items() if k in self._referred}
                new[name] = {k: change(v, f"{path}{name}.{k}.") for k, v in parts.items()}
        return new

    def _say_drafts(self, new: Schema) -> None:
        """Draft 4 to 7 in the words of 2020-12, and types in capitals, as Google's clients have."""
        if isinstance(items := new.get("items"), list):
            new["prefixItems"] = items
            del new["items"]
            if "additionalItems" in new:
                new["items"] = new["additionalItems"]
        new.pop("additionalItems", None)
        for bound in BOUNDS:
            exclusive = "exclusive" + bound.capitalize()
            if isinstance(new.get(exclusive), bool) and new.pop(exclusive) and bound in new:
                new[exclusive] = new.pop(bound)
        if isinstance(kind := new.get("type"), str) and kind.lower() in TYPES:
            new["type"] = kind.lower()
        for name in [name for name in new if name.startswith(("min", "max"))]:
            if isinstance(value := new[name], float) and value.is_integer() and name not in BOUNDS:
                new[name] = int(value)  # 2.0 items are two

    def _say_dependencies(self, new: Schema, path: str) -> list[Schema]:
        """Conditions: a property is not there, or else what depends on it holds."""
        conditions = []
        for keyword in ("dependentRequired", "dependentSchemas", "dependencies"):
            dependents = new.pop(keyword, None) or {}
            if not isinstance(dependents, dict):
                self._gap(f"{path}{keyword}")
                continue
            for name, then in dependents.items():
                then = {"required": then} if isinstance(then, list) else then
                then = self.say(then, f"{path}{keyword}.{name}.")
                there = {"required": [name], "allOf": [then]}
                conditions.append({"anyOf": [{"properties": {name: False}}, there]})
        return conditions

    def _say_names(self, new: Schema) -> None:
        """`propertyNames` of an open object: a pattern, or a list of names."""
        names = new.get("propertyNames")
        if names in (True, {}) or names == {"type": "string"}:
            del new["propertyNames"]
        elif isinstance(names, dict) and not {"properties", "patternProperties"} & new.keys():
            names, value = dict(names), new.get("additionalProperties", True)
            if names.pop("type", "string") == "string" and len(names) == 1:
                if isinstance(pattern := names.get("pattern"), str):
                    new["patternProperties"] = {pattern: value}
                elif isinstance(allowed := names.get("enum", [names.get("const")]), list):
                    if not all(isinstance(name, str) for name in allowed):
                        return
                    new["properties"] = dict.fromkeys(allowed, value)
                else:
                    return
                new["additionalProperties"] = False
                del new["propertyNames"]

    def _say_not(self, new: Schema) -> None:
        """`not` of types, of values among an `enum`, and of the empty string."""
        if not isinstance(refused := new.get("not"), dict) or len(refused) != 1:
            return
        keyword, value = next(iter(refused.items()))
        kinds, values = _list(new.get("type", TYPES)), _list(value)
        if keyword == "type" and {*map(str, (*kinds, *values))} <= {*TYPES}:
            if "integer" in values and "number" in kinds and "number" not in values:
                return  # "a number but no integer" cannot be expressed
            gone = {*values, *(["integer"] if "number" in values else [])}
            new["type"] = [kind for kind in kinds if kind not in gone]
        elif keyword in ("const", "enum") and isinstance(listed := new.get("enum"), list):
            gone = values if keyword == "enum" else [value]
            new["enum"] = [v for v in listed if not any(_same(v, other) for other in gone)]
        elif refused == {"const": ""} and kinds == ["string"]:
            new["minLength"] = new.get("minLength") or 1
        else:
            return
        del new["not"]

    def _drop_idle(self, new: Schema) -> None:
        """Remove keywords that ask for nothing."""
        idle = {
            "uniqueItems": new.get("uniqueItems") is False or new.get("maxItems") in (0, 1),
            "if": not {"then", "else"} & new.keys(),
            "not": new.get("not") is False,
            "contains": new.get("minContains") == 0 and "maxContains" not in new,
        }
        applied = {"allOf", "anyOf", "oneOf", "$ref", "if", "dependentSchemas"} & new.keys()
        for kind, other in (("Properties", "additionalProperties"), ("Items", "items")):
            name = f"unevaluated{kind}"
            idle[name] = new.get(name) in (True, {}) or (not applied and name in new)
            if name in new and not applied:
                new.setdefault(other, new[name])
        for name in idle:
            if idle[name]:
                new.pop(name, None)

    def _check_strings(self, new: Schema, path: str) -> None:
        for name in ("format", "pattern"):
            if name in new and (error := self._error_of({"type": "string", name: new[name]})):
                del new[name]
                if name == "pattern":
                    self._gap(f"{path}{name}", error)
        patterns = new.get("patternProperties")
        patterns = patterns if isinstance(patterns, dict) else {}
        for pattern in patterns:
            if error := self._error_of({"type": "string", "pattern": pattern}):
                new["patternProperties"] = {
                    k: v for k, v in new["patternProperties"].items() if k != pattern
                }
                if new.get("additionalProperties") is False:  # or no such name could come
                    new["additionalProperties"] = patterns[pattern]
                self._gap(f"{path}patternProperties.{pattern}", error)

    def _check_values(self, new: Schema, path: str) -> None:
        """Values that are of no type that the schema allows: the values count, not the type."""
        name, kinds = "enum" if "enum" in new else "const", _list(new.get("type", []))
        values = new["enum"] if "enum" in new else [new.get("const")]
        if name not in new or not kinds or not isinstance(values, list):
            return
        if not any(_is_of(value, kind) for value in values for kind in kinds):
            del new["type" if values else name]
            self._gap(f"{path}{name}", "no value has the type")

    def mend(self, schema: Any, path: str) -> Any:
        """A schema that can be compiled: without the smallest parts that cannot."""
        if not path:
            self._definitions = _definitions(schema)
        if not (error := self._try(schema)):
            return schema
        if not isinstance(schema, dict):  # false, where something is required
            self._gap(path, error)
            return True
        new = self._each(schema, path, self.mend)
        if not path:
            self._definitions = _definitions(new)
        if not (error := self._try(new)):
            return new
        if "oneOf" in new:  # branches that may overlap: any of them instead of exactly one
            new["allOf"] = [*_list(new.get("allOf")), {"anyOf": new.pop("oneOf")}]
            self._gap(f"{path}oneOf", error)
            if not (error := self._try(new)):
                return new
        definitions = _definitions(new)
        for name in sorted(new.keys() - definitions, key=lambda name: (name == "type", name)):
            without = {k: v for k, v in new.items() if k != name}
            if not self._try(without):
                self._gap(f"{path}{name}", error)
                return without
        self._gap(path, error)
        return {} if path else _definitions(new)

    def _try(self, schema: Any) -> str:
        self._n_trials += 1
        if self._n_trials > MAX_TRIALS:
            return "too many parts of it cannot be compiled"
        return self._error_of(
            {**self._definitions, **schema} if isinstance(schema, dict) else schema
        )

    def _gap(self, path: str, why: str = "") -> None:
        self.gaps.append(path.removesuffix(".") or "the schema")
        self.why = why or self.why


def _is_of(value: Any, kind: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return {
        "null": value is None,
        "boolean": isinstance(value, bool),
        "object": isinstance(value, dict),
        "array": isinstance(value, list),
        "string": isinstance(value, str),
        "number": number,
        "integer": number and value % 1 == 0,
    }.get(str(kind), True)


def _definitions(schema: Schema) -> Schema:
    """Definitions that references may name, under any key of the root."""
    others = {*ONE, *MANY, "properties", "patternProperties"}
    return {
        k: v for k, v in schema.items() if k == "$id" or (isinstance(v, dict) and k not in others)
    }


def _same(a: Any, b: Any) -> bool:
    """Whether two values are equal as JSON: 1 and 1.0 are, 1 and true are not."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def _depth(value: object) -> int:
    """How deep lists and objects are nested; stops counting past what is allowed."""
    level, depth = [value], 0
    while level and depth <= MAX_DEPTH:
        inner = [list(v.values()) if isinstance(v, dict) else v for v in level]
        level = [x for v in inner if isinstance(v, list) for x in v]
        depth += 1
    return depth
