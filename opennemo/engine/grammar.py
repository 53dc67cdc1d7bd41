"""Answers that must follow a grammar: JSON, a JSON schema, a regex, a choice, Lark, tool calls.

llguidance does the work: a grammar, compiled against the vocabulary's bytes, tells in some tens of
microseconds which tokens may come next. Compiling happens outside the engine's step, within
bounds, and what is wrong with a grammar is told there; masks are computed while the model runs.
The engine sees only `Grammar.start()` and what `Matcher` offers.
"""

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from opennemo.errors import InvalidRequest
from opennemo.tokenizer.calls import CallSyntax, to_json

Kind = Literal["json_object", "json_schema", "regex", "choice", "lark"]

MAX_SOURCE = 64 * 1024  # characters of a grammar
MAX_DEPTH = 64  # of nested objects and lists in a schema
MAX_CHOICES = 10_000
KEPT = 256  # compiled grammars, least recently used first out

ANY_TEXT = "(.|\\n)*"  # as a regular expression
MAX_CALLS = 16  # in one answer, where nothing but tags tells calls apart
MAX_UNORDERED = 60  # properties of an object, as bits of a number
_ANY = {"type": "object"}
# Models learn JSON as json.dumps writes it; other white space costs tokens and quality.
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: LLMatcher):
        self._matcher = matcher

    def fill(self, mask: np.ndarray) -> None:
        """Set one bit in mask (ceil(V / 32),) int32 for every token that may come next."""
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)

    def advance(self, token: int) -> str | None:
        """Take the token that was chosen; returns what went wrong, if anything did."""
        return None if self._matcher.consume_token(token) else self.error

    @property
    def error(self) -> str:
        """Why nothing may follow, in one line; "" if nothing is wrong."""
        return _first_line(self._matcher.get_error())

    @property
    def complete(self) -> bool:
        """Nothing but the end may follow."""
        return self._matcher.is_stopped()


class Grammar:
    """A compiled grammar, to be shared by any number of answers."""

    def __init__(self, matcher: LLMatcher, kind: Kind, source: str):
        self._matcher = matcher
        self.definition = kind, source  # to compile it elsewhere

    def start(self) -> Matcher:
        return Matcher(self._matcher.deep_copy())


class GrammarCompiler:
    """Compiles grammars for one vocabulary.

    Args:
        tokens: bytes of every id; b"" for control tokens.
        control: name -> id of the control tokens. In Lark they are written `<NAME>`, Mistral's
            square brackets included: `<TOOL_CALLS>`.
        eos_id: the id that ends an answer.
        encode: text to ids; where a grammar leaves no choice, it asks for these.
    """

    def __init__(
        self,
        tokens: Sequence[bytes],
        control: Mapping[str, int],
        eos_id: int,
        encode: Callable[[str], list[int]] | None = None,
    ):
        self._vocabulary = LLTokenizer(
            TokenizerWrapper(_Vocabulary(tokens, control, eos_id, encode))
        )
        self.compile = lru_cache(KEPT)(self._compile)

    def _compile(self, kind: Kind, source: str = "") -> Grammar:
        """Compile a grammar; `compile` is this with a memory of the last `KEPT` results.

        Args:
            kind: what `source` is: a JSON schema, a regex, a JSON list of strings to choose from,
                or a Lark grammar. For any JSON object it is not needed.

        Raises:
            InvalidRequest: too large, too deep, or not understood; with llguidance's own words.
        """
        if len(source) > MAX_SOURCE:
            raise InvalidRequest(
                f"the {kind} has {len(source):,} characters, allowed are {MAX_SOURCE:,}"
            )
        try:
            text = _to_llguidance(kind, source)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"the {kind} is not valid: {error}") from None
        matcher = LLMatcher(
            self._vocabulary, text, log_level=0, limits=LLParserLimits(verbose_errors=False)
        )
        if matcher.is_error():
            raise InvalidRequest(f"the {kind} is not valid: {_first_line(matcher.get_error())}")
        return Grammar(matcher, kind, source)


def call_grammar(
    syntax: CallSyntax,
    tools: Sequence[Mapping[str, Any]],
    control: Collection[str],
    *,
    required: bool = True,
    text: str | None = None,
    parallel: bool = True,
) -> str:
    """Lark source of an answer that calls declared tools with valid arguments, in a syntax.

    The answer is a call, or several if `parallel`; or, if none is `required`, `text`, which is
    Lark as well, by default any that cannot be mistaken for calls. `control` are the names of
    control tokens.

    Raises:
        InvalidRequest: there is no tool to call.
    """

    def lark(pattern: str) -> str:
        return _lark(syntax.fill(pattern, {}, control))

    instead = ""
    if not required:
        announcement = syntax.marks[0]
        anything = f"/{ANY_TEXT}/" if announcement in control else _text_without(announcement)
        instead = f" | text\ntext: {text or anything}"
    # Small models would go on calling for ever where nothing but tags tells calls apart.
    times = "*" if syntax.is_list else f"{{0,{MAX_CALLS - 1}}}"
    many = f"({lark(syntax.separator)} call){times}" if parallel else ""
    calls = f"calls: {lark(syntax.before)} call {many} {lark(syntax.after)}"
    return f"start: calls{instead}\n{calls}\n{_calls_of(syntax, tools, control)}"


