"""Batches: files of requests, one a line, answered side by side.

A line is a request that did not come over the network: it goes through the application like any
other, so that a batch answers whatever a route answers, errors included. Lines are OpenAI's batch
format; Mistral's, which have only a `custom_id` and a `body`, are read, too. This file does not
know where lines come from or where answers are kept: offline.py has files, worker.py a database.
"""

import asyncio
import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, get_args

from starlette.types import ASGIApp, Message

from opennemo.errors import InvalidRequest
from opennemo.serve.auth import Client
from opennemo.serve.service import INSIDE

Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/responses"]
ENDPOINTS: tuple[str, ...] = get_args(Endpoint)
AGAIN = (429, 503)  # a key's limit, a full queue, a server that sleeps: it passes


class LineError(InvalidRequest):
    """A line that is not a request; `code` is for programs."""

    def __init__(self, code: str, message: str, *, param: str | None = None, custom_id: Any = None):
        super().__init__(message)
        self.code, self.param, self.custom_id = code, param, custom_id


@dataclass(frozen=True, kw_only=True)
class Line:
    """A request; `id` is the answer's, `number` counts the lines of its file from 1."""

    id: str
    number: int
    custom_id: str
    url: str
    body: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class OutputLine:
    """A line of the output; `data` ends with a line end."""

    number: int
    ok: bool
    n_tokens: int  # generated
    data: bytes


def parse(
    raw: bytes, id: str, number: int, *, endpoint: str | None = None, model: str | None = None
) -> Line:
    """Read a line.

    Args:
        endpoint: what `url` must be; by default any of ENDPOINTS, and the first if there is none.
        model: replaces the body's.

    Raises:
        LineError: it cannot be read, or is not a request.
    """
    try:
        line = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise LineError("invalid_json_line", f"not JSON in UTF-8: {str(error)[:200]}") from None
    if not isinstance(line, dict):
        raise LineError("invalid_json_line", "must be a JSON object")
    custom_id, body = line.get("custom_id"), line.get("body")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= 512:
        raise LineError(
            "invalid_custom_id", "must be a text of 1 to 512 characters", param="custom_id"
        )

    def wrong(code: str, param: str, message: str) -> LineError:
        return LineError(code, message, param=param, custom_id=custom_id)

    url = line.get("url", endpoint or ENDPOINTS[0])
    if line.get("method", "POST") != "POST":
        raise wrong("invalid_method", "method", "must be POST")
    if url not in ENDPOINTS:
        raise wrong("invalid_url", "url", f"must be one of {', '.join(ENDPOINTS)}")
    if url != (endpoint or url):
        raise wrong("mismatched_url", "url", f"must be the batch's endpoint, {endpoint}")
    if not isinstance(body, dict):
        raise wrong("invalid_body", "body", "must be a JSON object")
    if body.get("stream"):
        raise wrong("streaming_not_supported", "body.stream", "a batch cannot be streamed")
    if model is not None:
        body["model"] = model
    return Line(id=id, number=number, custom_id=custom_id, url=url, body=body)


def output_line(
    id: str,
    number: int,
    custom_id: Any,
    *,
    status: int | None = None,
    request_id: str | None = None,
    body: Any = None,
    error: dict[str, Any] | None = None,
) -> OutputLine:
    """The output line of a request that was answered with a status, or of one that never was."""
    response = None
    if status is not None:
        response = {"status_code": status, "request_id": request_id, "body": body}
        if status != 200:
            problem = body.get("error", {}) if isinstance(body, dict) else {}
            code = problem.get("code") or problem.get("type") or "error"
            error = {"code": code, "message": problem.get("message"), "param": problem.get("param")}
    usage = (body.get("usage") if isinstance(body, dict) else None) or {}
    record = {"id": id, "custom_id": custom_id, "response": response, "error": error}
    # ASCII: many readers of lines would take a raw U+2028 for a line end.
    data = json.dumps(record, allow_nan=False, separators=(",", ":")).encode() + b"\n"
    n_tokens = usage.get("completion_tokens") or usage.get("output_tokens") or 0
    return OutputLine(number=number, ok=error is None, n_tokens=n_tokens, data=data)


