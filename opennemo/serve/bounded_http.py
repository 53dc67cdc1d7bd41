"""uvicorn's HTTP protocol with bounds on headers, on idle time, and on connections.

This file changes another package. uvicorn bounds headers only with h11, which is several times
slower than httptools. With either it bounds neither the time that a head or a body may take nor a
client that does not read. At its limit of connections it refuses every new client, even if one
client holds all of them. tests/serve/test_bounded_http.py lists the internals that are used here.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from opennemo.serve.error_bodies import Refusal, dumps, error_body

MAX_HEADERS = 64 * 1024  # bytes
MAX_CONNECTIONS = 4096  # where uvicorn is given no limit
MIN_RATE = 256  # bytes a second of a body that is being received
AT_ONCE = 1 / 32  # of all connections: closed together, so that searching for them is rare
PHRASES = {400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large"}
PHRASES |= {503: "Service Unavailable"}


class BoundedHeaders(HttpToolsProtocol):
    """uvicorn's protocol with bounds on headers and bodies, in bytes and in time, and in number.

    Without them headers would fill the memory, and a client that never finishes a request, or never
    reads an answer, would keep its memory for ever. When there are too many connections, those that
    have been idle longest are closed, first those of an address that has more than a quarter of
    all. A request that is refused here gets the usual error body.
    """

    _n_head: int | None = None  # bytes of the headers being read
    _n_body = 0  # bytes that have come since the timer below began
    _reading: asyncio.TimerHandle | None = None  # until a head is complete, or a body grows
    _writing: asyncio.TimerHandle | None = None  # until the client has read some of the data

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._most, self.limit_concurrency = self.limit_concurrency or MAX_CONNECTIONS, None
        self._quiet_since = self.loop.time()  # the last head or answer

    def send_400_response(self, msg: str) -> None:
        self._refuse(Refusal(400, msg))

    def _refuse(self, refusal: Refusal) -> None:
        """Answer without the application, and close."""
        body = dumps(error_body(refusal, "")).encode()
        head = f"HTTP/1.1 {refusal.status} {PHRASES[refusal.status]}\r\nconnection: close\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        head += f"retry-after: {refusal.retry_after}\r\n" if refusal.retry_after else ""
        self.transport.write(f"{head}\r\n".encode() + body)
        self.transport.close()

    @property
    def _is_asked(self) -> bool:
        """A request is being answered, or its body is coming."""
        return self.cycle is not None and not self.cycle.response_complete

    def _make_room(self) -> None:
        """Close connections where there are too many; or this one, if all the others are busy."""
        if len(self.connections) <= self._most // 4:
            return
        others = [c for c in self.connections if isinstance(c, BoundedHeaders) and c is not self]
        quiet = [c for c in others if not c._is_asked or c.cycle.more_body]
        own = [c for c in quiet if c._address == self._address]
        if len(own) > self._most // 4:
            quiet = own
        elif len(self.connections) <= self._most:
            return
        quiet.sort(key=lambda c: (c._rank, c._quiet_since))
        for connection in quiet[: 1 + int(AT_ONCE * self._most)]:
            connection.transport.close()
        if not quiet:
            self._refuse(Refusal(503, "the server has too many connections", retry_after=1))

    @property
    def _address(self) -> str:
        return self.client[0] if self.client else ""

    @property
    def _rank(self) -> int:
        """0: no request yet; 1: its body is coming; 2: it was answered, and may send another."""
        return 0 if self.cycle is None else 1 if self._is_asked else 2

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._reading = self._later(self._still_reading)
        self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._reading, self._writing):
            if timer:
                timer.cancel()
        # Else the timer of a connection that was reset keeps it, and its body, for 75 seconds.
        self._unset_keepalive_if_required()

    def on_message_begin(self) -> None:
        self._n_head = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._n_head, self._quiet_since = None, self.loop.time()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.transport.is_closing():
            return
        self._n_body += len(data)
        if self._n_head is not None:
            self._n_head += len(data)
            if self._n_head > MAX_HEADERS:
                self._refuse(Refusal(431, f"headers may have {MAX_HEADERS:,} bytes"))
        is_asked = self._is_asked
        if self._reading and is_asked and self._n_head is None and not self.cycle.more_body:
            self._reading.cancel()
            self._reading = None
        if not self._reading and (not is_asked or self.cycle.more_body):
            self._n_body, self._reading = 0, self._later(self._still_reading)

    def _later(self, call: Callable[[], None]) -> asyncio.TimerHandle:
        return self.loop.call_later(self.timeout_keep_alive, call)

    def _still_reading(self) -> None:
        """Give up on a head that is still incomplete, or a body that has hardly grown."""
        is_coming = self._n_body >= MIN_RATE * self.timeout_keep_alive
        is_body = self._is_asked and self._n_head is None
        if self.flow.read_paused or (is_body and is_coming):  # the server itself may have paused
            self._n_body, self._reading = 0, self._later(self._still_reading)
            return
        if is_body or self._n_head:
            self._refuse(Refusal(408, "the request did not come to its end in time"))
            self._later(self.transport.abort)  # if the client does not read it
        else:
            self.transport.abort()

    def timeout_keep_alive_handler(self) -> None:
        self.transport.abort()  # `close` would wait for a client that does not read

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing = self._later(self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._writing:
            self._writing.cancel()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._quiet_since = self.loop.time()
        if self.transport.is_closing():
            self._writing = self._later(self.transport.abort)
