"""An answer on its way: from the engine's events to text, for a thread or an event loop.

`for piece in reply` waits for text; `async for pieces in reply.pieces()` does so without blocking
and tells more. Between ids and text stand whole UTF-8 characters, stop strings (which may lie
across tokens) and the place where tool calls begin. What the text means is not known here.
"""

import asyncio
import queue
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from opennemo.engine import Engine, Event
from opennemo.errors import OpenNemoError
from opennemo.tokenizer import Tokenizer
from opennemo.tokenizer.chat import Message, parse_reply

TAG = "<tool_call>"  # announces a call where the vocabulary has no token for it


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What is new of one of the answers to a request."""

    index: int
    text: str
    is_call: bool  # the text is that of tool calls, behind what announces them
    event: Event  # with the token and its log-probabilities
    finish_reason: str | None  # "stop", "length" or "cancelled", on the last piece


class Answer:
    """One answer as it grows.

    Attributes:
        ids: token ids so far, EOS included.
        finish_reason: "stop", "length" or "cancelled" once the answer has ended.
        stopped_by: the stop string that ended it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...], calls: int | str | None):
        self.ids: list[int] = []
        self.finish_reason: str | None = None
        self.n_cached_tokens = 0
        self._stream = TextStream(tokenizer, stop, calls)
        self._pieces: list[str] = []

    def take(self, event: Event) -> Piece:
        """Book an event, and tell what it brought."""
        self.n_cached_tokens = event.n_cached_tokens
        if event.error:
            self.finish_reason = "error"
            error = event.error
            raise OpenNemoError(error) if isinstance(error, str) else error
        text = ""
        if event.token is not None:
            self.ids.append(event.token)
            text = self._stream.push(event.token)
        if self._stream.stopped:
            self.finish_reason = "stop"
        elif event.finish_reason:
            self.finish_reason = event.finish_reason
            text += self._stream.flush()
        self._pieces.append(text)
        return Piece(
            index=event.index,
            text=text,
            is_call=self._stream.calling,
            event=event,
            finish_reason=self.finish_reason,
        )

    @property
    def stopped_by(self) -> str | None:
        return self._stream.stopped

    @property
    def text(self) -> str:
        return "".join(self._pieces)


