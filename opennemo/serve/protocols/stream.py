"""One request while it is answered: from its tokens to the events that a client gets.

A `Generation` is read in one way only, as tokens; its `answers` are what they add up to, so that
streams and whole answers are the same. Whatever ends it (the last token, a client that hangs up, a
server that shuts down, an error), `close` runs once and frees its pages.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from opennemo.engine import Token
from opennemo.errors import OpenNemoError
from opennemo.llm import Reply
from opennemo.serve.error_bodies import Refusal, dumps, error_body, refusal

# The OpenAPI entry of a route that answers with JSON or, asked to stream, with events.
STREAMS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}


class Generation:
    """A reply on its way to a client.

    Args:
        on_close: is called once, when it is over, whatever the reason.
        keep_alive: seconds without news after which `tokens` gives an empty list.
    """

    def __init__(
        self,
        request_id: str,
        model: str,
        reply: Reply,
        on_close: Callable[["Generation"], None],
        *,
        keep_alive: float = 15,
    ):
        self.id, self.model, self.reply = request_id, model, reply
        self.created, self.started = int(time.time()), time.perf_counter()
        self.first_token_at: float | None = None
        self.last_token_at: float | None = None
        self.gaps: list[float] = []  # seconds between tokens
        self.answers = reply.answers
        self.failure: OpenNemoError | None = None
        self.headers: dict[str, str] = {}
        self.keep_stop = False  # the stop string is part of the text
        self._keep_alive, self._on_close, self._closed = keep_alive, on_close, False

    async def tokens(self) -> AsyncGenerator[list[Token], None]:
        """New tokens, again and again; [] when none came for a while.

        Raises:
            OpenNemoError: it cannot be finished.
        """
        async with aclosing(self.reply.tokens(self._keep_alive)) as batches:
            async for tokens in batches:
                for token in tokens:
                    if token.finish_reason == "cancelled":
                        raise self.failure or Refusal(499, "cancelled")
                    if self.keep_stop:
                        token.text += token.stopped_by or ""
                    if token.finish_reason == "stop" and self.answers[token.index].calls:
                        token.finish_reason = "tool_calls"
                if tokens:
                    self._note_time()
                yield tokens

    async def whole(self, receive: Receive) -> None:
        """Wait until `answers` are complete; a client that hangs up ends it at once.

        Raises:
            OpenNemoError: it cannot be finished.
        """
        watch = asyncio.create_task(self.watch(receive))
        try:
            async for _ in self.tokens():
                pass
        finally:
            watch.cancel()
            self.close()

    def abort(self, failure: OpenNemoError) -> None:
        """End it from outside: the client gets `failure`."""
        self.failure = self.failure or failure
        self.reply.cancel()

    def close(self) -> None:
        """Free its resources; safe to call twice."""
        if not self._closed:
            self._closed = True
            if not self.reply.finished:
                self.reply.cancel()
            self._on_close(self)

    def fail(self, failure: OpenNemoError) -> None:
        """Record why it failed."""
        self.failure = failure

    async def watch(self, receive: Receive) -> None:
        """Cancel it when the client hangs up."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.abort(Refusal(499, "the client hung up"))

    def _note_time(self) -> None:
        now = time.perf_counter()
        if self.first_token_at is None:
            self.first_token_at = now
        elif self.last_token_at is not None:
            self.gaps.append(now - self.last_token_at)
        self.last_token_at = now

    @property
    def n_output_tokens(self) -> int:
        return sum(len(answer.ids) for answer in self.answers)

    @property
    def n_thinking_tokens(self) -> int:
        """Output tokens that completed a piece of thinking."""
        return sum(bool(token.thinking) for answer in self.answers for token in answer.tokens)

    def usage(self) -> dict[str, Any]:
        """OpenAI's count of tokens, EOS included."""
        n_prompt, n_output = self.reply.n_prompt_tokens, self.n_output_tokens
        thought = {"completion_tokens_details": {"reasoning_tokens": self.n_thinking_tokens}}
        return (thought if self.n_thinking_tokens else {}) | {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_output,
            "total_tokens": n_prompt + n_output,
            "prompt_tokens_details": {"cached_tokens": self.reply.n_cached_tokens},
        }


class Several:
    """The generations of a request with several prompts, read as one; answers are numbered on."""

    def __init__(self, generations: list[Generation]):
        self._generations, self.headers = generations, generations[0].headers

    async def tokens(self) -> AsyncGenerator[list[Token], None]:
        """New tokens of any of them; see `Generation.tokens`."""
        news: asyncio.Queue[list[Token] | BaseException | None] = asyncio.Queue()

        async def read(generation: Generation, first: int) -> None:
            try:
                async with aclosing(generation.tokens()) as batches:
                    async for tokens in batches:
                        for token in tokens:
                            token.index += first
                        await news.put(tokens)
                await news.put(None)
            except OpenNemoError as error:
                await news.put(error)

        n = len(self._generations[0].answers)
        readers = [
            asyncio.create_task(read(generation, k * n))
            for k, generation in enumerate(self._generations)
        ]
        try:
            n_open = len(readers)
            while n_open:
                item = await news.get()
                if isinstance(item, BaseException):
                    raise item
                n_open -= item is None
                if item is not None:
                    yield item
        finally:
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)

    def fail(self, failure: OpenNemoError) -> None:
        for generation in self._generations:
            generation.fail(failure)

    def close(self) -> None:
        for generation in self._generations:
            generation.close()

    async def watch(self, receive: Receive) -> None:
        await self._generations[0].watch(receive)  # it ends when the client has hung up
        self.fail(Refusal(499, "the client hung up"))
        self.close()


class Story(Protocol):
    """How a protocol reports an answer while it comes: each method gives events as text."""

    def begin(self) -> Iterable[str]: ...

    def add(self, token: Token) -> Iterable[str]: ...

    def end(self) -> Iterable[str]: ...


class EventStream(Response):
    """A generation as server-sent events; those of tokens that came together go out together.

    A response of our own, because Starlette's would leave a generator that was never started
    unclosed, and because it watches for hang-ups itself.
    """

    def __init__(
        self, generation: Generation | Several, story: Story, *, ping: str = ": keep-alive\n\n"
    ):
        headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",  # or nginx would collect chunks
        }
        self.status_code, self.background, self._ping = 200, None, ping
        self.init_headers(headers | generation.headers)
        self._generation, self._story = generation, story

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        generation, story = self._generation, self._story
        watch = asyncio.create_task(generation.watch(receive))

        async def body(text: str, more: bool = True) -> None:
            data = text.encode("utf-8", "replace")
            await send({"type": "http.response.body", "body": data, "more_body": more})

        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                await body("".join(story.begin()))
                async with aclosing(generation.tokens()) as batches:
                    async for tokens in batches:
                        text = "".join(text for token in tokens for text in story.add(token))
                        if text or not tokens:
                            await body(text or self._ping)
                await body("".join(story.end()))
            except OpenNemoError as error:
                path, refused = scope["path"], refusal(error)
                name = "error" if path.startswith(("/v1/messages", "/v1/responses")) else None
                await body(event(error_body(refused, path), name))
                generation.fail(error)
            await body("", more=False)
        finally:
            watch.cancel()
            generation.close()


def event(data: dict[str, Any] | str, name: str | None = None) -> str:
    """One server-sent event."""
    text = data if isinstance(data, str) else dumps(data)
    return f"event: {name}\ndata: {text}\n\n" if name else f"data: {text}\n\n"
