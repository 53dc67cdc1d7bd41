"""An answer in progress: the engine's tokens, with their text, for a thread or an event loop.

`for text in reply` waits for text; `async for tokens in reply.tokens()` does so without blocking
and gives the tokens of all answers. Between ids and text this file handles incomplete UTF-8
characters, stop strings (which may span tokens) and the marks around thinking and tool calls.
"""

import asyncio
import queue
import secrets
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace

from opennemo.engine import Engine, Token
from opennemo.engine.token import TokenLogprobs
from opennemo.errors import OpenNemoError
from opennemo.tokenizer import Tokenizer
from opennemo.tokenizer.calls import Call, CallParser, CallSyntax
from opennemo.tokenizer.channels import Channels, Piece, overlap
from opennemo.tokenizer.chat import Message, is_thinking, parse_reply


@dataclass
class Answer:
    """One answer, or a part of one: what its tokens add up to."""

    tokens: list[Token] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        """Token ids, EOS included."""
        return [token.id for token in self.tokens if token.id is not None]

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)

    @property
    def thinking(self) -> str:
        """What the model thought before its words, without the marks around it."""
        return "".join(token.thinking for token in self.tokens)

    @property
    def logprobs(self) -> list[TokenLogprobs]:
        """Log-probabilities of its tokens, where the request asked for them."""
        return [token.logprobs for token in self.tokens if token.logprobs is not None]

    @property
    def calls(self) -> list[Call]:
        """Tool calls, each with its arguments so far."""
        calls: list[Call] = []
        for call in (call for token in self.tokens for call in token.calls):
            if call.name:
                calls.append(replace(call))
            else:
                calls[-1].arguments += call.arguments
        return calls

    @property
    def finish_reason(self) -> str | None:
        """ "stop", "length", "cancelled" or "error" once the answer has ended."""
        return self.tokens[-1].finish_reason if self.tokens else None

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended it."""
        return self.tokens[-1].stopped_by if self.tokens else None


class Reply:
    """An answer in progress: iterate for its text; afterwards all of it is available.

    Of several answers (`n`), iteration gives the first's text; `answers` has them all, and
    `tokens` gives those of each.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        engine: Engine,
        prompt_ids: list[int],
        n: int,
        stop: tuple[str, ...],
        calls: CallSyntax | None,
        thinking: tuple[str, str] | None = None,
        known: bytes = b"",
    ):
        self.id = 0  # the engine's, once it is submitted
        self.prompt_ids = prompt_ids
        n, key = min(max(n, 1), 100), secrets.token_hex(8)  # ids of calls differ between replies
        self.answers = [Answer() for _ in range(n)]
        self.not_held: tuple[str, ...] = ()  # of tools' schemas: what is left to the model
        self._begun = thinking is not None and is_thinking(tokenizer, prompt_ids)
        self._texts = [
            TextStream(tokenizer, stop, calls, thinking, begun=self._begun, known=known)
            for _ in range(n)
        ]
        self._parsers = [CallParser(calls, f"{key}/{i}") for i in range(n)] if calls else []
        self._tokenizer, self._engine = tokenizer, engine
        self._arrived: queue.SimpleQueue[Token] = queue.SimpleQueue()
        self._wake: Callable[[], object] | None = None

    def listen(self, token: Token) -> None:
        """Take a token from the engine, on its thread."""
        self._arrived.put(token)
        if self._wake is not None:
            with suppress(RuntimeError):  # the event loop is closed already
                self._wake()

    def __iter__(self) -> Iterator[str]:
        """Text as it comes, never empty. Ends early at a stop string.

        Raises:
            OpenNemoError: the engine could not finish the answer.
        """
        return (text for channel, text in self.pieces() if channel == "text")

    def pieces(self) -> Iterator[Piece]:
        """The same with the thinking before it: ("thinking", text), then ("text", text)."""
        while not self.finished:
            token = self._arrived.get()
            if self._complete(token) and token.index == 0:
                if token.thinking:
                    yield "thinking", token.thinking
                if token.text:
                    yield "text", token.text

    async def tokens(self, idle: float = 1e9) -> AsyncGenerator[list[Token], None]:
        """New tokens since the last call, of all answers; [] when none came for `idle` s.

        Raises:
            OpenNemoError: the engine could not finish an answer.
        """
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()
        self._wake = lambda: arrived.is_set() or loop.call_soon_threadsafe(arrived.set)
        while not self.finished:
            arrived.clear()  # before looking, so that what comes now wakes us again
            tokens = []
            while not self._arrived.empty() and not self.finished:
                token = self._arrived.get_nowait()
                if self._complete(token):
                    tokens.append(token)
            if not tokens:
                timer = loop.call_later(idle, arrived.set)
                await arrived.wait()
                timer.cancel()
                if not self._arrived.empty():
                    continue
            yield tokens

    def _complete(self, token: Token) -> bool:
        """Add a token, its text and its calls to its answer; False if that had ended already."""
        answer, stream = self.answers[token.index], self._texts[token.index]
        if answer.finish_reason:  # the engine did not know yet that a stop string ended it
            return False
        answer.tokens.append(token)
        if token.error:
            raise OpenNemoError(token.error) if isinstance(token.error, str) else token.error
        pieces = [] if token.id is None else stream.push(token.id)
        if stream.stopped:
            token.finish_reason, token.stopped_by = "stop", stream.stopped
            with suppress(OpenNemoError):  # the engine has stopped
                self._engine.cancel(self.id, token.index)
        elif token.finish_reason:
            pieces += stream.flush()
        for channel, text in pieces:
            if channel == "text":
                token.text += text
            elif channel == "thinking":
                token.thinking += text
            else:
                parser = self._parsers[token.index]
                read = parser.feed if channel == "calls" else parser.mark
                token.calls += tuple(read(text))
        return True

    def cancel(self) -> None:
        """Cancel: the engine stops at its next step, and the text so far is all there is."""
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
        latest = [answer.tokens[-1] for answer in self.answers if answer.tokens]
        return max((token.n_cached_tokens for token in latest), default=0)

    @property
    def ids(self) -> list[int]:
        """Token ids of the (first) answer, EOS included; waits for the end."""
        return self.finish().answers[0].ids

    @property
    def finish_reason(self) -> str | None:
        """ "stop", "length", "repetition" or "cancelled" once the (first) answer has ended."""
        return self.answers[0].finish_reason

    @property
    def calls(self) -> list[Call]:
        """The tool calls of the (first) answer, arguments as JSON; waits for the end."""
        return self.finish().answers[0].calls

    @property
    def logprobs(self) -> list[TokenLogprobs]:
        """Those of the (first) answer's tokens, if `logprobs` requested them; waits for the end."""
        return self.finish().answers[0].logprobs

    @property
    def text(self) -> str:
        """The whole text, without tool calls; waits for the end."""
        return self.finish().answers[0].text

    @property
    def message(self) -> Message:
        """The whole answer as an OpenAI message, tool calls parsed; waits for the end."""
        text = self.text
        if self._texts[0].calling:
            return parse_reply(
                self._tokenizer, self.ids, request_id=str(self.id), begun=self._begun
            )
        message: Message = {"role": "assistant", "content": text}
        if thinking := self.answers[0].thinking:
            message["reasoning_content"] = thinking
        return message


