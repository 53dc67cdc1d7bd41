"""JSON schemas in the form that the grammar compiler takes, and the parts that it cannot enforce.

llguidance enforces most of JSON Schema 2020-12. Clients send every draft of it and OpenAPI's
dialect, so `fit` rewrites what it can (`nullable`, lists of `items`, `dependentRequired`; `if`,
`not`, `contains` and others by rewrites.py), drops annotations, and reports the rest as gaps, by
path and keyword: the schema that it returns does not contain them (mending.py). `format` is an
annotation, as in the specification: those that the compiler knows are enforced, others have no
effect.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from opennemo.engine import rewrites
from opennemo.engine.complement import complement
from opennemo.engine.keywords import (
    ANNOTATIONS,
    DEFINITIONS,
    TYPES,
    InexpressibleError,
    Schema,
    any_of,
    as_list,
    each,
    is_of,
)
from opennemo.engine.mending import mend

MAX_DEPTH = 64  # of nested objects and lists in a schema
MAX_REWRITES = 100  # of keywords; rewriting may add more
MAX_REWRITES_INSIDE = 2

BOUNDS = ("minimum", "maximum")
UNHELD = ("$dynamicRef", "$recursiveRef")  # what no rewriting can express


@dataclass(frozen=True)
class FittedSchema:
    """A schema that can be compiled, and the parts of the original that are not in it.

    Attributes:
        gaps: paths of keywords, such as `properties.tags.uniqueItems`.
        why: the compiler's message about the last of them, if it had one.
    """

    schema: Schema
    gaps: tuple[str, ...] = ()
    why: str = ""


def fit(schema: Any, error_of: Callable[[Any], str]) -> FittedSchema:
    """A schema without the parts that the compiler cannot enforce.

    Args:
        error_of: why a schema cannot be compiled, "" if it can.
    """
    schema = {} if schema is True else schema
    if not isinstance(schema, dict):
        return FittedSchema({}, ("the schema",), "a JSON object is expected")
    if _depth(schema) > MAX_DEPTH:
        why = f"it is nested more than {MAX_DEPTH} deep"
        return FittedSchema({}, ("the schema",), why)
    fitting = _Fitting(schema, error_of)
    said = fitting.say(schema, "")
    if not isinstance(said, dict):
        return FittedSchema({}, ("not",), "nothing satisfies it")
    mended, gaps, why = mend(said, error_of, fitting.say_one_of)
    gaps = dict.fromkeys((*fitting.gaps, *gaps))
    return FittedSchema(mended, tuple(gaps), why or fitting.why)


class _Fitting:
    """One schema in progress; `gaps` fills up."""

    def __init__(self, root: Schema, error_of: Callable[[Any], str]):
        self.gaps: list[str] = []
        self.why = ""
        self._error_of = error_of
        name = root.get("$id", root.get("id"))
        self._own_name = name.removesuffix("#") if isinstance(name, str) else ""
        text = json.dumps({k: v for k, v in root.items() if k not in ("$id", "id")})
        if self._own_name:
            text = text.replace(json.dumps(self._own_name)[:-1] + "#", '"#')
        self._referred = set(re.findall(r'"#/(?:\$defs|definitions)/([^"/]*)', text))
        self._refers_otherwise = re.search(r'"\$(id|anchor|dynamicAnchor)"|#/[^"]*[~%]', text)
        self._definitions: Schema = {}
        self._root, self._n_rewrites, self._n_inside = root, 0, 0
        self._exclusive: dict[str, list[Any]] = {}  # branches of `oneOf`, by their rewriting
        anchors = re.findall(r'"\$dynamicAnchor": "([^"]*)"', text)
        self._dynamic = {f"#{name}" for name in anchors if anchors.count(name) > 1}
        if '"$recursiveAnchor": true' in text:
            self._dynamic.add("#")
        self._rewrites: dict[str, Callable[[Schema, rewrites.Complement], Any]] = {
            "unevaluatedProperties": rewrites.Closing("Properties", self._resolve),
            "unevaluatedItems": rewrites.Closing("Items", self._resolve),
            "uniqueItems": rewrites.Uniqueness(),
            "propertyNames": rewrites.name,
            "contains": rewrites.contain,
            "if": rewrites.choose,
            "not": rewrites.refuse,
        }

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
        self._drop_idle(new)
        conditions = self._say_dependencies(new, path)
        for keyword in self._rewrites:
            if keyword in new:
                conditions.append(self._rewrite(keyword, new, path))
        for name in UNHELD:
            if new.pop(name, None) is not None:
                self._gap(f"{path}{name}")
        for name in ("then", "else", "minContains", "maxContains"):
            new.pop(name, None)
        self._check_strings(new, path)
        if not self._check_values(new, path):
            return False
        branches = new.get("oneOf")
        self._drop_unused(new)
        new = each(new, path, self.say)
        if isinstance(branches, list):
            self._exclusive[json.dumps(new["oneOf"])] = branches
        if conditions := [c for c in conditions if c is not True]:
            new["allOf"] = [*as_list(new.get("allOf")), *conditions]
        return {"anyOf": [new, {"type": "null"}]} if schema.get("nullable") is True else new

    def _rewrite(self, keyword: str, new: Schema, path: str) -> Any:
        """Take a keyword out of `new` -> the schema that must hold instead."""
        before = dict(new)
        try:
            asked = self._rewrites[keyword](new, self._complement)
        except InexpressibleError as error:
            new.clear()
            new.update(before)
            del new[keyword]
            self._gap(f"{path}{keyword}", str(error))
            return True
        return self._say_instead(asked, f"{path}{keyword}")

    def _say_instead(self, asked: Any, path: str) -> Any:
        """`say` the replacement of the keyword at `path`; its gaps are the keyword's."""
        n_gaps, self._n_rewrites = len(self.gaps), self._n_rewrites + 1
        if self._n_rewrites > MAX_REWRITES or self._n_inside >= MAX_REWRITES_INSIDE:
            self._gap(path, "it asks for too many schemas within each other")
            return True
        self._n_inside += 1
        said = self.say(asked, f"{path}.")
        self._n_inside -= 1
        if len(self.gaps) > n_gaps:
            self.gaps[n_gaps:] = [path]
        return said

    def say_one_of(self, said: list[Any], path: str) -> tuple[Any, list[Any]] | None:
        """Instead of `oneOf`, whose branches are given as `say` has them.

        -> what must hold, and parts of it that must be possible; None if nothing expresses it.
        """
        n_gaps, lossy = len(self.gaps), []

        def refused(branch: Any) -> Any:
            return complement(branch, self._resolve, lossy)

        for refusing in (refused, lambda _: False):  # what is easy to name may be enough
            try:
                branches = self._exclusive[json.dumps(said)]
                parts = rewrites.only_one(branches, refusing, self._resolve)
            except (KeyError, InexpressibleError):
                continue
            parts = [self._say_instead(part, f"{path}oneOf") for part in parts]
            if len(self.gaps) == n_gaps:
                return any_of(parts), parts if lossy or refusing is not refused else []
            del self.gaps[n_gaps:]
        return None

    def _complement(self, schema: Any) -> Any:
        return complement(schema, self._resolve)

    def _resolve(self, name: Any) -> Any:
        """The schema that a reference within the root names."""
        found, name = self._root, self._within(name)
        if self._refers_otherwise or not isinstance(name, str) or not re.match("#(/|$)", name):
            raise InexpressibleError(f"the reference {name!r} is not followed")
        for key in name.split("/")[1:]:
            if not isinstance(found, dict) or key not in found:
                raise InexpressibleError(f"the reference {name!r} is not followed")
            found = found[key]
        return found

    def _within(self, name: Any) -> Any:
        """A reference to the root by its own `$id`, as one that begins with #."""
        root, mark, rest = name.partition("#") if isinstance(name, str) else (None, "", "")
        own = root == self._own_name and mark and not self._refers_otherwise
        return f"#{rest}" if own else name

    def _say_drafts(self, new: Schema) -> None:
        """Draft 4 to 7 in keywords of 2020-12; types in capitals, as Google's clients send them."""
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
        if isinstance(refers := new.get("$ref"), str):
            new["$ref"] = self._within(refers)
        if isinstance(anchor := new.pop("$dynamicAnchor", None), str):
            new.setdefault("$anchor", anchor)
        new.pop("$recursiveAnchor", None)
        for name in UNHELD:  # where no second anchor has the name, it works like `$ref`
            refers = new.get(name)
            if not isinstance(refers, str) or "$ref" in new:
                continue
            if f"#{refers.partition('#')[2]}" not in self._dynamic:
                new["$ref"] = new.pop(name)
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

    def _drop_unused(self, new: Schema) -> None:
        """Remove definitions that nothing refers to."""
        for name in DEFINITIONS:
            if isinstance(parts := new.get(name), dict) and not self._refers_otherwise:
                new[name] = {k: v for k, v in parts.items() if k in self._referred}

    def _drop_idle(self, new: Schema) -> None:
        """Remove keywords that require nothing."""
        idle = {
            "uniqueItems": new.get("uniqueItems") is False or new.get("maxItems") in (0, 1),
            "if": not {"then", "else"} & new.keys(),
            "not": new.get("not") is False,
            "contains": new.get("minContains") == 0 and "maxContains" not in new,
        }
        applied = {"allOf", "anyOf", "oneOf", "$ref", "if", "contains"} & new.keys()
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
                if new.get("additionalProperties") is False:  # or no such name could occur
                    new["additionalProperties"] = patterns[pattern]
                self._gap(f"{path}patternProperties.{pattern}", error)

    def _check_values(self, new: Schema, path: str) -> bool:
        """Whether the values may be of the types; if not, they count, unless it is a branch."""
        name, kinds = "enum" if "enum" in new else "const", as_list(new.get("type", []))
        values = new["enum"] if "enum" in new else [new.get("const")]
        if name not in new or not kinds or not isinstance(values, list):
            return True
        if not any(is_of(value, kind) for value in values for kind in kinds):
            if re.search(r"(any|one)Of\[\d+\]\.$", path):
                return False  # others may be satisfied
            del new["type" if values else name]
            self._gap(f"{path}{name}", "no value has the type")
        return True

    def _gap(self, path: str, why: str = "") -> None:
        self.gaps.append(path.removesuffix(".") or "the schema")
        self.why = why or self.why


def _depth(value: object) -> int:
    """How deep lists and objects are nested; stops counting past what is allowed."""
    level, depth = [value], 0
    while level and depth <= MAX_DEPTH:
        inner = [list(v.values()) if isinstance(v, dict) else v for v in level]
        level = [x for v in inner if isinstance(v, list) for x in v]
        depth += 1
    return depth
