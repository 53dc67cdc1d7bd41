"""Fields of requests that fix the form of an answer, as the kind of a grammar and its source."""

import json
from typing import Any

from opennemo.engine.grammar import Kind
from opennemo.errors import InvalidRequest

STRUCTURES: dict[str, Kind] = {  # vLLM's names -> ours
    "json": "json_schema",
    "json_object": "json_object",
    "regex": "regex",
    "choice": "choice",
    "grammar": "lark",
}


def structured_outputs(options: dict[str, Any] | None) -> tuple[Kind, str] | None:
    """vLLM's `structured_outputs`."""
    if not options:
        return None
    given = {name: source for name, source in options.items() if source not in (None, False)}
    if len(given) != 1 or not given.keys() <= STRUCTURES.keys():
        raise InvalidRequest(f"structured_outputs: expected one of {', '.join(STRUCTURES)}")
    name, source = next(iter(given.items()))
    if name == "json_object":
        return "json_object", ""
    return STRUCTURES[name], source if isinstance(source, str) else json.dumps(source)


def response_format(format: dict[str, Any] | None) -> tuple[Kind, str] | None:
    """OpenAI's `response_format`; Responses' `text.format` has the same types."""
    kind = (format or {}).get("type", "text")
    if kind == "text":
        return None
    if kind == "json_object":
        return "json_object", ""
    if kind == "json_schema":
        inner = (format or {}).get("json_schema", format)
        schema = (
            inner.get("schema", inner.get("schema_definition")) if isinstance(inner, dict) else 0
        )
        if not isinstance(schema, dict):
            raise InvalidRequest("response_format.json_schema.schema: must be a JSON schema object")
        return "json_schema", json.dumps(schema)
    raise InvalidRequest("response_format.type: must be text, json_object or json_schema")
