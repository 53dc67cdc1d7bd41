"""Arguments of `LLM` for Python callers, brought to one form or refused in one line."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from inspect import signature
from pathlib import Path
from typing import Any, get_args

import torch

from opennemo.engine import SamplingParams
from opennemo.engine.grammar import Kind
from opennemo.errors import InvalidRequest, Overloaded, check_names
from opennemo.reply import Reply
from opennemo.tokenizer.messages import Tool

Adapters = Mapping[str, Path | str] | Iterable[Path | str]


def answer_each(prompts: Iterable[Any], answer: Callable[[Any], Reply]) -> list[Reply]:
    """A reply to each prompt; if one is refused, the others are cancelled."""
    replies: list[Reply] = []
    try:
        for prompt in prompts:
            while True:
                try:
                    replies.append(answer(prompt))
                    break
                except Overloaded:  # the queue is full: wait for the first running reply
                    if not (waiting := [reply for reply in replies if not reply.finished]):
                        raise
                    waiting[0].finish()
    except BaseException:
        for reply in replies:
            reply.cancel()
        raise
    return replies


def adapter_folders(adapters: Adapters) -> dict[str, Path | str]:
    """Folders by the adapters' names. Raises: InvalidRequest, two have one name."""
    if isinstance(adapters, Mapping):
        return {str(name): folder for name, folder in adapters.items()}
    if isinstance(adapters, str | Path | bool):
        raise InvalidRequest(f"adapters: {adapters!r} is not a list of folders")
    named: dict[str, Path | str] = {}
    for folder in adapters:
        name = Path(folder).resolve().name
        if name in named:
            raise InvalidRequest(
                f"adapters: {named[name]} and {folder} would both be {name!r}; give names, as in "
                '{"NAME": FOLDER}'
            )
        named[name] = folder
    return named


def torch_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    allowed = ("auto", "bfloat16", "float16", "float32")
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in allowed:
        raise InvalidRequest(f"dtype: {dtype!r} is not one of {', '.join(allowed)}")
    return None if dtype == "auto" else getattr(torch, dtype)


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """What `chat` and `complete` both take besides fields of SamplingParams; see `LLM.chat`."""

    json_schema: Any = None
    format: tuple[Kind, str] | None = None
    stop: tuple[str, ...] = ()
    adapter: str | None = None
    n: int = 1
    salt: bytes = b""

    @classmethod
    def among(
        cls, options: dict[str, Any], name: str, method: Callable[..., Any]
    ) -> tuple["AnswerOptions", dict[str, Any]]:
        """These options, and those that are fields of SamplingParams.

        Raises:
            InvalidRequest: an option is neither, nor one of the method, which goes by `name`.
        """
        parameters = signature(method).parameters.values()
        own = [field.name for field in fields(cls)]
        allowed = [one.name for one in parameters if one.kind == one.KEYWORD_ONLY]
        allowed += [*own, *(field.name for field in fields(SamplingParams))]
        check_names(name, options, allowed)
        chosen = {key: options.pop(key) for key in own if key in options}
        if isinstance(stop := chosen.get("stop", ()), str):
            stop = (stop,)
        return cls(**{**chosen, "stop": tuple(stop)}), options

    def grammar(self) -> tuple[Kind, str] | None:
        """The grammar that an answer follows, from either of two ways to ask for one.

        Raises:
            InvalidRequest: both are given, or the one that is given is invalid.
        """
        format, json_schema = self.format, self.json_schema
        if json_schema is not None:
            if format is not None:
                raise InvalidRequest("format and json_schema: give one of the two")
            if hasattr(json_schema, "model_json_schema"):  # a pydantic model
                json_schema = _closed(json_schema.model_json_schema())
            if not isinstance(json_schema, dict | bool):
                raise InvalidRequest(
                    f"json_schema: {json_schema!r} is not a schema or pydantic model"
                )
            return "json_schema", json.dumps(json_schema)
        pair = isinstance(format, tuple | list) and len(format) == 2
        if format is None or (pair and format[0] in get_args(Kind) and isinstance(format[1], str)):
            return None if format is None else (format[0], format[1])
        kinds = ", ".join(kind for kind in get_args(Kind) if kind != "calls")
        raise InvalidRequest(f"format: {format!r} is not a pair of a kind ({kinds}) and its source")


def choose_tools(tools: list[Tool], choice: str | Mapping[str, Any]) -> tuple[list[Tool], bool]:
    """The tools that may be called, and whether one must be."""
    if isinstance(choice, str):
        if choice not in ("auto", "none", "required", "any"):
            allowed = "auto, none, required, any, or an object"
            raise InvalidRequest(f"tool_choice is {choice!r}, allowed are {allowed}")
        if choice in ("required", "any") and not tools:
            raise InvalidRequest("tool_choice: a tool call is required, but there are no tools")
        return [] if choice == "none" else tools, choice in ("required", "any")
    allowed = choice.get("allowed_tools", choice)
    entries = allowed.get("tools", [choice]) if isinstance(allowed, Mapping) else [choice]
    names = {_tool_name(entry) for entry in entries} if isinstance(entries, list) else set()
    chosen = [tool for tool in tools if _tool_name(tool) in names]
    if not chosen or len(chosen) < len(names):
        raise InvalidRequest(f"tool_choice: {choice} names a tool that is not declared")
    return chosen, not isinstance(allowed, Mapping) or allowed.get("mode") != "auto"


def schema_setting(kind: Kind, source: str) -> dict[str, Any]:
    """The setting that shows a model the schema of its answer."""
    if kind == "json_object":
        return {"json_schema": {"anyOf": [{"type": "object"}, {"type": "array"}]}}
    if kind != "json_schema":
        return {}
    try:
        return {"json_schema": json.loads(source)}
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the json_schema is not valid: {error}") from None


def texts_in(value: Any) -> Iterator[str]:
    """Every text in lists and objects, however deep."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            waiting += reversed([*value, *value.values()])
        elif isinstance(value, list | tuple):
            waiting += reversed(value)


def _tool_name(tool: Any) -> str:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    return str(function.get("name")) if isinstance(function, Mapping) else ""


def _closed(schema: Any) -> Any:
    """A pydantic model's schema, whose objects have only the properties that it names."""
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    named = ("properties", "$defs")
    closed = {
        key: {k: _closed(v) for k, v in value.items()} if key in named else _closed(value)
        for key, value in schema.items()
    }
    return {"additionalProperties": False, **closed} if "properties" in closed else closed
