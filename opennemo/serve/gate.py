"""One gate before all routes: everything that happens to every request around its route.

The gate denies by default: every path that is not on its short open list needs a key, whether or
not there is such a route, and before a byte of the body is read. It also checks the Host header on
loopback (DNS rebinding), names each request, and writes one line of log for it, without prompts.
"""

import asyncio
import re
import secrets
import time
from contextlib import suppress
from typing import Any

import structlog
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from opennemo.serve import admin
from opennemo.serve.body_bounds import MAX_VALUES, ValueCounter
from opennemo.serve.bounded_http import MAX_HEADERS
from opennemo.serve.error_bodies import Refusal, error_response
from opennemo.serve.protocols.nim import OPEN
from opennemo.serve.service import INSIDE, Service

# Nothing inline, no other host; HTML only through the sanitizer's Trusted Types policy.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types dompurify pdf"
)
DRAINED = 4
log = structlog.get_logger("opennemo.serve")


class Gate:
    """Everything that happens to every request, before and after its route."""

    def __init__(
        self, app: ASGIApp, service: Service, is_open: frozenset[str], pages: frozenset[str]
    ):
        self._app, self._service, self._is_open, self._pages = app, service, is_open, pages
        settings = service.settings
        self._n_running, self._most = 0, settings.max_num_queued_reqs + settings.max_num_seqs + 256
        self._admin = {getattr(route, "path", "") for route in admin.router.routes}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, started, status = dict(scope["headers"]), time.perf_counter(), 500
        asked = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = (
            asked if re.fullmatch(r"[\w-]{1,128}", asked, re.ASCII) else secrets.token_hex(8)
        )
        path, begun, unsent = scope["path"], False, False

        async def reply(message: Message) -> None:
            nonlocal status, begun, unsent
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
                message["headers"] = [*message["headers"], *self._headers(path, request_id)]
            unsent = True
            await send(message)
            unsent = False

        self._n_running += 1
        try:
            client = scope.get(INSIDE)  # a line of a batch was admitted with its batch
            if client is None:
                self._check_host(headers)
                self._check_head(scope)
                client = self._identify(path, headers)
                if self._n_running > self._most and path not in OPEN:  # health checks always pass
                    raise Refusal(
                        503, "too many requests at once", code="overloaded", retry_after=1
                    )
            receive = await self._bounded(scope, headers, receive)
            scope.setdefault("state", {})["client"] = client
            await self._app(scope, receive, reply)
        except asyncio.CancelledError:
            status = 499
            raise
        except Refusal as error:
            await error_response(error, path)(scope, receive, reply)
        except Exception:
            if unsent:  # raised outside, such as by the bound on bodies, or a closed socket
                raise
            log.exception("defect", id=request_id, path=path)
            if not begun:
                error = Refusal(500, "the server has a defect; see its log")
                await error_response(error, path)(scope, receive, reply)
        finally:
            self._n_running -= 1
            if status >= 400:
                self._service.metrics.refused(status)
            log.info(
                "request", id=request_id, method=scope["method"], path=path[:200], status=status,
                seconds=round(time.perf_counter() - started, 4),
            )  # fmt: skip

    def _identify(self, path: str, headers: dict[bytes, bytes]) -> Any:
        gatekeeper = self._service.gatekeeper
        if path in self._is_open:
            return gatekeeper.anonymous
        if path in self._admin and gatekeeper.admin_digest:
            gatekeeper.check_admin(headers)
            return gatekeeper.anonymous
        return gatekeeper.identify(headers)

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        """A page of a foreign site whose name was bound to 127.0.0.1 shows that name here."""
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = re.sub(r":\d*$", "", host).strip("[]")
        if self._service.settings.is_loopback and name not in ("localhost", "127.0.0.1", "::1"):
            raise Refusal(403, "this server answers to localhost only")

    def _check_head(self, scope: Scope) -> None:
        """A head that came in one read; bounded_http.py refuses longer ones."""
        size = len(scope["raw_path"]) + len(scope["query_string"])
        if size + sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADERS:
            raise Refusal(431, f"headers may have {MAX_HEADERS:,} bytes")

    async def _bounded(
        self, scope: Scope, headers: dict[bytes, bytes], receive: Receive
    ) -> Receive:
        """A `receive` that bounds the bytes of a body and, for JSON, its values.

        A body that is too large is still read to its end, up to `DRAINED` times the bound, because
        clients read the response only after they have sent the whole body.
        """
        sizes: dict[str, int] = scope["app"].state.body_sizes
        most = sizes.get(scope["path"], self._service.settings.max_body_size)
        values = ValueCounter() if b"json" in headers.get(b"content-type", b"").lower() else None
        n_bytes, length = 0, headers.get(b"content-length", b"0")

        async def read() -> Message:
            nonlocal n_bytes
            message = await receive()
            if message["type"] != "http.request":
                return message
            data = message.get("body", b"")
            n_bytes += len(data)
            if values is not None:
                values.feed(data)
            wrong = None
            if n_bytes > most:
                wrong = 413, f"a body may have {most:,} bytes"
            elif values is not None and values.n_values > MAX_VALUES:
                wrong = 413, f"a body may have {MAX_VALUES:,} values"
            elif values is not None and values.has_nul:
                wrong = 400, "the body holds a NUL byte: JSON is read in UTF-8"
            while wrong and message.get("more_body") and n_bytes <= DRAINED * most:
                message = await receive()
                n_bytes += len(message.get("body", b""))
            if wrong:  # a class that FastAPI passes on as it is
                raise HTTPException(*wrong)
            return message

        if length.isdigit() and most < int(length[:20]) <= DRAINED * most:
            with suppress(HTTPException):
                while (await read()).get("more_body"):
                    pass
        if length.isdigit() and int(length[:20]) > most:
            raise Refusal(413, f"a body may have {most:,} bytes")
        return read

    def _headers(self, path: str, request_id: str) -> list[tuple[bytes, bytes]]:
        headers = [(b"x-request-id", request_id.encode()), (b"x-content-type-options", b"nosniff")]
        if path in self._pages:
            headers += [
                (b"content-security-policy", PAGE_POLICY.encode()),
                (b"referrer-policy", b"no-referrer"),
                (b"cache-control", b"no-cache"),  # revalidate each time; unchanged is a 304
            ]
        return headers
