"""OpenAI's and Mistral's routes for files and batches, over one store.

Both protocols show the same batches, each in its own form: what was made at `/v1/batches` is found
under `/v1/batch/jobs`, too. Descriptions of files are one superset of both. Another key's files and
batches cannot be seen: 404.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Form, Query, Request, UploadFile
from pydantic import BaseModel, Field
from starlette.responses import Response, StreamingResponse

from opennemo.batch.lines import Endpoint
from opennemo.batch.store import AT_WORK, KEPT, Row
from opennemo.batch.worker import Worker, owner_of
from opennemo.errors import InvalidRequest
from opennemo.serve.error_bodies import Json
from opennemo.serve.service import client_of


@asynccontextmanager
async def _at_work(app: FastAPI) -> AsyncIterator[None]:
    """Answer batches as long as the application runs."""
    task = asyncio.create_task(app.state.batches.serve())
    yield
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


router = APIRouter(lifespan=_at_work)
uploads = APIRouter()  # separate, since they have a bound of their own
FORM = 64 * 1024  # bytes that an upload has besides its file
BYTES: dict[int | str, dict[str, Any]] = {200: {"content": {"application/octet-stream": {}}}}
MAX_INLINE = 2**24  # bytes of answers in a job's description


def mount(app: FastAPI) -> None:
    """Add files and batches to a server's application."""
    service = app.state.service
    app.state.batches = Worker(service, app)
    app.state.body_sizes["/v1/files"] = service.settings.max_file_size + FORM
    app.include_router(router)
    app.include_router(uploads)


def batches_of(request: Request) -> Worker:
    return request.app.state.batches


def owner(request: Request) -> str:
    return owner_of(client_of(request))


TheBatches = Annotated[Worker, Depends(batches_of)]
Owner = Annotated[str, Depends(owner)]
Page = Annotated[int, Query(ge=0, le=2**20)]
PageSize = Annotated[int, Query(ge=1, le=10_000)]
Id = Annotated[str, Field(max_length=64)]
Value = Annotated[str, Field(max_length=512)]
Metadata = Annotated[dict[Id, Value], Field(max_length=16)] | None
Lasting = Annotated[int, Field(ge=3600, le=KEPT)]  # seconds
MISTRAL = {
    "validating": "QUEUED",
    "in_progress": "RUNNING",
    "completed": "SUCCESS",
    "failed": "FAILED",
    "expired": "TIMEOUT_EXCEEDED",
    "cancelling": "CANCELLATION_REQUESTED",
    "cancelled": "CANCELLED",
}


class OutputExpiresAfter(BaseModel):
    seconds: Lasting


class BatchCreate(BaseModel):
    """POST /v1/batches, of OpenAI."""

    input_file_id: Id
    endpoint: Endpoint
    completion_window: str = Field("24h", pattern=r"^([1-9]|[1-9]\d|1[0-5]\d|16[0-8])h$")
    metadata: Metadata = None
    output_expires_after: OutputExpiresAfter = OutputExpiresAfter(seconds=KEPT)


class JobRequest(BaseModel):
    body: dict[str, Any]
    custom_id: str | None = None


class JobCreate(BaseModel):
    """POST /v1/batch/jobs, of Mistral."""

    endpoint: Endpoint
    input_files: Annotated[list[Id], Field(max_length=64)] | None = None
    requests: Annotated[list[JobRequest], Field(max_length=10_000)] | None = None
    model: Annotated[str, Field(max_length=256)] | None = None
    metadata: Metadata = None
    timeout_hours: int = Field(24, ge=1, le=168)
    agent_id: None = None  # there are no agents here


@uploads.post("/v1/files")
def upload(
    batches: TheBatches,
    owner: Owner,
    file: UploadFile,
    purpose: Annotated[str, Form()] = "batch",
    seconds: Annotated[Lasting, Form(alias="expires_after[seconds]")] = KEPT,
) -> Response:
    """Store a file of requests, one a line."""
    if purpose != "batch":
        raise InvalidRequest("purpose: must be batch; files have no other use here")
    name = file.filename or "file"
    return Json(file_card(batches.store.add_file(owner, name, file.file, expires_in=seconds)))


