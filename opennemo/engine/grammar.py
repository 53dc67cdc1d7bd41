"""Answers that must follow a grammar: JSON, a JSON schema, a regex, a choice, Lark, tool calls.

llguidance does the work: a grammar, compiled against the vocabulary's bytes, says in some tens of
microseconds which tokens may come next. Compiling happens outside the engine's step, within
bounds, and errors in a grammar are reported there; masks are computed while the model runs.
lark.py writes the grammars of calls and thinking; schemas.py finds what can be enforced of a JSON
schema. The engine sees only `Grammar.start()` and what `Matcher` offers.
"""

import json
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from threading import Lock
from typing import Any, Literal

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import any_to_lark

from opennemo.engine.lark import (
    ANY_OBJECT,
    JSON_STYLE,
    MAX_CALLS_SOURCE,
    Thinking,
    bare,
    call_grammar,
    choices,
    json_value,
    regex,
    thought_grammar,
)
from opennemo.engine.schemas import FittedSchema, Schema, fit
from opennemo.errors import InvalidRequest
from opennemo.tokenizer.calls import CallSyntax, to_json

Kind = Literal["json_object", "json_schema", "regex", "choice", "lark", "grammar", "calls"]

MAX_SOURCE = 64 * 1024  # characters of a grammar
MAX_SCHEMA = 512 * 1024  # of a JSON schema, whose descriptions count, too
MAX_SECONDS = 1.0  # of a thread's time, to find out what of a schema can be enforced
MAX_TOOLS_SECONDS = 2.0  # of all tools of a request; compiling the result takes as long again
MAX_RULES = 500  # of llama.cpp's grammars: translating takes the square of their number
KEPT = 256  # compiled grammars, least recently used first out
MAX_KEPT = 16 * 1024 * 1024  # characters of them together
TOO_LONG = "it takes too long to compile"
# Objects of thousands of optional properties need more than llguidance's 2,000 items in a row.
LIMITS = LLParserLimits(max_items_in_row=20_000, verbose_errors=False)


class _TakesTooLong(Exception):
    """The time to find out what can be enforced of a schema is over."""