class TextStream:
    """Turns ids into pieces by channel as they come, and ends before the first stop string.

    Text that could be the beginning of a stop string is held back until that is decided. No stop
    string ends thinking or what follows the announcement of tool calls.

    >>> stream = TextStream(tokenizer, stop=("END",))
    >>> [stream.push(id) for id in tokenizer.encode("the E of END.")]
    [[('text', 'the')], [], [('text', ' E of')], [('text', ' ')], []]
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: tuple[str, ...] = (),
        calls: CallSyntax | None = None,
        thinking: tuple[str, str] | None = None,
        *,
        begun: bool = False,
        known: bytes = b"",
    ):
        self.stopped: str | None = None  # by this stop string
        self._stop = tuple(s for s in stop if s)
        self._channels = Channels(tokenizer, calls, thinking, begun=begun, known=known)
        self._held = ""

    @property
    def calling(self) -> bool:
        """Calls have been announced."""
        return self._channels.channel == "calls"

    def push(self, id: int) -> list[Piece]:
        """The pieces that this id completes."""
        return self._until_stop(self._channels.push(id))

    def flush(self) -> list[Piece]:
        """The text that was still held back at the end of the answer."""
        pieces = self._until_stop(self._channels.flush())
        return pieces if self.stopped else [*pieces, *self._release()]

    def _until_stop(self, pieces: list[Piece]) -> list[Piece]:
        before: list[Piece] = []
        for channel, piece in pieces:
            if self.stopped:
                break
            if channel != "text":
                before += [*self._release(), (channel, piece)]
                continue
            text, self._held = self._held + piece, ""
            ends = [(at, s) for s in self._stop if (at := text.find(s)) >= 0]
            if ends:
                at, self.stopped = min(ends)
                text = text[:at]
            else:
                hold = max((overlap(text, s) for s in self._stop), default=0)
                text, self._held = text[: len(text) - hold], text[len(text) - hold :]
            if text:
                before.append(("text", text))
        return before

    def _release(self) -> list[Piece]:
        held, self._held = self._held, ""
        return [("text", held)] if held else []