@router.get("/v1/files")
def list_files(
    batches: TheBatches,
    owner: Owner,
    purpose: str | None = None,
    after: str | None = None,
    order: Literal["asc", "desc"] = "desc",
    limit: PageSize = 10_000,
    page: Page = 0,
    page_size: PageSize | None = None,
) -> Response:
    """The key's files; in pages by OpenAI's parameters or by Mistral's."""
    size = page_size or limit
    among = [purpose] if purpose else None
    rows, total = batches.store.page(
        "files", owner, limit=size, offset=page * size, after=after,
        ascending=order == "asc", purpose=among,
    )  # fmt: skip
    return Json(_list([file_card(row) for row in rows], page * size, total))


@router.get("/v1/files/{id}")
def get_file(batches: TheBatches, owner: Owner, id: str) -> Response:
    """What is known about a file."""
    return Json(file_card(batches.store.find("files", owner, id)))


@router.get("/v1/files/{id}/content", response_class=Response, responses=BYTES)
def get_content(batches: TheBatches, owner: Owner, id: str) -> Response:
    """A file as it was uploaded, or as its batch wrote it."""
    row = batches.store.find("files", owner, id)
    headers = {"content-length": str(row["bytes"])}
    content = batches.store.content(id)
    return StreamingResponse(content, headers=headers, media_type="application/octet-stream")


@router.delete("/v1/files/{id}")
def delete_file(batches: TheBatches, owner: Owner, id: str) -> Response:
    """Delete a file, unless a batch still needs it."""
    batches.store.delete_file(owner, id)
    return Json({"id": id, "object": "file", "deleted": True})


@router.post("/v1/batches")
def create_batch(body: BatchCreate, batches: TheBatches, owner: Owner) -> Response:
    """Answer all requests of a file within a time."""
    batch = batches.add(
        owner, [body.input_file_id], int(body.completion_window[:-1]), endpoint=body.endpoint,
        model=None, metadata=body.metadata, output_expires_in=body.output_expires_after.seconds,
    )  # fmt: skip
    return Json(batch_card(batch))


@router.get("/v1/batches")
def list_batches(
    batches: TheBatches, owner: Owner, after: str | None = None, limit: PageSize = 20
) -> Response:
    """The key's batches, newest first."""
    rows, total = batches.store.page("batches", owner, limit=limit, after=after)
    return Json(_list([batch_card(row) for row in rows], 0, total))


@router.get("/v1/batches/{id}")
def get_batch(batches: TheBatches, owner: Owner, id: str) -> Response:
    """The progress of a batch."""
    return Json(batch_card(batches.store.find("batches", owner, id)))


@router.post("/v1/batches/{id}/cancel")
def cancel_batch(batches: TheBatches, owner: Owner, id: str) -> Response:
    """End a batch early; the answers that there are stay."""
    return Json(batch_card(batches.cancel(owner, id)))


@router.post("/v1/batch/jobs")
def create_job(body: JobCreate, batches: TheBatches, owner: Owner) -> Response:
    """Answer requests, of files or given here, within a time."""
    if bool(body.input_files) == bool(body.requests):
        raise InvalidRequest("input_files: give either those or requests")
    files = body.input_files
    if body.requests:
        lines = (
            json.dumps({"custom_id": request.custom_id or str(i), "body": request.body}).encode()
            for i, request in enumerate(body.requests)
        )
        added = batches.store.add_file(owner, "requests.jsonl", (line + b"\n" for line in lines))
        files = [added["id"]]
    batch = batches.add(
        owner, files or [], body.timeout_hours, endpoint=body.endpoint, model=body.model,
        metadata=body.metadata, output_expires_in=KEPT,
    )  # fmt: skip
    return Json(job_card(batch))


@router.get("/v1/batch/jobs")
def list_jobs(
    batches: TheBatches,
    owner: Owner,
    page: Page = 0,
    page_size: PageSize = 100,
    model: str | None = None,
    status: Annotated[list[str] | None, Query()] = None,
    created_after: datetime | None = None,
) -> Response:
    """The key's batches, newest first."""
    wanted = status and [ours for ours, theirs in MISTRAL.items() if theirs in status]
    rows, total = batches.store.page(
        "batches", owner, limit=page_size, offset=page * page_size,
        since=created_after.timestamp() if created_after else 0,
        status=wanted, model=[model] if model else None,
    )  # fmt: skip
    return Json(_list([job_card(row) for row in rows], page * page_size, total))