class Reply:
    """An answer on its way: iterate for its text, piece by piece; the whole is there afterwards.

    Of several answers (`n`), iteration gives the first's text; `answers` has them all, and
    `pieces` tells of each.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        engine: Engine,
        prompt_ids: list[int],
        n: int,
        stop: tuple[str, ...],
        calls: int | str | None,
    ):
        self.id = 0  # the engine's, once it is submitted
        self.prompt_ids = prompt_ids
        self.answers = [Answer(tokenizer, stop, calls) for _ in range(min(max(n, 1), 100))]
        self._tokenizer, self._engine, self._may_call = tokenizer, engine, calls is not None
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._wake: Callable[[], object] | None = None

    def listen(self, event: Event) -> None:
        """Take an event from the engine, on its thread."""
        self._events.put(event)
        if self._wake is not None:
            with suppress(RuntimeError):  # the event loop is closed already
                self._wake()

    def __iter__(self) -> Iterator[str]:
        """Pieces of text as they come, never empty. Ends early at a stop string.

        Raises:
            OpenNemoError: the engine could not finish the answer.
        """
        while not self.finished:
            piece = self._take(self._events.get())
            if piece and piece.text and piece.index == 0:
                yield piece.text

    async def pieces(self, idle: float = 1e9) -> AsyncGenerator[list[Piece], None]:
        """What has come since the last time, of all answers; [] when nothing did for `idle` s.

        Raises:
            OpenNemoError: the engine could not finish an answer.
        """
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()
        self._wake = lambda: arrived.is_set() or loop.call_soon_threadsafe(arrived.set)
        while not self.finished:
            arrived.clear()  # before looking, so that what comes now wakes us again
            pieces = []
            while not self._events.empty() and not self.finished:
                if piece := self._take(self._events.get_nowait()):
                    pieces.append(piece)
            if not pieces:
                timer = loop.call_later(idle, arrived.set)
                await arrived.wait()
                timer.cancel()
                if not self._events.empty():
                    continue
            yield pieces

    def _take(self, event: Event) -> Piece | None:
        answer = self.answers[event.index]
        if answer.finish_reason:  # the engine had not heard yet of the stop string
            return None
        piece = answer.take(event)
        if answer.stopped_by:
            with suppress(OpenNemoError):  # the engine has stopped
                self._engine.cancel(self.id, event.index)
        return piece

    def cancel(self) -> None:
        """Give up: the engine stops at its next step, and the text so far is all there is."""
        with suppress(OpenNemoError):  # the engine has stopped
            self._engine.cancel(self.id)

    def finish(self) -> "Reply":
        """Wait for the end."""
        for _ in self:
            pass
        return self

    @property
    def finished(self) -> bool:
        return all(answer.finish_reason for answer in self.answers)

    @property
    def n_prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    @property
    def n_cached_tokens(self) -> int:
        """How much of the prompt was in the cache."""
        return max(answer.n_cached_tokens for answer in self.answers)

    @property
    def ids(self) -> list[int]:
        """Token ids of the (first) answer so far, EOS included."""
        return self.answers[0].ids

    @property
    def finish_reason(self) -> str | None:
        """ "stop", "length" or "cancelled" once the (first) answer has ended."""
        return self.answers[0].finish_reason

    @property
    def text(self) -> str:
        """The whole text; waits for the end."""
        return self.finish().answers[0].text

    @property
    def message(self) -> Message:
        """The whole answer as an OpenAI message, tool calls parsed; waits for the end."""
        text = self.text
        if self._may_call:
            message = parse_reply(self._tokenizer, self.ids, request_id=str(self.id))
            if message.get("tool_calls"):
                return message
        return {"role": "assistant", "content": text}


class TextStream:
    """Turns ids into text as they come, and ends it before the first stop string.

    Text that could be the beginning of a stop string is held back until it is decided. Behind
    what announces tool calls, a control id or a tag at the beginning, nothing ends the text.

    >>> stream = TextStream(tokenizer, stop=("END",))
    >>> [stream.push(id) for id in tokenizer.encode("the E of END.")]
    ['the', '', ' E of', ' ', '']
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: tuple[str, ...] = (), calls: int | str | None = None
    ):
        self.stopped: str | None = None  # by this stop string
        self.calling = False
        self._stop = tuple(s for s in stop if s)
        self._calls = calls
        self._tag_id = tokenizer.control.get(calls) if isinstance(calls, str) else calls
        self._stream = tokenizer.stream()
        self._held = ""

    def push(self, id: int) -> str:
        if id == self._tag_id and self._calls is not None:
            self.calling = True
        return self._release(self._stream.push(id))

    def flush(self) -> str:
        """What was still held back, at the end of the answer."""
        self._calls = None
        piece = self._release(self._stream.flush())
        held, self._held = self._held, ""
        return piece if self.stopped else piece + held

    def _release(self, piece: str) -> str:
        if self.stopped:
            return ""
        if isinstance(self._calls, str) and not self.calling:
            piece, self._held = self._held + piece, ""
            if self._calls.startswith(piece):
                self._held = piece * (piece != self._calls)
                self.calling = piece == self._calls
                return ""
            self.calling = piece.startswith(self._calls)
            if self.calling:
                return piece.removeprefix(self._calls)
            self._calls = None  # it begins with other words, so no calls follow
        text, self._held = self._held + piece, ""
        if not self._stop or self.calling:
            return text
        found = [(at, s) for s in self._stop if (at := text.find(s)) >= 0]
        if found:
            at, self.stopped = min(found)
            return text[:at]
        hold = max(_overlap(text, s) for s in self._stop)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next(n for n in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:n]))