def _lark(pieces: list[str], arguments: str = "") -> str:
    """What CallSyntax.fill gives, in Lark; `arguments` is the rule for them."""
    names = {"$arguments": arguments}
    terms = [
        names.get(p, f"<{_bare(p)}>") if i % 2 else json.dumps(p) for i, p in enumerate(pieces)
    ]
    return " ".join(term for term in terms if term != '""')


def _text_without(tag: str) -> str:
    """Lark of any text that does not hold the tag."""
    literal = re.escape(tag).replace("/", r"\/")
    return f"PLAIN\nPLAIN: /{ANY_TEXT}/ & ~/{ANY_TEXT}{literal}{ANY_TEXT}/"


def _calls_of(
    syntax: CallSyntax, tools: Sequence[Mapping[str, Any]], control: Collection[str]
) -> str:
    """Lark of `call`: a call to one of the tools; arguments in any order, if there is room."""
    if not tools:
        raise InvalidRequest("a tool call is required, but no tools are given")
    functions = [(tool["function"]["name"], tool["function"].get("parameters")) for tool in tools]
    for free in (True, False):
        rules = [f"call: {' | '.join(f'call_{i}' for i in range(len(tools)))}"]
        for i, (name, schema) in enumerate(functions):
            values = {"$name": to_json(name), "$id": ""}
            pieces = syntax.fill(syntax.call, values, {"$arguments", *control})
            rules.append(f"call_{i}: {_lark(pieces, f'args_{i}')}")
            rules += (free and _in_any_order(i, schema)) or [f"args_{i}: {_json(schema or _ANY)}"]
        if sum(map(len, rules)) < 3 * MAX_SOURCE // 4:  # what else there is comes on top
            break
    return "\n".join(rules)


def _in_any_order(i: int, schema: Any) -> list[str] | None:
    """Rules `args_i` of an object whose properties come as the model likes, each once at most.

    A JSON schema says nothing of order, and models put first what was said first: held to the
    schema's order, one that had learnt so made an eighth fewer exact calls (docs/log.md). The
    properties that are there are bits of a rule's parameter. None where the schema says more than
    which properties there are and which must be.
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
        f"v_{i}_{bit} more_{i}::set_bit({bit}) %if bit_clear({bit})"
        for name, bit in bits.items()
    )
    values = (f"v_{i}_{bit}: {_json(properties[name])}" for name, bit in bits.items())
    return [
        f'args_{i}: "{{" item_{i}::0x0' + ("" if required else ' | "{}"'),
        f"item_{i}::_ : {items}",
        f'more_{i}::_ : "}}" %if {there} | ", " item_{i}::_ %if {more}',
        *values,
    ]


def _json(schema: Any) -> str:
    """Lark of a value; what has no separators needs no style."""
    if isinstance(schema, dict) and schema.get("type") not in ("string", "number", "integer"):
        schema = {"x-guidance": _JSON_STYLE, **schema}
    return f"%json {json.dumps(schema)}"


class _Vocabulary:
    """What LLTokenizer asks of a tokenizer."""

    bos_token_id = None

    def __init__(
        self,
        tokens: Sequence[bytes],
        control: Mapping[str, int],
        eos_id: int,
        encode: Callable[[str], list[int]] | None,
    ):
        self.eos_token_id, self.special_token_ids = eos_id, list(control.values())
        self.tokens = list(tokens)
        self._single = {token[0]: id for id, token in enumerate(tokens) if len(token) == 1}
        self._encode = encode
        for name, id in control.items():
            self.tokens[id] = f"<{_bare(name)}>".encode()

    def __call__(self, text: bytes | str) -> list[int]:
        """Ids of text that a grammar forces, the model's own spelling of it if `encode` is known.

        Byte by byte would be as valid, but takes several times the steps, and models that are made
        to spell what they never spelt go on badly.
        """
        data = text if isinstance(text, bytes) else text.encode()
        if self._encode is not None:
            return self._encode(data.decode("utf-8", "replace"))
        return [self._single[byte] for byte in data if byte in self._single]


def _to_llguidance(kind: Kind, source: str) -> str:
    if kind == "regex":
        return LLMatcher.grammar_from_regex(source)
    if kind == "lark":
        return LLMatcher.grammar_from_lark(source)
    if kind == "json_object":
        return LLMatcher.grammar_from_json_schema({"type": "object", "x-guidance": _JSON_STYLE})
    value = json.loads(source)
    if kind == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
            raise ValueError("a list of one or more strings is expected")
        if len(value) > MAX_CHOICES:
            raise ValueError(f"{len(value):,} choices are given, allowed are {MAX_CHOICES:,}")
        options = " | ".join(json.dumps(v) for v in value)
        return LLMatcher.grammar_from_lark(f"start: {options}")
    if not isinstance(value, dict):
        raise ValueError("a JSON object is expected")
    if _depth(value) > MAX_DEPTH:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    return LLMatcher.grammar_from_json_schema({"x-guidance": _JSON_STYLE, **value})


def _bare(name: str) -> str:
    """The name of a control token without its brackets."""
    return name[1:-1] if name[:1] + name[-1:] in ("[]", "<>") else name


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:300]


def _depth(value: object) -> int:
    """How deep lists and objects are nested; stops counting past what is allowed."""
    level, depth = [value], 0
    while level and depth <= MAX_DEPTH:
        inner = [list(v.values()) if isinstance(v, dict) else v for v in level]
        level = [x for v in inner if isinstance(v, list) for x in v]
        depth += 1
    return depth
