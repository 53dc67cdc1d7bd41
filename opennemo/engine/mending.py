"""Find the parts of a JSON schema that the compiler refuses, and leave them out.

Whole schemas are tried before their parts, definitions before what refers to them, so that what
is left out is as small as possible.
"""

import json
import re
from collections.abc import Callable
from typing import Any

from opennemo.engine.keywords import DEFINITIONS, MANY, NAMED, ONE, Schema, as_list, each

MAX_TRIALS = 250  # of parts of a schema, to find the one that cannot be compiled
OneOf = Callable[[list[Any], str], tuple[Any, list[Any]] | None]


def mend(
    schema: Schema, error_of: Callable[[Any], str], say_one_of: OneOf
) -> tuple[Schema, list[str], str]:
    """A schema without the parts that cannot be compiled, their paths, the compiler's last error.

    Args:
        error_of: why a schema cannot be compiled, "" if it can.
        say_one_of: gives a schema in place of the branches of a `oneOf` at a path, and its parts,
            each of which must compile.
    """
    mending = _Mending(error_of, say_one_of)
    return mending.mend_root(schema), mending.gaps, mending.why


class _Mending:
    def __init__(self, error_of: Callable[[Any], str], say_one_of: OneOf):
        self.gaps: list[str] = []
        self.why = ""
        self._error_of, self._say_one_of, self._n_trials = error_of, say_one_of, 0
        self._definitions: Schema = {}

    def mend_root(self, root: Schema) -> Schema:
        self._definitions = _definitions(root)
        if not self._try(root):
            return root
        root = dict(root)
        for keyword in DEFINITIONS:
            for name in _innermost_first(root.get(keyword), f"#/{keyword}/"):
                if self._try(mended := root[keyword][name]):
                    # It may refer to itself, and would not compile before it is mended.
                    self._definitions = _definitions({**root, keyword: {**root[keyword], name: {}}})
                    mended = self.mend(mended, f"{keyword}.{name}.")
                root[keyword] = {**root[keyword], name: mended}
                self._definitions = _definitions(root)
        return self.mend(root, "")

    def mend(self, schema: Any, path: str) -> Any:
        """A schema without the smallest parts that cannot be compiled."""
        if not (isinstance(schema, dict) and self._try(schema)):
            return schema  # the schema around it decides what false means there
        new = each(schema, path, self.mend, NAMED if path == "" else (*NAMED, *DEFINITIONS))
        if not (error := self._try(new)):
            return new
        if "oneOf" in new and (exact := self._without_one_of(new, schema["oneOf"], path)):
            return exact
        if "oneOf" in new:  # branches that may overlap: any of them instead of exactly one
            new["allOf"] = [*as_list(new.get("allOf")), {"anyOf": new.pop("oneOf")}]
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
        return {} if path else definitions

    def _without_one_of(self, schema: Schema, branches: Any, path: str) -> Schema | None:
        """The schema with other keywords in place of `oneOf`, if that can be compiled."""
        said = self._say_one_of(branches, path)
        if said is None or any(self._try(part) for part in said[1]):
            return None
        new = {k: v for k, v in schema.items() if k != "oneOf"}
        new["allOf"] = [*as_list(new.get("allOf")), said[0]]
        n_gaps = len(self.gaps)
        new = self.mend(new, path)  # there may be others within the branches
        if len(self.gaps) == n_gaps:
            return new
        del self.gaps[n_gaps:]
        return None

    def _try(self, schema: Any) -> str:
        self._n_trials += 1
        if self._n_trials > MAX_TRIALS:
            return "too many parts of it cannot be compiled"
        part = {**self._definitions, **schema} if isinstance(schema, dict) else schema
        error = self._error_of(part)
        if "too large" in error:  # the compiler finds this out late
            self._n_trials += MAX_TRIALS // 20
        return error

    def _gap(self, path: str, why: str) -> None:
        self.gaps.append(path.removesuffix(".") or "the schema")
        self.why = why or self.why


def _definitions(schema: Schema) -> Schema:
    """Definitions that references may name, under any key of the root."""
    others = {*ONE, *MANY, *NAMED}
    return {
        k: v for k, v in schema.items() if k == "$id" or (isinstance(v, dict) and k not in others)
    }


def _innermost_first(definitions: Any, prefix: str) -> list[str]:
    """Names of definitions, each after those that it refers to."""
    if not isinstance(definitions, dict):
        return []
    pattern = re.compile(f'"{re.escape(prefix)}([^"/]*)')
    inner = {name: pattern.findall(json.dumps(part)) for name, part in definitions.items()}
    order: dict[str, None] = {}
    left = [(name, False) for name in reversed(definitions)]
    seen: set[str] = set()
    while left:
        name, is_ready = left.pop()
        if is_ready:
            order[name] = None
        elif name in inner and name not in seen:
            seen.add(name)
            left += [(name, True), *((other, False) for other in inner[name])]
    return list(order)
