"""The application: routes, one gate before all of them, and a server that knows how to stop.

The gate is deny by default: whatever path is not on its short open list needs a key, whether a
route is there or not, and before a byte of the body is read. It also checks the Host header on
loopback (DNS rebinding), names each request, and writes one line of log for it, without prompts.
"""

import asyncio
import logging
import re
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import structlog
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from opennemo.batch import api as batches
from opennemo.batch.worker import Worker
from opennemo.errors import OpenNemoError
from opennemo.serve import admin
from opennemo.serve.error_bodies import Refusal, dumps, error_body, error_response, refusal
from opennemo.serve.protocols import anthropic, chat, models, nim, responses
from opennemo.serve.service import INSIDE, Service
from opennemo.serve.settings import Settings
from opennemo.serve.tracing import trace

ERRORS = {400, 401, 403, 404, 405, 413, 422, 429, 500, 501, 503}
MAX_HEADERS = 64 * 1024  # bytes
DESCRIPTORS = 16 * 1024
FORM = 64 * 1024  # bytes that an upload has besides its file
WEB = Path(__file__).parent / "web"
# Nothing inline and nobody else's; HTML only through the sanitizer's Trusted Types policy.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types dompurify"
)
log = structlog.get_logger("opennemo.serve")


def create_app(service: Service, *, load: Callable[[], None] | None = None) -> FastAPI:
    """The application around a service.

    Args:
        load: loads the model, on a thread, once the server runs; requests get a 503 until then.
    """
    settings = service.settings

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(asyncio.to_thread(load)) if load else None
        if task:
            task.add_done_callback(app.state.loaded)
        worker = asyncio.create_task(app.state.batches.serve())
        yield
        worker.cancel()
        with suppress(asyncio.CancelledError):
            await worker
        if task:
            with suppress(OpenNemoError):
                await task
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title="OpenNemo",
        lifespan=lifespan,
        docs_url=None,  # its page would come from foreign hosts
        redoc_url=None,
        openapi_url="/openapi.json" if settings.enable_docs else None,
        root_path=settings.root_path,
        max_body_size=settings.max_body_size,
        responses={status: {"description": "An error"} for status in sorted(ERRORS)},
        exception_handlers={
            OpenNemoError: _on_error,
            RequestValidationError: _on_invalid,
            StarletteHTTPException: _on_http,
        },
    )
    app.state.service, app.state.loaded = service, lambda task: None
    app.state.batches = Worker(service, app)
    for module in (chat, responses, anthropic, models, nim, batches):
        app.include_router(module.router)
    app.include_router(batches.uploads, max_body_size=settings.max_file_size + FORM)
    if settings.admin_key:
        app.include_router(admin.router)
    # A route for each file: a mount at "/" would take other routes' wrong methods, which are 405s.
    pages = {f"/{path.relative_to(WEB).as_posix()}" for path in WEB.rglob("*") if path.is_file()}
    pages |= {"/"}
    files = StaticFiles(directory=WEB, html=True)
    app.router.routes += [Route(path, files, methods=["GET"]) for path in sorted(pages)]
    is_open = {*nim.OPEN, *pages}
    if not settings.metrics_auth:
        is_open |= set(nim.METRICS)
    app.add_middleware(Gate, service=service, is_open=frozenset(is_open), pages=frozenset(pages))
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.allowed_origins,
            allow_methods=["*"], allow_headers=["*"],
        )  # fmt: skip
    if settings.otlp_traces_endpoint:
        trace(app, settings.otlp_traces_endpoint)
    return app


class Gate:
    """Everything that happens to every request, before and after its route."""

    def __init__(
        self, app: ASGIApp, service: Service, is_open: frozenset[str], pages: frozenset[str]
    ):
        self._app, self._service, self._is_open, self._pages = app, service, is_open, pages
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

        try:
            client = scope.get(INSIDE)  # a line of a batch was let in when the batch was
            if client is None:
                self._check_host(headers)
                self._check_size(path, headers)
                client = self._identify(path, headers)
            scope.setdefault("state", {})["client"] = client
            await self._app(scope, receive, reply)
        except asyncio.CancelledError:
            status = 499
            raise
        except Refusal as error:
            await error_response(error, path)(scope, receive, reply)
        except Exception:
            if unsent:  # it came from outside, such as the bound on bodies, or a closed socket
                raise
            log.exception("defect", id=request_id, path=path)
            if not begun:
                error = Refusal(
                    500, "the server has a defect; its log tells", "internal_server_error"
                )
                await error_response(error, path)(scope, receive, reply)
        finally:
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
            raise Refusal(403, "this server answers to localhost only", "permission_error")

    def _check_size(self, path: str, headers: dict[bytes, bytes]) -> None:
        """What announces its size is refused here; FastAPI counts the rest as it comes."""
        settings, length = self._service.settings, headers.get(b"content-length", b"0")
        most = settings.max_file_size + FORM if path == "/v1/files" else settings.max_body_size
        if length.isdigit() and int(length[:20]) > most:
            raise Refusal(413, f"a body may have {most:,} bytes", "request_too_large")

    def _headers(self, path: str, request_id: str) -> list[tuple[bytes, bytes]]:
        headers = [
            (b"x-request-id", request_id.encode()),
            (b"x-content-type-options", b"nosniff"),
        ]
        if path in self._pages:
            headers += [
                (b"content-security-policy", PAGE_POLICY.encode()),
                (b"referrer-policy", b"no-referrer"),
                (b"cache-control", b"no-cache"),  # ask each time; unchanged is a 304
            ]
        return headers


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, OpenNemoError)
    refused = refusal(error)
    if refused.status == 500:
        log.error("failed", path=request.url.path, error=str(error)[:500])
    return error_response(refused, request.url.path)


