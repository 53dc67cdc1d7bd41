"""The application: its routes, the page, and errors in the form of each protocol.

A protocol is a file in protocols/ (bodies, routes, a `Story` for streams), and one entry here.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import Route
from starlette.staticfiles import StaticFiles

from opennemo.errors import OpenNemoError
from opennemo.serve import admin
from opennemo.serve.error_bodies import Refusal, error_response, refusal
from opennemo.serve.gate import Gate
from opennemo.serve.protocols import anthropic, catalog, chat, completions, nim, responses
from opennemo.serve.service import Service
from opennemo.serve.tracing import trace

ERRORS = {400, 401, 403, 404, 405, 413, 422, 429, 431, 500, 501, 503}
WEB = Path(__file__).parent / "web"
PROTOCOLS = (chat, completions, responses, anthropic, catalog, nim)
log = structlog.get_logger("opennemo.serve")


def create_app(service: Service, *, load: Callable[[], None] | None = None) -> FastAPI:
    """The application around a service; `opennemo.batch.api.mount` adds batches to it.

    Args:
        load: loads the model, on a thread, once the server runs; requests get a 503 until then.
    """
    settings = service.settings

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(asyncio.to_thread(load)) if load else None
        if task:
            task.add_done_callback(app.state.loaded)
        yield
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
        responses={status: {"description": "An error"} for status in sorted(ERRORS)},
        exception_handlers={
            OpenNemoError: _on_error,
            RequestValidationError: _on_invalid,
            StarletteHTTPException: _on_http,
        },
    )
    app.state.service, app.state.loaded = service, lambda task: None
    app.state.body_sizes = {}
    for module in PROTOCOLS:
        app.include_router(module.router)
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


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, OpenNemoError)
    refused = refusal(error)
    if refused.status == 500:
        log.error("failed", path=request.url.path, error=str(error)[:500])
    return error_response(refused, request.url.path)


async def _on_invalid(request: Request, error: Exception) -> Response:
    """A body that does not fit the schema: 400 if it is not JSON, else 422 with places."""
    assert isinstance(error, RequestValidationError)
    errors = error.errors()
    detail = [{"type": e["type"], "loc": list(e["loc"]), "msg": e["msg"]} for e in errors[:20]]
    first = detail[0]
    where = ".".join(str(part) for part in first["loc"][1:])
    message = f"{where}: {first['msg']}" if where else first["msg"]
    is_json = first["type"] != "json_invalid"  # else `where` is a place in the text, not a field
    refused = Refusal(
        422 if is_json else 400, message, param=(where or None) if is_json else None, detail=detail
    )
    return error_response(refused, request.url.path)


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    path = request.url.path
    message = f"there is nothing at {path[:200]}" if error.status_code == 404 else str(error.detail)
    response = error_response(Refusal(error.status_code, message), path)
    response.headers.update(error.headers or {})
    return response