@router.get("/v1/batch/jobs/{id}")
def get_job(batches: TheBatches, owner: Owner, id: str, inline: bool | None = None) -> Response:
    """The progress of a batch; with `inline`, its answers, too, once it has ended."""
    row = batches.store.find("batches", owner, id)
    card = job_card(row)
    if inline and row["status"] not in AT_WORK:
        files = [
            batches.store.find("files", owner, f) for f in (row["output"], row["error_file"]) if f
        ]
        if sum(file["bytes"] for file in files) > MAX_INLINE:
            raise InvalidRequest(f"inline: more than {MAX_INLINE:,} bytes; download output_file")
        data = b"".join(part for file in files for part in batches.store.content(file["id"]))
        card["outputs"] = [json.loads(line) for line in data.splitlines()]
    return Json(card)


@router.post("/v1/batch/jobs/{id}/cancel")
def cancel_job(batches: TheBatches, owner: Owner, id: str) -> Response:
    """End a batch early; the answers that there are stay."""
    return Json(job_card(batches.cancel(owner, id)))


@router.delete("/v1/batch/jobs/{id}")
def delete_job(batches: TheBatches, owner: Owner, id: str) -> Response:
    """Delete a batch that has ended; its files stay."""
    batches.store.delete_batch(owner, id)
    return Json({"id": id, "object": "batch", "deleted": True})


def _list(cards: list[dict[str, Any]], offset: int, total: int) -> dict[str, Any]:
    ends = {"first_id": cards[0]["id"], "last_id": cards[-1]["id"]} if cards else {}
    more = offset + len(cards) < total
    return {"object": "list", "data": cards, "total": total, "has_more": more, **ends}


def file_card(row: Row) -> dict[str, Any]:
    """A file's description that OpenAI's and Mistral's clients both accept."""
    is_input, is_error = row["purpose"] == "batch", row["filename"].endswith("_error.jsonl")
    return {
        **{key: row[key] for key in ("id", "bytes", "created_at", "expires_at", "filename")},
        "object": "file",
        "purpose": row["purpose"],
        "status": "processed",
        "deleted": False,
        "size_bytes": row["bytes"],
        "num_lines": row["num_lines"],
        "sample_type": f"batch_{'request' if is_input else 'error' if is_error else 'result'}",
        "source": "upload" if is_input else "mistral",
    }


def batch_card(row: Row) -> dict[str, Any]:
    """A batch in OpenAI's form."""
    done, times = row["status"] not in AT_WORK, row["times"]
    states = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling")
    counts = {"total": row["n_total"], "completed": row["n_ok"], "failed": row["n_failed"]}
    shared = ("id", "endpoint", "model", "status", "created_at", "expires_at", "metadata")
    return {
        "object": "batch",
        **{key: row[key] for key in shared},
        **{f"{state}_at": times.get(state) for state in (*states, "cancelled")},
        "errors": {"object": "list", "data": row["errors"]} if row["errors"] else None,
        "input_file_id": row["input"],
        "completion_window": row["window"],
        "output_file_id": row["output"] if done else None,
        "error_file_id": row["error_file"] if done else None,
        "request_counts": counts,
    }


def job_card(row: Row) -> dict[str, Any]:
    """A batch in Mistral's form."""
    done, times = row["status"] not in AT_WORK, row["times"]
    shared = ("id", "input_files", "endpoint", "model", "metadata", "created_at")
    return {
        "object": "batch",
        **{key: row[key] for key in shared},
        "status": MISTRAL[row["status"]],
        "errors": [{"message": error["message"], "count": 1} for error in row["errors"]],
        "started_at": times.get("in_progress"),
        "completed_at": times.get(row["status"]) if done else None,
        "output_file": row["output"] if done else None,
        "error_file": row["error_file"] if done else None,
        "total_requests": row["n_total"],
        "completed_requests": row["n_ok"] + row["n_failed"],
        "succeeded_requests": row["n_ok"],
        "failed_requests": row["n_failed"],
    }
