"""How models write tool calls: one object, which layouts, parsers and grammars follow.

A `CallSyntax` is the pattern of one call and of the text around calls. From it follow what a layout
writes for earlier calls (`write`), what a grammar allows (engine/grammar.py), and how answers are
read: `CallParser` reads streams, and `read_calls` gives it whole answers and is strict, since an
answer that is not a call stays text. To add a syntax, add an object here and name it in a row of
chat_layouts.py, or, for templates, in TEMPLATE_SYNTAXES.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from opennemo.errors import InvalidRequest
from opennemo.tokenizer.messages import hash_id


@dataclass(frozen=True)
class CallSyntax:
    """How calls are written: `before`, calls with `separator` between them, `after`.

    Attributes:
        call: the pattern of a call with $name, $arguments and $id: an object in JSON, or marks
            with a bare name and id and the arguments behind the last mark.
        id: the pattern that takes the place of $id in a call that has an id; "" if ids are not
            written.
        marks: what is a control token in the patterns, or text in a vocabulary without it. The
            first announces calls.
    """

    marks: tuple[str, ...]
    call: str
    id: str = ""
    before: str = ""
    separator: str = ""
    after: str = ""

    @property
    def is_list(self) -> bool:
        """Whether one mark announces all calls, not one for each."""
        return bool(self.before)

    @property
    def is_object(self) -> bool:
        """A call is an object in JSON, its name a string in it."""
        return "{" in self.call

    @property
    def keys(self) -> dict[str, str]:
        """Key of a call's object -> name, arguments or id."""
        aliases = {"parameters": "arguments"}  # as Llama 3 has it
        return aliases | dict(re.findall(r'"(\w+)": \$(\w+)', self.call + self.id))

    def fill(
        self, pattern: str, values: Mapping[str, str], apart: Collection[str] = ()
    ) -> list[str]:
        """A pattern with values for $name and the like: text, part, text, part, ..., text.

        The parts are marks, or other strings in `apart`; values never become one.
        """
        pieces = [""]
        for part in re.split(f"({'|'.join(map(re.escape, self.marks))}|\\$[a-z]+)", pattern):
            if part in apart:
                pieces += [part, ""]
            else:
                pieces[-1] += values.get(part, part)
        return pieces

    def write(self, calls: Iterable[Mapping[str, Any]], control: Collection[str] = ()) -> list[str]:
        """Calls in OpenAI's shape as text, control token, text, control token, ..., text.

        Raises:
            InvalidRequest: the arguments cannot be written as JSON.
        """
        pieces, lead = [""], self.before
        for call in calls:
            function = call["function"]
            values = {"$name": self.spell(function["name"])}
            values |= {"$arguments": to_json(function["arguments"])}
            values |= {"$id": self.spell(call["id"])} if "id" in call else {}
            pattern = lead + self.call.replace("$id", self.id if "id" in call else "")
            first, *others = self.fill(pattern, values, control)
            pieces[-1:], lead = [pieces[-1] + first, *others], self.separator
        first, *others = self.fill(self.after, {}, control)
        return [*pieces[:-1], pieces[-1] + first, *others]

    def spell(self, name: str) -> str:
        """A name or an id as it is written in a call."""
        return to_json(name) if self.is_object else name

    def bare(self, pattern: str) -> str:
        """A pattern without marks and without blanks around it."""
        return "".join(self.fill(pattern, {}, self.marks)[::2]).strip()


