"""Fields of requests that fix the form of an answer, as the kind of a grammar and its source.

They ask for a guarantee, so every protocol applies or refuses each of them.
"""

import json
from collections.abc import Mapping
from typing import Any

from opennemo.engine.grammar import Kind
from opennemo.errors import InvalidRequest

Format = tuple[Kind, str]
STRUCTURES: dict[str, Kind] = {  # vLLM's names -> ours
    "json": "json_schema",
    "json_object": "json_object",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
}
GUIDED: dict[str, Kind] = {  # fields of other servers
    **{f"guided_{name}": kind for name, kind in STRUCTURES.items()},  # vLLM until 0.12, and NIM
    "regex": "regex",  # SGLang
    "ebnf": "grammar",
    "json_schema": "json_schema",  # SGLang and llama.cpp
    "grammar": "grammar",  # llama.cpp
}
# They also ask for a form, which our grammars cannot express.
REFUSED = ("guided_whitespace_pattern", "structural_tag", "guided_decoding", "grammar_triggers")
FIELDS = frozenset({*GUIDED, *REFUSED, "nvext"})


def guided(fields: Mapping[str, Any]) -> Format | None:
    """Other servers' fields: `guided_json` and the like, also in `nvext`, `regex`, `grammar`, ...

    Raises:
        InvalidRequest: one that cannot be applied, or two that differ.
    """
    nvext = fields.get("nvext") or {}
    if not isinstance(nvext, dict):
        raise InvalidRequest("nvext: must be an object")
    if other := sorted(k for k in nvext if not k.startswith("guided_")):
        raise InvalidRequest(f"nvext.{other[0]}: is not supported, only nvext.guided_* is")
    given = [(name, value) for name, value in fields.items() if name in FIELDS - {"nvext"}]
    given += [(f"nvext.{k}", v) for k, v in nvext.items()]
    formats = {_named(name, value) for name, value in given if value not in (None, False)}
    return only(formats - {None})


def _named(name: str, value: Any) -> Format | None:
    bare = name.removeprefix("nvext.")
    if bare == "guided_decoding_backend":  # there is only one
        return None
    if bare not in GUIDED:
        raise InvalidRequest(f"{name}: the server cannot enforce this")
    kind = GUIDED[bare]
    if kind in ("json_object", "json_schema") and value is True:
        return "json_object", ""
    return kind, _source(name, kind, value)


def _source(name: str, kind: Kind, value: Any) -> str:
    expected = {"json_schema": (dict, str), "choice": (list,)}.get(kind, (str,))
    if not isinstance(value, expected):
        what = {"json_schema": "a JSON schema", "choice": "a list of strings"}.get(kind, "a string")
        raise InvalidRequest(f"{name}: must be {what}")
    return value if isinstance(value, str) else json.dumps(value)


def only(formats: set[Any]) -> Format | None:
    """The one format that a request asks for, from any of its fields."""
    if len(formats - {None}) > 1:
        raise InvalidRequest("the request asks for two forms of the answer: give one of them")
    return next(iter(formats - {None}), None)


def structured_outputs(options: dict[str, Any] | None) -> Format | None:
    """vLLM's `structured_outputs`."""
    if not options:
        return None
    given = {name: source for name, source in options.items() if source not in (None, False)}
    if len(given) != 1 or not given.keys() <= STRUCTURES.keys():
        raise InvalidRequest(f"structured_outputs: expected one of {', '.join(STRUCTURES)}")
    name, source = next(iter(given.items()))
    if name == "json_object":
        return "json_object", ""
    return STRUCTURES[name], _source(f"structured_outputs.{name}", STRUCTURES[name], source)


def response_format(format: dict[str, Any] | None, where: str = "response_format") -> Format | None:
    """OpenAI's `response_format`; Responses' and Anthropic's have the same types.

    llama.cpp's schema beside `json_object` counts, as do its and TGI's own types.
    """
    format = format or {}
    kind = format.get("type", "text")
    if kind == "text":
        return None
    if kind == "json_object" and not format.get("schema"):
        return "json_object", ""
    if kind in ("json_schema", "json_object", "json"):
        inner = format.get("json_schema", format)
        schema = None
        if isinstance(inner, dict):
            names = ("schema", "schema_definition", "value")
            schema = next((inner[name] for name in names if name in inner), None)
        if not isinstance(schema, dict):
            raise InvalidRequest(f"{where}.json_schema.schema: must be a JSON schema object")
        return "json_schema", json.dumps(schema)
    if kind in ("regex", "grammar"):
        value = format.get(kind, format.get("pattern", format.get("value")))
        return kind, _source(f"{where}.{kind}", kind, value)
    raise InvalidRequest(f"{where}.type: must be text, json_object or json_schema")