class Slots:
    """How many lines may be answered at the same time; the line that waits longest is next.

    Every live request (`n_live`) takes a place from the lines, down to one, so that people do not
    wait for batches. It only decides which lines begin; those that run are left to finish.
    """

    def __init__(self, limit: int, n_live: Callable[[], int] = lambda: 0):
        self.n_taken = 0
        self._limit, self._n_live = limit, n_live
        self._turn, self._freed = asyncio.Lock(), asyncio.Event()

    async def take(self) -> None:
        async with self._turn:
            while self.n_taken >= max(1, self._limit - self._n_live()):
                self._freed.clear()
                with suppress(TimeoutError):  # live requests do not report their end
                    await asyncio.wait_for(self._freed.wait(), 0.2)
            self.n_taken += 1

    def give(self) -> None:
        self.n_taken -= 1
        self._freed.set()


async def run(
    lines: Iterable[Line | OutputLine],
    app: ASGIApp,
    client: Client,
    slots: Slots,
    save: Callable[[list[OutputLine]], None],
) -> None:
    """Answer lines, many at once, in no order.

    Args:
        lines: an OutputLine among them is saved as it is.
        save: stores answers; is called on a thread, one call at a time, with all that came during
            the last call, so that a slow disk makes few large writes and not a queue.

    Raises:
        Exception: whatever `save` raises; it stops everything.
    """
    loop = asyncio.get_running_loop()
    finished: asyncio.Queue[OutputLine | None] = asyncio.Queue(maxsize=1024)
    resume_at = 0.0

    async def begin() -> None:
        while (seconds := resume_at - loop.time()) > 0:
            await asyncio.sleep(seconds)
        await slots.take()

    async def answer(line: Line) -> None:
        nonlocal resume_at
        while True:
            try:
                status, headers, body = await ask(app, client, line)
            finally:
                slots.give()
            if status not in AGAIN:
                break
            seconds = min(float(headers.get("retry-after", 1)), 60.0)
            resume_at = max(resume_at, loop.time() + seconds)
            await begin()
        request_id = headers.get("x-request-id")
        await finished.put(
            output_line(
                line.id, line.number, line.custom_id,
                status=status, request_id=request_id, body=body,
            )
        )  # fmt: skip

    async def keep() -> None:
        more = True
        while more:
            answers = [await finished.get()]
            while not finished.empty():
                answers.append(finished.get_nowait())
            more = answers[-1] is not None
            await asyncio.to_thread(save, [answer for answer in answers if answer])

    try:
        async with asyncio.TaskGroup() as outer:
            outer.create_task(keep())
            async with asyncio.TaskGroup() as inner:
                for line in lines:
                    if isinstance(line, OutputLine):
                        await finished.put(line)
                        continue
                    await begin()
                    inner.create_task(answer(line))
            await finished.put(None)  # the last
    except BaseExceptionGroup as group:
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None


async def ask(app: ASGIApp, client: Client, line: Line) -> tuple[int, dict[str, str], Any]:
    """Send a request to the application as if it came from the network; status, headers, body."""
    data, is_read = json.dumps(line.body).encode(), False
    status, headers, parts = 500, {}, []

    async def receive() -> Message:
        nonlocal is_read
        if is_read:
            await asyncio.Event().wait()  # no client can hang up
        is_read = True
        return {"type": "http.request", "body": data, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
            headers.update(
                (k.decode("latin-1"), v.decode("latin-1")) for k, v in message["headers"]
            )
        else:
            parts.append(message.get("body", b""))

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
        "scheme": "http", "path": line.url, "raw_path": line.url.encode(), "query_string": b"",
        "root_path": "", "headers": [(b"content-type", b"application/json")],
        "client": None, "server": None, INSIDE: client,
    }  # fmt: skip
    await app(scope, receive, send)
    return status, headers, json.loads(b"".join(parts))
