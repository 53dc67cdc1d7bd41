"""Tool calls out of text that is still being written, in time linear in the text.

One state machine reads both spellings, Mistral's array behind `[TOOL_CALLS]` and objects in
`<tool_call>` tags, for both are JSON objects with a name and arguments, and all that lies between
them is ignored. Arguments are passed on as the model wrote them. Streams and whole answers are
read by the same code, so that they cannot differ.
"""

import json
from dataclasses import dataclass

from opennemo.tokenizer.messages import hash_id


@dataclass(kw_only=True)
class Call:
    """A call, or with `id` and `name` empty, what has come of one since."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


class CallParser:
    """Feed it text; it tells of calls. `key` makes ids differ between requests."""

    def __init__(self, key: str):
        self._key, self._index = key, -1
        self._depth = 0  # of braces and brackets inside a call; 0: between calls
        self._in_string = self._escaped = False
        self._field: str | None = None  # the one whose value is being read
        self._name, self._raw, self._pending = "", [], []
        self._n_arguments = 0

    def feed(self, text: str) -> list[Call]:
        """Read on. A new call is told of once its name is known; its arguments as they come."""
        news: list[Call] = []
        for char in text:
            if self._depth == 0:
                if char == "{":
                    self._depth, self._field, self._name = 1, None, ""
                    self._raw, self._pending, self._n_arguments = [], [], 0
                continue
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
                self._field, self._raw = self._string(), []
                continue
            elif self._depth == 1 and char == ",":
                self._end_value(news)
                continue
            elif self._depth == 1 and char.isspace():
                continue
            (self._pending if self._field == "arguments" else self._raw).append(char)
        self._tell(news)
        return news

    def _end_value(self, news: list[Call]) -> None:
        if self._field == "name":
            self._name = self._string()
            self._index += 1
            id = hash_id(f"{self._key}/{self._index}")
            news.append(Call(index=self._index, id=id, name=self._name))
        self._tell(news)
        self._field, self._raw = None, []

    def _end_call(self, news: list[Call]) -> None:
        if self._name and not self._n_arguments:
            self._pending = ["{}"]
            self._tell(news)

    def _tell(self, news: list[Call]) -> None:
        if self._name and self._pending:
            news.append(Call(index=self._index, arguments="".join(self._pending)))
            self._n_arguments += len(self._pending)
            self._pending = []

    def _string(self) -> str:
        try:
            value = json.loads("".join(self._raw))
        except ValueError:
            return ""
        return value if isinstance(value, str) else ""