async def _on_invalid(request: Request, error: Exception) -> Response:
    """A body that does not fit the schema: 400 if it is no JSON at all, else 422 with places."""
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    detail = [{"type": e["type"], "loc": list(e["loc"]), "msg": e["msg"]} for e in found[:20]]
    first = detail[0]
    where = ".".join(str(part) for part in first["loc"][1:])
    status = 400 if first["type"] == "json_invalid" else 422
    refused = Refusal(
        status, f"{where}: {first['msg']}" if where else first["msg"], "invalid_request_error",
        param=where or None, detail=detail,
    )  # fmt: skip
    return error_response(refused, request.url.path)


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    path = request.url.path
    message = f"there is nothing at {path[:200]}" if error.status_code == 404 else str(error.detail)
    kinds = {404: "not_found_error", 413: "request_too_large"}
    kind = kinds.get(error.status_code, "invalid_request_error")
    response = error_response(Refusal(error.status_code, message, kind), path)
    response.headers.update(error.headers or {})
    return response


class BoundedHeaders(HttpToolsProtocol):
    """uvicorn's protocol with bounds on headers, in bytes and in time, and on standing still.

    Without them headers would fill the memory, and who never finishes a request, or never reads an
    answer, would keep what it holds for ever. What is no HTTP gets the body that every error has.
    """

    _n_head: int | None = None  # bytes of the headers being read
    _reading: asyncio.TimerHandle | None = None  # until a head is whole, or a body goes on
    _writing: asyncio.TimerHandle | None = None  # until the client has taken some of what waits

    def send_400_response(self, msg: str) -> None:
        body = dumps(error_body(Refusal(400, msg, "invalid_request_error"), "")).encode()
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
        if self.flow.read_paused:  # it is we who do not read on
            self._reading = self._later(self._still_reading)
        else:
            self.transport.abort()

    def timeout_keep_alive_handler(self) -> None:
        self.transport.abort()  # `close` would wait for who does not read the last answer

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


class Server(uvicorn.Server):
    """uvicorn's server, except that a signal first drains and only then stops."""

    service: Service

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self.service.draining:  # the second signal means now
            self.should_exit = self.force_exit = True
            return
        self.service.draining = True
        log.info("draining", signal=signal.Signals(sig).name, n_active=len(self.service.active))
        asyncio.get_event_loop().call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self._drain = asyncio.ensure_future(self._drain_and_stop())

    async def _drain_and_stop(self) -> None:
        await self.service.drain()
        self.should_exit = True


def serve(settings: Settings) -> None:
    """Load a model and answer requests until a signal comes.

    Raises:
        OpenNemoError: the model cannot be loaded, or the port is taken.
    """
    configure_logs(settings.log_level)
    _raise_descriptors()
    service = Service(settings)
    app = create_app(service, load=service.load)
    config = uvicorn.Config(
        app, host=settings.host, port=settings.port, http=BoundedHeaders, ws="none",
        log_config=None, access_log=False, server_header=False,
        timeout_graceful_shutdown=5, timeout_keep_alive=75,
        limit_concurrency=settings.max_num_queued_reqs + settings.max_num_seqs + 256,
        ssl_keyfile=settings.ssl_keyfile, ssl_certfile=settings.ssl_certfile,
    )  # fmt: skip
    server = Server(config)
    server.service = service
    failure: list[BaseException] = []

    def loaded(task: asyncio.Task) -> None:
        if settings.replicas:  # Ray's own handler ends the process 3 seconds after a signal
            for sig in (signal.SIGTERM, signal.SIGINT):
                signal.signal(sig, server.handle_exit)
        if error := task.exception():
            failure.append(error)
            server.should_exit = True
        elif llm := service.loaded:  # none, if the server is to end already
            log.info("ready", names=service.names, context=llm.engine.max_context)

    app.state.loaded = loaded
    log.info("loading", model=settings.model, host=settings.host, port=settings.port)
    try:
        server.run()
    except SystemExit:
        raise OpenNemoError(f"cannot listen on {settings.host}:{settings.port}") from None
    if failure:
        raise failure[0]


def _raise_descriptors() -> None:
    """Let the process open more than the usual 1,024 files: idle connections are such, too."""
    with suppress(ImportError, ValueError, OSError):  # Windows; or a system that does not want to
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
        if soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class LogStream:
    """Standard error; a full disk ends no request, and is told of when it has room again."""

    def __init__(self) -> None:
        self._file, self._failure = sys.stderr, None

    def write(self, text: str) -> None:
        try:
            if self._failure:
                lost = {"event": "lines of log are missing", "why": str(self._failure)}
                self._file.write(f"{dumps(lost)}\n")
            self._file.write(text)
            self._file.flush()
            self._failure = None
        except OSError as error:
            self._failure = error

    def flush(self) -> None:
        """Nothing is held back."""


def configure_logs(level: str) -> None:
    """One JSON object a line, on standard error; strings are escaped, so nothing can forge one."""
    number, stream = logging.getLevelName(level.upper()), LogStream()
    logging.basicConfig(level=logging.WARNING, stream=stream, format="%(message)s")
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(stream),  # pyright: ignore[reportArgumentType]
    )
