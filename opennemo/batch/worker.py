"""The server's batches: takes them from the store, has them answered, ends them.

One task handles all of them, and what it does follows from the database alone: routes only write
there and wake it, and after a restart it continues with every batch that has not ended. A batch
whose model is not served, or whose key is now unknown, waits until its time is over.
"""

import asyncio
import hashlib
import secrets
import sqlite3
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import structlog
from starlette.types import ASGIApp

from opennemo.batch.lines import Line, LineError, OutputLine, Slots, output_line, parse, run
from opennemo.batch.store import Row, Store
from opennemo.serve.auth import Client
from opennemo.serve.error_bodies import Refusal
from opennemo.serve.service import Service

MAX_ERRORS = 100  # reported of an invalid batch
log = structlog.get_logger("opennemo.serve")


class Worker:
    """Answers batches beside live requests, through `app`."""

    def __init__(self, service: Service, app: ASGIApp):
        settings = service.settings
        self.store = Store(
            settings.state_dir,
            max_lines=settings.max_batch_lines,
            max_bytes=settings.max_state_size,
        )
        self._service, self._app = service, app
        self._tasks: dict[str, asyncio.Task] = {}
        self._at_work: list[Row] = []
        self._why: dict[str, str] = {}  # what was logged about batches that wait
        # A minute's limits are counted apart: batches keep to them, too, but take nothing from live
        # requests. Only `Slots` decides how many lines run at once.
        gatekeeper = service.gatekeeper
        self._clients = {
            owner_of(c): Client(
                f"{c.name} (batches)", replace(c.limits, max_concurrent=0), c.digest
            )
            for c in gatekeeper.clients or [gatekeeper.anonymous]
        }

    async def serve(self) -> None:
        """Handle all batches, until cancelled."""
        self._loop, self._wake = asyncio.get_running_loop(), asyncio.Event()
        try:
            await asyncio.to_thread(self.store.open)
        except (OSError, sqlite3.Error) as error:  # another server's folder, or a read-only disk
            folder = str(self._service.settings.state_dir)
            log.warning("files and batches are off", state_dir=folder, why=str(error))
            return
        limit, active = self._service.settings.max_num_batch_seqs, self._service.active
        self._slots = Slots(limit, lambda: max(0, len(active) - self._slots.n_taken))
        try:
            while True:
                self._wake.clear()
                try:
                    await self._look()
                    self._note("all batches", None)
                except Refusal as error:  # the disk is full, perhaps, which passes
                    self._note("all batches", str(error))
                except Exception:  # no batch may end the others
                    log.exception("defect")
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), 1 if self._at_work else None)
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)
            await asyncio.to_thread(self.store.close)

    def add(self, owner: str, files: list[str], hours: int, **details: Any) -> Row:
        """Accept a batch of some of the owner's files; from any thread, as `cancel`."""
        store, input = self.store, files[0]
        if len(files) > 1:  # one after the other, in a file of their own
            parts = (store.lines(store.find("files", owner, file)["id"]) for file in files)
            lines = (line.rstrip(b"\n") + b"\n" for part in parts for line in part)
            input = store.add_file(owner, "requests.jsonl", lines)["id"]
        batch = store.add_batch(
            owner, input, expires_at=int(time.time()) + 3600 * hours, window=f"{hours}h",
            input_files=files, job_model=details["model"], **details,
        )  # fmt: skip
        self._loop.call_soon_threadsafe(self._wake.set)
        return batch

    def cancel(self, owner: str, id: str) -> Row:
        """Ask for the end of one of the owner's batches."""
        batch = self.store.cancel(owner, id)
        self._loop.call_soon_threadsafe(self._wake.set)
        return batch

    async def _look(self) -> None:
        """Start batches that can start, end those that must end."""
        self._at_work = await asyncio.to_thread(self.store.at_work)
        for batch in self._at_work:
            id, task = batch["id"], self._tasks.get(batch["id"])
            late = batch["expires_at"] < time.time()
            if late or batch["status"] == "cancelling":
                if task is not None:
                    task.cancel()
                    await asyncio.wait([task])
                await asyncio.to_thread(self._give_up, batch)
            elif task is not None and task.done():
                del self._tasks[id]
                if not task.cancelled() and (error := task.exception()):
                    log.error("defect", batch=id, exc_info=error)
                    problem = {"code": "internal_server_error", "message": "see the server's log"}
                    await asyncio.to_thread(self.store.finish, batch, "failed", [problem])
            elif task is None and self._can_begin(batch):
                self._tasks[id] = asyncio.create_task(self._process(batch))
        gone = self._tasks.keys() - {batch["id"] for batch in self._at_work}
        for id in gone:
            del self._tasks[id]

    def _can_begin(self, batch: Row) -> bool:
        """Whether its key is known and its model is served."""
        if batch["owner"] not in self._clients or not self._service.is_ready:
            return False
        return batch["model"] is None or self._service.serves(batch["model"])

    async def _process(self, batch: Row) -> None:
        store = self.store
        try:
            if batch["status"] == "validating":
                batch = await asyncio.to_thread(self._validate, batch)
            if batch["status"] == "in_progress":
                client, save = self._clients[batch["owner"]], partial(store.answer, batch)
                await run(self._lines(batch), self._app, client, self._slots, save)
                await asyncio.to_thread(store.finish, batch, "completed")
            self._note(batch["id"], None)
        except Refusal as error:  # the disk is full, perhaps, which passes
            self._note(batch["id"], str(error))
            await asyncio.sleep(5)

    def _note(self, id: str, why: str | None) -> None:
        """Log once why a batch is interrupted; None: it continues."""
        if why is None:
            self._why.pop(id, None)
        elif self._why.get(id) != why:
            self._why[id] = why
            log.error("batch interrupted", id=id, error=why)

    def _lines(self, batch: Row) -> Iterator[Line]:
        for number, raw in self.store.pending(batch):
            id = f"batch_req_{secrets.token_hex(12)}"
            yield parse(raw, id, number, endpoint=batch["endpoint"], model=batch["job_model"])

    def _validate(self, batch: Row) -> Row:
        """Read all lines; the first errors end the batch before anything is computed."""
        errors: list[dict[str, Any]] = []
        seen, models, n_total = set(), set(), 0
        for number, raw in self.store.pending(batch):
            n_total += 1
            try:
                line = parse(raw, "", number, endpoint=batch["endpoint"], model=batch["job_model"])
                if line.custom_id in seen:
                    raise LineError("duplicate_custom_id", "another line has it", param="custom_id")
                seen.add(line.custom_id)
                model = line.body.get("model")
                if not isinstance(model, str) or not self._service.serves(model):
                    raise LineError("model_not_found", "is not served here", param="body.model")
                models.add(model)
                if len(models) > 1:
                    raise LineError("mismatched_model", "a batch has one", param="body.model")
            except LineError as error:
                message = f"{error.param}: {error}" if error.param else str(error)
                problem = {"code": error.code, "message": message, "param": error.param}
                errors.append(problem | {"line": number})
            if len(errors) >= MAX_ERRORS:
                break
        if not n_total:
            errors.append({"code": "empty_file", "message": "the file holds no requests"})
        if errors:
            self.store.finish(batch, "failed", errors)
            return batch
        return self.store.begin(batch, n_total=n_total, model=models.pop())

    def _give_up(self, batch: Row) -> None:
        """End a batch that was cancelled or has expired; lines without an answer get an error."""
        message = "the batch's time was over before this line's turn"

        def answers() -> Iterator[OutputLine]:
            for line in self._lines(batch):
                error = {"code": "batch_expired", "message": message}
                yield output_line(line.id, line.number, line.custom_id, error=error)

        if batch["status"] == "in_progress":
            self.store.answer(batch, answers())
        self.store.finish(batch, "expired")


def owner_of(client: Client) -> str:
    """The owner of a client's files and batches: its key, since names may change hands."""
    return hashlib.sha256(b"opennemo batches of " + client.digest).hexdigest()
