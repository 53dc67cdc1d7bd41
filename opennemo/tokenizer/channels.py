"""An answer by channel: words, thinking, and calls.

An answer is one sequence of ids in which marks change the channel: `[THINK]` and `[/THINK]`, the
announcement of calls, or texts such as `<think>` in vocabularies without such tokens. One reader
follows them, id by id, so that a stream and a whole answer are split alike. A mark that is a
control token is recognised only by its id. A mark that is text is recognised at the beginning of
the words or, if it ends thinking, anywhere in the thinking.
"""

from typing import Literal

from opennemo.tokenizer.calls import CallSyntax
from opennemo.tokenizer.tokenizer import Tokenizer

Channel = Literal["text", "thinking", "calls", "mark"]
Piece = tuple[Channel, str]
"""Text of a channel, or the name of a control token among calls."""


class Channels:
    """Ids to pieces of text, each in its channel.

    Args:
        calls: how calls are written; None: calls are not parsed.
        thinking: the marks around thinking.
        begun: the prompt already opened the thinking.
        known: bytes that the first ids spell and that are left out.

    >>> channels = Channels(tokenizer, thinking=("<think>", "</think>"))
    >>> [piece for id in tokenizer.encode("<think>Hm.</think>Yes.") for piece in channels.push(id)]
    [('thinking', 'H'), ('thinking', 'm.'), ('text', 'Yes.')]
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        calls: CallSyntax | None = None,
        thinking: tuple[str, str] | None = None,
        *,
        begun: bool = False,
        known: bytes = b"",
    ):
        self.channel: Channel = "thinking" if begun else "text"
        self._calls, self._thinking = calls, thinking or ("", "")
        marks = filter(None, (*(calls.marks if calls else ()), *self._thinking))
        self._names = {tokenizer.control[m]: m for m in marks if m in tokenizer.control}
        announcement = calls.marks[0] if calls else ""
        texts = (announcement, *self._thinking)
        self._announcement, self._open, self._close = (
            "" if mark in tokenizer.control else mark for mark in texts
        )
        # The first text of its channel; white space beside tags is not part of it.
        self._is_first, self._trims = True, begun and self._thinking[0][:1] == "<"
        self._tokenizer, self._stream, self._held = tokenizer, tokenizer.stream(known), ""

    def push(self, id: int) -> list[Piece]:
        """The pieces that this id completes; text that may begin a mark is held back."""
        if (mark := self._names.get(id)) is None:
            return self._read(self._stream.push(id))
        pieces = self.flush()
        self._stream = self._tokenizer.stream()
        self._enter(mark)
        return [*pieces, ("mark", mark)] if self.channel == "calls" else pieces

    def flush(self) -> list[Piece]:
        """The text that was held back, at the end."""
        return self._read(self._stream.flush(), last=True)

    def _enter(self, mark: str) -> None:
        """Switch to the channel that a mark begins; no mark ends calls."""
        opening, closing = self._thinking
        if self.channel == "calls":
            return
        if self._calls and mark == self._calls.marks[0]:
            self.channel = "calls"
        elif mark in (opening, closing):
            self.channel = "thinking" if mark == opening else "text"
            self._is_first, self._trims = True, mark[0] == "<"

    def _read(self, text: str, *, last: bool = False) -> list[Piece]:
        pieces: list[Piece] = []
        text, self._held = self._held + text, ""
        while text:
            channel, is_first = self.channel, self._is_first
            if channel != "calls" and is_first and self._trims:
                text = text.lstrip()
            if channel == "text" and is_first:
                tags = [tag for tag in (self._announcement, self._open) if tag]
                if tag := next((tag for tag in tags if text.startswith(tag)), None):
                    text = text.removeprefix(tag)
                    self._enter(tag)
                    continue
                if not last and any(tag.startswith(text) for tag in tags):
                    self._held = text
                    break
            elif channel == "thinking" and self._close:
                before, tag, behind = text.partition(self._close)
                if not tag and not last:
                    n = overlap(text, self._close)
                    before, self._held = text[: len(text) - n], text[len(text) - n :]
                if before:
                    pieces.append((channel, before))
                    self._is_first = False
                if not tag:
                    break
                text = behind
                self._enter(tag)
                continue
            if text:
                pieces.append((channel, text))
                self._is_first = False
            break
        return pieces


def overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` with which `mark` begins, the whole mark left out."""
    return next(n for n in range(min(len(text), len(mark) - 1), -1, -1) if text.endswith(mark[:n]))
