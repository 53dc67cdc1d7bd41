"""How errors reach a client: one body that OpenAI's, Mistral's and Vercel's clients all parse.

Mistral's clients read the top level, OpenAI's the object `error`; `code` is a string or null, since
strict clients reject numbers there. Anthropic's clients get a shape of their own.
"""

import json
from math import ceil
from typing import Any

from fastapi.responses import Response

from opennemo.errors import (
    CheckpointError,
    ContextTooLong,
    InvalidRequest,
    OpenNemoError,
    Overloaded,
    Unavailable,
)

MESSAGES = "/v1/messages"  # paths that begin with this use Anthropic's protocol
TYPES = {  # of an error, by status
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    422: "invalid_request_error",
    429: "rate_limit_error",
    499: "cancelled",
    500: "internal_server_error",
    501: "not_implemented",
    503: "service_unavailable",
}
ANTHROPIC_TYPES = dict.fromkeys((499, 500, 501), "api_error") | {503: "overloaded_error"}


class Refusal(OpenNemoError):
    """A request that is refused with a status; `retry_after` is in seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
        detail: list[dict] | None = None,
    ):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.type = type or TYPES.get(status, TYPES[400])
        self.retry_after, self.detail = retry_after, detail


def refusal(error: OpenNemoError) -> Refusal:
    """Any error of ours as one with a status."""
    if isinstance(error, Refusal):
        return error
    message = str(error)
    if isinstance(error, ContextTooLong):
        return Refusal(400, message, code="context_length_exceeded")
    if isinstance(error, InvalidRequest | CheckpointError):
        where, colon, _ = message.partition(":")
        param = where if colon and " " not in where else None
        return Refusal(400, message, param=param)
    if isinstance(error, Overloaded):
        return Refusal(503, message, type="overloaded_error", code="overloaded", retry_after=1)
    if isinstance(error, Unavailable):
        return Refusal(503, message, code="replica_lost", retry_after=1)
    return Refusal(500, message)


def error_body(error: Refusal, path: str) -> dict[str, Any]:
    """The JSON that reports an error, in the protocol of the path."""
    if path.startswith(MESSAGES):
        kind = ANTHROPIC_TYPES.get(error.status) or TYPES.get(error.status, "api_error")
        details = {"details": {"error_code": error.code}} if error.code else {}
        return {"type": "error", "error": {"type": kind, "message": str(error), **details}}
    fields = {"message": str(error), "type": error.type, "param": error.param, "code": error.code}
    body = {"object": "error", **fields, "raw_status_code": error.status, "error": fields}
    return body | ({"detail": error.detail} if error.detail else {})


def error_response(error: Refusal, path: str) -> Response:
    headers = {}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, ceil(error.retry_after)))
    return Json(error_body(error, path), error.status, headers)


class Json(Response):
    """JSON of any strings: half a surrogate pair, which UTF-8 cannot hold, becomes a `?`."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return dumps(content).encode("utf-8", "replace")


def dumps(value: Any) -> str:
    """JSON; numbers that it cannot express, which a request's fields may hold, become null."""
    how: dict[str, Any] = {"ensure_ascii": False, "separators": (",", ":")}
    try:
        return json.dumps(value, allow_nan=False, **how)
    except ValueError:
        text = json.dumps(value, **how)
        return json.dumps(json.loads(text, parse_constant=lambda _: None), **how)