class Matcher:
    """The state of one answer in its grammar."""

    def __init__(self, matcher: LLMatcher):
        self._matcher = matcher

    def fill(self, mask: np.ndarray) -> None:
        """Set one bit in mask (ceil(V / 32),) int32 for every token that may come next."""
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)

    def advance(self, token: int) -> str | None:
        """Take the token that was chosen; returns the error, if there is one."""
        return None if self._matcher.consume_token(token) else self.error

    def copy(self) -> "Matcher":
        """An independent copy that continues from here."""
        return Matcher(self._matcher.deep_copy())

    @property
    def error(self) -> str:
        """Why no token may follow, in one line; "" if there is no error."""
        return _first_line(self._matcher.get_error())

    @property
    def accepts(self) -> bool:
        """The answer may end here."""
        return self._matcher.is_accepting()

    @property
    def complete(self) -> bool:
        """Only the end may follow."""
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
        self._control = frozenset(control)
        self._n_words = -(-len(tokens) // 32)  # of a mask
        self._kept: OrderedDict[tuple[Kind, str], Grammar] = OrderedDict()
        self._n_kept, self._keeping = 0, Lock()
        self._error_of_part = lru_cache(4 * KEPT)(self._error_of)
        self._kept_arguments = lru_cache(4 * KEPT)(self._fit_arguments)

    def compile(self, kind: Kind, source: str = "") -> Grammar:
        """Compile a grammar, or find it among the last that were compiled; see `_compile`."""
        key = (kind, source)
        with self._keeping:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        grammar = self._compile(kind, source)
        with self._keeping:
            self._n_kept += 0 if key in self._kept else len(source)
            self._kept[key] = grammar
            while len(self._kept) > KEPT or (self._n_kept > MAX_KEPT and len(self._kept) > 1):
                self._n_kept -= len(self._kept.popitem(last=False)[0][1])
        return grammar

    def compile_after_thinking(self, kind: Kind, source: str, thinking: Thinking) -> Grammar:
        """A grammar of an answer's text, which lets it think first; see `call_grammar`.

        Raises:
            InvalidRequest: as `compile`; or a grammar in Lark would begin within thinking.
        """
        grammar = self.compile(kind, source)  # says what is wrong with it
        if kind in ("lark", "grammar"):
            if thinking.begun or thinking.budget is not None:
                raise InvalidRequest(
                    f"the {kind} would begin within thinking that is open or has a budget; "
                    "a JSON schema, a regex or a choice can follow it"
                )
            return grammar
        if kind == "regex":
            answer = regex(source)
        elif kind == "choice":
            answer = choices(json.loads(source))
        else:
            answer = json_value(self.fit(source).schema if kind == "json_schema" else ANY_OBJECT)
        thought = thought_grammar(thinking, self._control)
        return self.compile("calls", f"{thought}\nanswer: {answer}")

    def compile_calls(
        self,
        syntax: CallSyntax,
        tools: Sequence[Mapping[str, Any]],
        *,
        required: bool,
        format: tuple[Kind, str] | None = None,
        parallel: bool = True,
        thinking: Thinking | None = None,
    ) -> tuple[Grammar, tuple[str, ...]]:
        """A grammar of calls, or of text that follows `format`, unless a call is `required`.

        It may think first.

        -> the grammar, and what of the tools' schemas it does not enforce, by tool and path.

        Raises:
            InvalidRequest: a part that cannot be enforced must be, because a call is required or
                the tool is strict; or `format` is one that cannot be combined with tools.
        """
        text = None
        if format is not None and not required:
            if format[0] not in ("json_object", "json_schema"):
                raise InvalidRequest(
                    f"a {format[0]} cannot be combined with tools that may be used"
                )
            self.compile(*format)  # says what is wrong with it
            text = self.fit(format[1] or '{"type": "object"}').schema
        held, gaps, strict, started = [], [], required, time.thread_time()
        for tool in tools:
            function = tool["function"]
            must = required or function.get("strict") is True
            strict |= must
            parameters = to_json(function.get("parameters") or {})
            small = len(parameters) <= MAX_SOURCE // 4  # many of them may be kept
            if time.thread_time() - started > MAX_TOOLS_SECONDS:
                fitted = FittedSchema(dict(ANY_OBJECT), ("parameters",), TOO_LONG)
            else:
                fitted = (self._kept_arguments if small else self._fit_arguments)(parameters)
            if fitted.gaps and must:
                why = "tool_choice" if required else "strict"
                what = f"tools: {function['name']!r}: {unheld(fitted)}; {why} asks for it"
                raise InvalidRequest(what)
            gaps += [f"{function['name']}: {gap}" for gap in fitted.gaps]
            held.append({**tool, "function": {**function, "parameters": fitted.schema}})
        options: dict[str, Any] = {
            "required": required, "text": text, "parallel": parallel, "thinking": thinking,
        }  # fmt: skip
        try:
            return self.compile("calls", call_grammar(syntax, held, self._control, **options)), (
                *gaps,
            )
        except InvalidRequest as error:
            if strict:
                raise InvalidRequest(
                    f"tools: their schemas together are too much: {error}"
                ) from None
        names = [{"function": {"name": tool["function"]["name"]}} for tool in tools]
        grammar = self.compile("calls", call_grammar(syntax, names, self._control, **options))
        return grammar, ("all tools: parameters",)

    def _fit_arguments(self, source: str) -> FittedSchema:
        """`fit` for the schema of a tool's arguments: an object with only the named properties."""
        asked, gaps = json.loads(source), []
        kinds = asked.get("type", "object") if isinstance(asked, dict) else None
        if kinds == "object" or (isinstance(kinds, list) and "object" in kinds):
            asked = {k: v for k, v in asked.items() if k != "nullable"} | {"type": "object"}
        elif str(kinds).lower() != "object":
            asked, gaps = ANY_OBJECT, ["parameters.type"]
        fitted = self.fit(json.dumps(asked))
        schema: Schema = dict(fitted.schema)
        gaps += [f"parameters.{gap}" for gap in fitted.gaps]
        if schema.get("type") != "object":
            schema, gaps = dict(ANY_OBJECT), gaps or ["parameters"]
        properties = schema.get("properties")
        if properties and schema.keys() <= {"type", "properties", "required", "$defs"}:
            schema["additionalProperties"] = False
            if "$ref" not in source:  # an optional property that nothing satisfies never comes
                able = {
                    k: v for k, v in properties.items() if not self._error_of_part(json.dumps(v))
                }
                schema["properties"] = able
        return FittedSchema(schema, tuple(gaps), fitted.why)

    def fit(self, source: str) -> FittedSchema:
        """What can be enforced of a JSON schema."""
        if len(source) > MAX_SCHEMA:
            why = f"it has {len(source):,} characters, allowed are {MAX_SCHEMA:,}"
            return FittedSchema({}, ("the schema",), why)
        started = time.thread_time()

        def error_of(part: Any) -> str:
            error = self._error_of_part(json.dumps(part))
            if time.thread_time() - started > MAX_SECONDS:
                raise _TakesTooLong
            return error

        try:
            return fit(json.loads(source), error_of)
        except _TakesTooLong:
            return FittedSchema({}, ("the schema",), TOO_LONG)

    def _error_of(self, schema: str) -> str:
        started = time.thread_time()
        try:
            grammar = LLMatcher.grammar_from_json_schema(schema)
            error = LLMatcher.validate_grammar(grammar, self._vocabulary, limits=LIMITS)
        except ValueError as raised:
            error = str(raised)
        # Kept, so that asking again changes nothing.
        return TOO_LONG if time.thread_time() - started > MAX_SECONDS else _first_line(error)

    def _compile(self, kind: Kind, source: str = "") -> Grammar:
        """Compile a grammar.

        Args:
            kind: what `source` is: a JSON schema, a regex, a JSON list of strings to choose from,
                a Lark grammar, one of llama.cpp's (GBNF) or else Lark, or what `call_grammar`
                makes. For any JSON object it is not needed.

        Raises:
            InvalidRequest: too large, too deep, or not understood; with llguidance's message.
        """
        most = {"json_schema": MAX_SCHEMA, "calls": MAX_CALLS_SOURCE}.get(kind, MAX_SOURCE)
        if len(source) > most:
            raise InvalidRequest(f"the {kind} has {len(source):,} characters, allowed are {most:,}")
        try:
            text = self._to_llguidance(kind, source)
        except (ValueError, RecursionError) as error:
            what = _first_line(str(error)) or type(error).__name__
            raise InvalidRequest(f"the {kind} is not valid: {what}") from None
        matcher = LLMatcher(self._vocabulary, text, log_level=0, limits=LIMITS)
        if not matcher.is_error():  # some grammars fail only when a token is requested
            Matcher(matcher.deep_copy()).fill(np.zeros(self._n_words, np.int32))
        if matcher.is_error():
            raise InvalidRequest(f"the {kind} is not valid: {_first_line(matcher.get_error())}")
        return Grammar(matcher, kind, source)

    def _to_llguidance(self, kind: Kind, source: str) -> str:
        if kind == "regex":
            return LLMatcher.grammar_from_regex(source)
        if kind in ("lark", "calls"):
            return LLMatcher.grammar_from_lark(source)
        if kind == "grammar":
            return LLMatcher.grammar_from_lark(_to_lark(source))
        if kind == "json_object":
            return LLMatcher.grammar_from_json_schema({"type": "object", "x-guidance": JSON_STYLE})
        value = json.loads(source)
        if kind == "choice":
            return LLMatcher.grammar_from_lark(f"start: {choices(value)}")
        fitted = self.fit(source)
        if fitted.gaps:
            raise ValueError(unheld(fitted))
        return LLMatcher.grammar_from_json_schema({**fitted.schema, "x-guidance": JSON_STYLE})


def unheld(fitted: FittedSchema) -> str:
    """What of a schema cannot be enforced, and why, in a line."""
    why = f": {fitted.why}" if fitted.why else ""
    return f"{', '.join(fitted.gaps[:5])} cannot be enforced by a grammar{why}"[:500]


class _Vocabulary:
    """The interface that LLTokenizer needs of a tokenizer."""

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
            self.tokens[id] = f"<{bare(name)}>".encode()

    def __call__(self, text: bytes | str) -> list[int]:
        """Ids of text that a grammar forces, the model's own spelling of it if `encode` is known.

        Byte by byte would be valid too, but takes several times the steps, and a model continues
        badly after a spelling that it has never seen.
        """
        data = text if isinstance(text, bytes) else text.encode()
        if self._encode is not None:
            return self._encode(data.decode("utf-8", "replace"))
        return [self._single[byte] for byte in data if byte in self._single]


def _to_lark(source: str) -> str:
    """A grammar of llama.cpp's, or one that is Lark already. Raises: ValueError, it is neither."""
    if (n := source.count("::=")) > MAX_RULES:
        raise ValueError(f"it has {n:,} rules, allowed are {MAX_RULES}")
    try:
        return any_to_lark(source)
    except Exception as error:  # noqa: BLE001  it raises no other class
        raise ValueError(str(error)) from None


def _first_line(text: str) -> str:
    """An error in one line; errors about a regex name the cause in their last line."""
    lines = [line.strip() for line in text.strip().splitlines()] or [""]
    return (f"{lines[0]} {lines[-1]}" if lines[0].endswith(":") else lines[0])[:300]
