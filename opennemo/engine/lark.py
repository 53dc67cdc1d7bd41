"""Lark grammars of what models write: tool calls, thinking before an answer, JSON, choices.

Lark is the language of grammars that llguidance compiles. tokenizer/calls.py knows how calls are
spelled; this file turns that into rules.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from opennemo.engine.schemas import Schema
from opennemo.errors import InvalidRequest
from opennemo.tokenizer.calls import CallSyntax

MAX_CALLS_SOURCE = 4 * 1024 * 1024  # of the grammar of all tools together
MAX_CHOICES = 10_000
MAX_CALLS = 16  # in one answer, where only tags separate calls
MAX_UNORDERED = 60  # properties of an object, as bits of a number
ANY_TEXT = "(.|\\n)*"  # as a regular expression
ANY_OBJECT: Schema = {"type": "object"}
# Models learn JSON as json.dumps writes it; other white space costs tokens and quality.
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Thinking(NamedTuple):
    """How an answer thinks before its text or calls.

    Attributes:
        opening, closing: the marks around it.
        begun: the prompt has begun the thinking, so it must end first.
        budget: tokens after which its closing mark comes, if that is a token.
    """

    opening: str
    closing: str
    begun: bool = False
    budget: int | None = None


def call_grammar(
    syntax: CallSyntax,
    tools: Sequence[Mapping[str, Any]],
    control: Collection[str],
    *,
    required: bool = True,
    text: Schema | None = None,
    parallel: bool = True,
    thinking: Thinking | None = None,
) -> str:
    """Lark source of an answer that calls declared tools with valid arguments, in a syntax.

    The answer is a call, or several if `parallel`; or, if none is `required`, text: JSON of the
    schema `text`, or by default any that cannot be mistaken for calls. `control` are the names of
    control tokens. Schemas are such as `schemas.fit` gives. Thinking may come first.

    Raises:
        InvalidRequest: there is no tool to call.
    """

    def lark(pattern: str) -> str:
        return _lark(syntax.fill(pattern, {}, control))

    instead = ""
    if not required:
        announcement = syntax.marks[0]
        anything = f"/{ANY_TEXT}/" if announcement in control else _text_without(announcement)
        # Models whose calls are named by control tokens were trained to write text before a call.
        behind = " calls?" if text is None and not syntax.is_object else ""
        instead = f" | text{behind}\ntext: {anything if text is None else json_value(text)}"
    # Small models would make calls without end where only tags separate them.
    times = "*" if syntax.is_list else f"{{0,{MAX_CALLS - 1}}}"
    many = f"({lark(syntax.separator)} call){times}" if parallel else ""
    calls = f"calls: {lark(syntax.before)} call {many} {lark(syntax.after)}"
    answer = f"answer: calls{instead}\n{calls}\n{_calls_of(syntax, tools, control)}"
    if thinking is None:
        return f"start: answer\n{answer}"
    return f"{thought_grammar(thinking, control)}\n{answer}"


def thought_grammar(thinking: Thinking, control: Collection[str]) -> str:
    """Lark of `start`: thinking between its marks, and then the `answer`."""
    opening, closing, begun, budget = thinking
    begin = f"<{bare(opening)}>" if opening in control else json.dumps(opening)
    begins, rest = "thought" if begun else f"({begin} thought)?", "answer"
    if closing in control:
        most = "" if budget is None else f"[max_tokens={budget}]"
        thought = f"thought: words <{bare(closing)}>\nwords{most}: /{ANY_TEXT}/"
    elif budget is not None:
        raise InvalidRequest(
            f"thinking budget: this model has no token for {closing}, which would end it"
        )
    else:  # it ends where its mark comes first
        thought = f"thought[lazy]: {regex(ANY_TEXT + re.escape(closing))}"
    if closing[0] == "<":
        rest = "BLANKS answer\nBLANKS: /\\s*/"
    return f"start: {begins} {rest}\n{thought}"


def _lark(pieces: list[str], arguments: str = "") -> str:
    """The result of CallSyntax.fill, in Lark; `arguments` is the rule for the arguments."""
    names = {"$arguments": arguments}
    terms = [names.get(p, f"<{bare(p)}>") if i % 2 else json.dumps(p) for i, p in enumerate(pieces)]
    return " ".join(term for term in terms if term != '""')


def _text_without(tag: str) -> str:
    """Lark of any text that does not hold the tag."""
    holding = regex(ANY_TEXT + re.escape(tag) + ANY_TEXT)
    return f"PLAIN\nPLAIN: /{ANY_TEXT}/ & ~{holding}"


def _calls_of(
    syntax: CallSyntax, tools: Sequence[Mapping[str, Any]], control: Collection[str]
) -> str:
    """Lark of `call`: a call to one of the tools; arguments in any order, if there is room."""
    if not tools:
        raise InvalidRequest("a tool call is required, but no tools are given")
    functions = [(tool["function"]["name"], tool["function"].get("parameters")) for tool in tools]
    for free in (True, False):
        values: dict[str, str] = {}  # rules of arguments by their text: many tools have the same
        rules = [f"call: {' | '.join(f'call_{i}' for i in range(len(tools)))}"]
        for i, (name, schema) in enumerate(functions):
            filled = {"$name": syntax.spell(name), "$id": ""}
            pieces = syntax.fill(syntax.call, filled, {"$arguments", *control})
            rules.append(f"call_{i}: {_lark(pieces, f'args_{i}')}")
            in_order = [f"args_{i}: {json_value(schema or ANY_OBJECT)}"]
            rules += (free and _in_any_order(i, schema, values)) or in_order
        rules += (f"{name}: {value}" for value, name in values.items())
        if sum(map(len, rules)) < MAX_CALLS_SOURCE // 4:
            break
    return "\n".join(rules)


def _in_any_order(i: int, schema: Any, values: dict[str, str]) -> list[str] | None:
    """Rules `args_i` of an object whose properties come in any order, each once at most.

    Rules that their values follow are added to `values`.

    A JSON schema says nothing about order, and models put first what was said first: forced into
    the schema's order, such a model made an eighth fewer exact calls (docs/results/training.md).
    The properties that are present are bits of a rule's parameter. None where the schema says more
    than which properties exist and which are required.
    """
    plain = {"type", "properties", "required", "title", "description", "additionalProperties"}
    if not isinstance(schema, dict) or not schema.keys() <= plain:
        return None
    properties, required = schema.get("properties"), schema.get("required") or []
    if not properties or not isinstance(properties, dict) or not isinstance(required, list):
        return None
    if not all(isinstance(name, str) and name in properties for name in required):
        return None
    if schema.get("type", "object") != "object" or len(properties) > MAX_UNORDERED:
        return None
    if schema.get("additionalProperties", True) is not False:
        return None
    if "$ref" in json.dumps(properties):  # to a definition that only the whole schema has
        return None
    bits = {name: bit for bit, name in enumerate(properties)}
    there = "true"
    for name in required:
        there = f"and(bit_set({bits[name]}), {there})"
    more = f"not(is_ones([0:{len(bits)}]))"
    items = " | ".join(
        f"{json.dumps(json.dumps(name, ensure_ascii=False) + ': ')} "
        f"{values.setdefault(json_value(properties[name]), f'value_{len(values)}')} "
        f"more_{i}::set_bit({bit}) %if bit_clear({bit})"
        for name, bit in bits.items()
    )
    return [
        f'args_{i}: "{{" item_{i}::0x0' + ("" if required else ' | "{}"'),
        f"item_{i}::_ : {items}",
        f'more_{i}::_ : "}}" %if {there} | ", " item_{i}::_ %if {more}',
    ]


def json_value(schema: Any) -> str:
    """Lark of a value; one without separators needs no style."""
    if schema is True:
        schema = {}
    if isinstance(schema, dict) and schema.get("type") not in ("string", "number", "integer"):
        schema = {**schema, "x-guidance": JSON_STYLE}
    return f"%json {json.dumps(schema)}"


def choices(value: Any) -> str:
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise ValueError("a list of one or more strings is expected")
    if len(value) > MAX_CHOICES:
        raise ValueError(f"{len(value):,} choices are given, allowed are {MAX_CHOICES:,}")
    return " | ".join(json.dumps(v) for v in value)


def regex(source: str) -> str:
    """Lark of a regular expression."""
    literal = re.sub(r"(\\.)|/", lambda m: m[1] or r"\/", source, flags=re.DOTALL)
    return f"/{literal}/".replace("\n", "\\n")


def bare(name: str) -> str:
    """The name of a control token without its brackets."""
    return name[1:-1] if name[:1] + name[-1:] in ("[]", "<>") else name
