"""uvicorn's HTTP protocol with bounds on headers, in bytes and in time, and on standing still.

A change of another package: uvicorn bounds headers only with h11, which is some times slower than
httptools, and with neither how long a head may take, or a client that does not read. What this
file uses of uvicorn's internals is listed in tests/serve/test_bounded_http.py.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from opennemo.serve.error_bodies import Refusal, dumps, error_body

MAX_HEADERS = 64 * 1024  # bytes


class BoundedHeaders(HttpToolsProtocol):
    """uvicorn's protocol with bounds on headers, in bytes and in time, and on standing still.

    Without them headers would fill the memory, and a client that never finishes a request, or never
    reads an answer, would keep what it holds for ever. Input that
    is not HTTP gets the usual error body.
    """

    _n_head: int | None = None  # bytes of the headers being read
    _reading: asyncio.TimerHandle | None = None  # until a head is whole, or a body goes on
    _writing: asyncio.TimerHandle | None = None  # until the client has taken some of what waits

    def send_400_response(self, msg: str) -> None:
        body = dumps(error_body(Refusal(400, msg), "")).encode()
        head = "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._reading = self._later(self._still_reading)

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
        self._n_head = None
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._n_head is not None:
            self._n_head += len(data)
            if self._n_head > MAX_HEADERS:
                head = b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
                self.transport.write(head + b"connection: close\r\ncontent-length: 0\r\n\r\n")
                self.transport.close()
        is_asked = self.cycle is not None and not self.cycle.response_complete
        if self._reading and is_asked and self._n_head is None:
            self._reading.cancel()
            self._reading = None
        if not self._reading and (not is_asked or self.cycle.more_body):
            self._reading = self._later(self._still_reading)

    def _later(self, call: Callable[[], None]) -> asyncio.TimerHandle:
        return self.loop.call_later(self.timeout_keep_alive, call)

    def _still_reading(self) -> None:
        if self.flow.read_paused:  # the server itself has paused
            self._reading = self._later(self._still_reading)
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
        if self.transport.is_closing():
            self._writing = self._later(self.transport.abort)