# Mistral's: an array behind a control token. Version 2 writes no ids.
ARRAY_WITHOUT_IDS = CallSyntax(
    marks=("[TOOL_CALLS]",),
    before="[TOOL_CALLS][",
    call='{"name": $name, "arguments": $arguments$id}',
    separator=", ",
    after="]",
)
ARRAY = replace(ARRAY_WITHOUT_IDS, id=', "id": $id')
# Hermes', which others took over: an object in each pair of tags.
TAGS = CallSyntax(
    marks=("<tool_call>", "</tool_call>"),
    call='<tool_call>\n{"name": $name, "arguments": $arguments}\n</tool_call>',
    separator="\n",
)
# Mistral's later ones: a bare name and its arguments behind control tokens; version 11 has ids.
NAMED = CallSyntax(marks=("[TOOL_CALLS]", "[ARGS]"), call="[TOOL_CALLS]$name[ARGS]$arguments")
NAMED_WITH_IDS = CallSyntax(
    marks=("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
    call="[TOOL_CALLS]$name$id[ARGS]$arguments",
    id="[CALL_ID]$id",
)
# For models with a template: the first whose marks are control tokens that the template writes, or
# else the last.
TEMPLATE_SYNTAXES = (NAMED_WITH_IDS, NAMED, ARRAY, TAGS)


@dataclass(kw_only=True)
class Call:
    """A call, or with `id` and `name` empty, the continuation of one."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


class CallParser:
    """Reads calls from text that is still being written, in time linear in the text.

    It looks for objects in JSON that have the keys of the syntax, and passes arguments on as the
    model wrote them. It keeps the text between objects, for `read_calls` to check. Where calls are
    not objects, the marks say what follows.

    Args:
        key: what ids are made from, so that they differ between requests.

    Attributes:
        sources: the objects that are complete.
        between: texts before, between and behind the objects, one more than those.
    """

    def __init__(self, syntax: CallSyntax, key: str):
        self.sources: list[str] = []
        self.between: list[list[str]] = [[]]
        self._keys, self._key, self._index = syntax.keys, key, -1
        self._is_object, self._marks = syntax.is_object, syntax.marks
        self._source: list[str] = []
        self._depth = 0  # of braces and brackets inside a call; 0: between calls
        self._in_string = self._escaped = False
        self._field: str | None = None  # the one whose value is being read
        self._name, self._raw, self._pending = "", [], []
        self._n_arguments = 0

    def feed(self, text: str) -> list[Call]:
        """Read on. A new call comes once its name is complete, its arguments as they are read."""
        news: list[Call] = []
        if not self._is_object:
            (self._pending if self._field == "arguments" else self._raw).append(text)
            self._pass_on(news)
            return news
        for char in text:
            if self._depth == 0:
                if char != "{":
                    self.between[-1].append(char)
                    continue
                self._depth, self._field, self._name, self._source = 1, None, "", [char]
                self._raw, self._pending, self._n_arguments = [], [], 0
                continue
            self._source.append(char)
            if self._in_string:
                self._in_string = self._escaped or char != '"'
                self._escaped = char == "\\" and not self._escaped
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self._end_value(news)
                    self._end_call(news)
                    continue
            elif self._depth == 1 and char == ":":
                self._field, self._raw = self._keys.get(_string(self._raw)), []
                continue
            elif self._depth == 1 and char == ",":
                self._end_value(news)
                continue
            elif self._depth == 1 and char.isspace():
                continue
            (self._pending if self._field == "arguments" else self._raw).append(char)
        if not self._is_string_of_arguments:
            self._pass_on(news)
        return news

    def mark(self, name: str) -> list[Call]:
        """Read a control token, which text cannot spell."""
        news: list[Call] = []
        if self._is_object or name not in self._marks:
            return news
        text, self._raw = "".join(self._raw), []
        if name == self._marks[0]:
            self._field, self._name, self._pending, self._n_arguments = None, "", [], 0
        elif name == self._marks[-1] and self._field != "arguments":
            self._field, self._name = "arguments", self._name or text
            self._begin_call(news)
        else:
            self._name = self._name or text
        return news

    @property
    def unfinished(self) -> str:
        """The beginning of an object that has not ended."""
        return "".join(self._source) if self._depth else ""

    @property
    def _is_string_of_arguments(self) -> bool:
        """The arguments are an object in a string, which is passed on only when it ends."""
        return not self._n_arguments and self._pending[:1] == ['"']

    def _end_value(self, news: list[Call]) -> None:
        if self._field == "name":
            self._name = _string(self._raw)
            self._begin_call(news)
        elif self._is_string_of_arguments:
            self._pending = [_string(self._pending)]
        self._pass_on(news)
        self._field, self._raw = None, []

    def _begin_call(self, news: list[Call]) -> None:
        self._index += 1
        id = hash_id(f"{self._key}/{self._index}")
        news.append(Call(index=self._index, id=id, name=self._name))

    def _end_call(self, news: list[Call]) -> None:
        if self._name and not self._n_arguments:
            self._pending = ["{}"]
            self._pass_on(news)
        self.sources.append("".join(self._source))
        self.between.append([])

    def _pass_on(self, news: list[Call]) -> None:
        if self._name and any(self._pending):
            news.append(Call(index=self._index, arguments="".join(self._pending)))
            self._n_arguments += len(self._pending)
            self._pending = []


def read_calls(syntax: CallSyntax, *pieces: str) -> tuple[list[dict], str]:
    """The calls of a whole text behind an announcement, in OpenAI's shape, and what follows them.

    The text is given as text, control token, text, ..., text. A call has the id that the model
    wrote, or "".

    Raises:
        ValueError: they are not well-formed.
    """
    if not syntax.is_object:
        return _read_named(syntax, pieces)
    text = "".join(pieces[::2])
    parser = CallParser(syntax, "")
    parser.feed(text)
    sources, between = parser.sources, ["".join(chars) for chars in parser.between]
    between[-1] += parser.unfinished
    # Models that write calls one by one may put them into an array, too.
    array = [syntax.bare(pattern) for pattern in (syntax.before, syntax.separator, syntax.after)]
    opening, separator, closing = array if syntax.is_list else "[,]"
    n, is_array = 1, between[0].strip() == opening
    if not sources or not (is_array or between[0].isspace() or not between[0]):
        raise ValueError("it does not begin with a call")
    while is_array and n < len(sources) and between[n].strip() == separator:
        n += 1
    rest = between[n].lstrip()
    if is_array and not rest.startswith(closing):
        raise ValueError("the array of calls does not end")
    rest = rest.removeprefix(closing if is_array else "").lstrip()
    for source, text in zip(sources[n:], between[n + 1 :], strict=True):
        rest += source + text
    for mark in syntax.marks[1:]:
        rest = rest.removeprefix(mark)
    calls = [_read_call(syntax, source) for source in sources[:n]]
    return calls, rest if rest.strip() else ""


def _read_named(syntax: CallSyntax, pieces: Sequence[str]) -> tuple[list[dict], str]:
    """A call whose name, id and arguments are between marks, and the rest of the text."""
    *between, last = syntax.marks[1:]
    if list(pieces[1::2]) not in ([last], [*between, last]):
        raise ValueError(f"a call has its name, then {last}, then its arguments")
    text = pieces[-1].lstrip()
    _, end = _DECODER.raw_decode(text or "{}")
    call = {"name": pieces[0].strip(), "arguments": _from_json(text[:end] or "{}")}
    call |= {"id": pieces[2].strip()} if len(pieces) == 5 else {}
    rest = text[end:].lstrip()
    return [_to_call(call)], rest


def to_json(value: Any) -> str:
    """A value as models learn JSON; InvalidRequest if it cannot be written."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"tools or arguments: cannot be written as JSON: {error}") from None


def _read_call(syntax: CallSyntax, source: str) -> dict:
    """One call that a model wrote, in OpenAI's shape; ValueError if it is not well-formed."""
    keys = syntax.keys
    return _to_call({keys[key]: value for key, value in _from_json(source).items() if key in keys})


def _to_call(call: Mapping[str, Any]) -> dict:
    fields = {"arguments": {}, "id": ""} | dict(call)
    name, arguments, id = fields.get("name"), fields["arguments"], fields["id"]
    if not isinstance(name, str):
        raise ValueError("a call has a name")
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif not isinstance(arguments, str) or not isinstance(_from_json(arguments), dict):
        raise ValueError("arguments are an object, or a string that holds one")
    (name + arguments).encode()  # half a surrogate pair could not be sent to a client
    function = {"name": name, "arguments": arguments}
    return {"id": id if isinstance(id, str) else "", "type": "function", "function": function}


def _from_json(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


_DECODER = json.JSONDecoder()


def _string(characters: list[str]) -> str:
    try:
        value = json.loads("".join(characters))
    except ValueError:
        return ""
    return value if isinstance(value, str) else ""
