"""The process that listens: uvicorn, which drains before it stops.

This file has what belongs to a process of its own: signal handlers and the limit of open files.
"""

import asyncio
import gc
import signal
import socket
import sys
from contextlib import suppress
from typing import Any

import structlog
import uvicorn
from fastapi import FastAPI

from opennemo.errors import OpenNemoError
from opennemo.serve.bounded_http import BoundedHeaders
from opennemo.serve.service import Service
from opennemo.serve.settings import Settings, without_effect

DESCRIPTORS = 16 * 1024
log = structlog.get_logger("opennemo.serve")


class Server(uvicorn.Server):
    """uvicorn's server, except that a signal first drains and only then stops."""

    service: Service

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self.service.draining:  # a second signal ends it at once
            self.should_exit = self.force_exit = True
            return
        self.service.draining = True
        # The signal may interrupt the writing of a log line, whose lock this thread then holds.
        asyncio.get_event_loop().call_soon_threadsafe(self._begin_drain, sig)

    def _begin_drain(self, sig: int) -> None:
        log.info("draining", signal=signal.Signals(sig).name, n_active=len(self.service.active))
        self._drain = asyncio.ensure_future(self._drain_and_stop())

    async def _drain_and_stop(self) -> None:
        await self.service.drain()
        self.should_exit = True


def run(app: FastAPI) -> None:
    """Answer requests until a signal comes.

    Raises:
        OpenNemoError: the model cannot be loaded, or the port is taken.
    """
    n_descriptors = _raise_descriptors()
    service: Service = app.state.service
    settings = service.settings
    config = uvicorn.Config(
        app, host=settings.host, port=settings.port, http=BoundedHeaders, ws="none",
        log_config=None, access_log=False, server_header=False,
        timeout_graceful_shutdown=5, timeout_keep_alive=75,
        limit_concurrency=max(64, n_descriptors // 2),  # connections, as BoundedHeaders reads it
        ssl_keyfile=settings.ssl_keyfile, ssl_certfile=settings.ssl_certfile,
    )  # fmt: skip
    listening = _listen(config)  # before the model loads, which takes long
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
            gc.freeze()  # the model stays; collecting it again would block the loop for long
            log.info("ready", names=service.names, context=llm.engine.max_context)
            if settings.is_talking:
                port = listening.getsockname()[1]
                print(f"OpenNemo: {_address(settings, port)} has {service.names[0]}, "
                      f"{llm.engine.max_context:,} tokens of context; Ctrl-C ends it",
                      file=sys.stderr)  # fmt: skip

    app.state.loaded = loaded
    if names := without_effect():
        log.warning("set, but without effect", names=names)
    log.info("loading", model=settings.model, host=settings.host, port=settings.port)
    if settings.is_talking:
        print(f"OpenNemo: loading {settings.model} ...", file=sys.stderr)
    server.run([listening])
    if failure:
        raise failure[0]


def _listen(config: uvicorn.Config) -> socket.socket:
    """A socket at the address of the settings. Raises: OpenNemoError, it cannot be opened."""
    try:
        config.load()  # reads certificates, too
    except OSError as error:
        files = f"{config.ssl_certfile}" + f" with {config.ssl_keyfile}" * bool(config.ssl_keyfile)
        why = error.strerror or str(error)
        raise OpenNemoError(f"--ssl-certfile {files}: {why}") from None
    host, port = config.host, config.port
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=config.backlog)
    except OSError as error:
        raise OpenNemoError(f"cannot listen on {host}:{port}: {error.strerror}") from None


def _address(settings: Settings, port: int) -> str:
    """Where a browser of this machine finds the page."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.host, settings.host)
    return f"http{'s' * bool(settings.ssl_certfile)}://{host}:{port}"


def _raise_descriptors() -> int:
    """Raise the limit of open files, which connections count as, and return it."""
    soft = 1024
    with suppress(ImportError, ValueError, OSError):  # Windows, or a system that refuses
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
        if 0 <= soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return min(soft, DESCRIPTORS) if soft >= 0 else DESCRIPTORS
