"""OpenAI's Responses API, without memory: every request brings its whole conversation.

The protocol reports the same answer three times (delta, done, completed). `_Story` keeps the items
as they grow, so the last event of a stream is also the answer of a request without a stream.
"""

import json
import secrets
import time
from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from opennemo.engine import Token
from opennemo.errors import InvalidRequest
from opennemo.llm import LLM
from opennemo.serve.error_bodies import Json
from opennemo.serve.protocols.answer_formats import response_format
from opennemo.serve.protocols.schema import Body, ToolChoice, Tools
from opennemo.serve.protocols.stream import STREAMS, EventStream, Generation, event
from opennemo.serve.service import TheClient, TheService

router = APIRouter()
MESSAGE = {"type": "message", "role": "assistant"}
PART = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}


class ResponsesRequest(Body):
    """POST /v1/responses, as far as it can be answered without memory."""

    input: str | Annotated[list[dict[str, Any]], Field(min_length=1, max_length=4096)]
    instructions: str | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = True
    text: dict[str, Any] | None = None
    max_output_tokens: int | None = Field(None, ge=1, lt=2**31)
    temperature: float | None = Field(None, ge=0, le=5)
    top_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    metadata: dict[str, Any] | None = None
    previous_response_id: str | None = None
    conversation: Any = None

    def arguments(self, llm: LLM) -> dict[str, Any]:
        """Arguments for `LLM.chat`."""
        for name in ("previous_response_id", "conversation"):
            if getattr(self, name) is not None:
                raise InvalidRequest(f"{name}: nothing is kept here; send the whole conversation")
        given = {
            name: value
            for name in ("temperature", "top_p", "presence_penalty", "frequency_penalty")
            if (value := getattr(self, name)) is not None
        }
        if self.max_output_tokens:
            given["max_tokens"] = self.max_output_tokens
        format = (self.text or {}).get("format")
        if not isinstance(format, dict | None):
            raise InvalidRequest("text.format: must be an object")
        return given | {
            "messages": self.messages(),
            "tools": [_tool(tool, i) for i, tool in enumerate(self.tools or [])] or None,
            "tool_choice": self.tool_choice or "auto",
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "format": self.format(response_format(format, "text.format")),
        }

    def messages(self) -> list[dict[str, Any]]:
        """The conversation as messages of the chat API."""
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        items = self.input
        if isinstance(items, str):
            items = [{"role": "user", "content": items}]
        thinking: list[dict[str, Any]] = []  # of the assistant's item that follows
        for i, item in enumerate(items):
            kind = item.get("type", "message")
            if kind == "message":
                content = _text(item.get("content"), f"input[{i}].content")
                messages.append({"role": item.get("role"), "content": content})
            elif kind == "reasoning":
                texts = item.get("content") or []
                thinking += [
                    {"type": "thinking", "thinking": part["text"]}
                    for part in _text(texts, f"input[{i}].content")
                ]
                continue
            elif kind == "function_call":
                function = {"name": item.get("name"), "arguments": item.get("arguments") or "{}"}
                call = {"id": item.get("call_id"), "type": "function", "function": function}
                messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
            elif kind == "function_call_output":
                content = _text(item.get("output"), f"input[{i}].output")
                entry = {"role": "tool", "tool_call_id": item.get("call_id"), "content": content}
                messages.append(entry)
            else:
                raise InvalidRequest(f"input[{i}].type: {str(kind)[:100]!r} is not supported")
            if thinking and messages[-1]["role"] == "assistant":
                content = messages[-1]["content"] or []
                words = [{"type": "text", "text": content}] if isinstance(content, str) else content
                messages[-1]["content"] = thinking + words
            thinking = []
        return messages


def _text(content: Any, where: str) -> Any:
    """Parts of a message in the chat API's spelling."""
    if not isinstance(content, list):
        return content
    parts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("input_text", "output_text", "text", "reasoning_text", "refusal"):
            raise InvalidRequest(f"{where}[{i}].type: {str(kind)[:100]!r} is not supported")
        parts.append({"type": "text", "text": part.get("text", part.get("refusal"))})
    return parts


def _tool(tool: dict[str, Any], i: int) -> dict[str, Any]:
    if tool.get("type") != "function":
        kind = str(tool.get("type"))[:100]
        raise InvalidRequest(f"tools[{i}].type: {kind!r} is not supported, only 'function' is")
    if "function" in tool:
        return tool
    return {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}


@router.post("/v1/responses", responses=STREAMS)
async def create_response(
    body: ResponsesRequest, service: TheService, client: TheClient, request: Request
) -> Response:
    """Answer a conversation."""
    llm = service.llm
    generation = await service.chat(client, body, prefix="resp_")
    story = _Story(generation, body, llm)
    if body.stream:
        return EventStream(generation, story)
    await generation.whole(request.receive)
    for token in generation.answers[0].tokens:
        for _ in story.add(token):
            pass
    return Json(story.response(), headers=generation.headers)


class _Story:
    """The items of one response, and the events that report them."""

    def __init__(self, generation: Generation, body: ResponsesRequest, llm: LLM):
        self._generation, self._body, self._llm = generation, body, llm
        self._items: list[dict[str, Any]] = []
        self._status, self._n_events = "in_progress", 0

    def begin(self) -> Iterator[str]:
        yield self._event("created", response=self.response())
        yield self._event("in_progress", response=self.response())

    def end(self) -> Iterator[str]:
        yield self._event(self._status, response=self.response())

    def add(self, token: Token) -> Iterator[str]:
        if token.thinking:
            if not self._items or self._items[-1]["type"] != "reasoning":
                yield from self._close()
                parts = [{"type": "reasoning_text", "text": ""}]
                yield from self._open({"type": "reasoning", "summary": [], "content": parts}, "rs_")
            self._items[-1]["content"][0]["text"] += token.thinking
            yield self._event("reasoning_text.delta", **self._place(0), delta=token.thinking)
        if token.text:
            if not self._items or self._items[-1]["type"] == "reasoning":
                yield from self._close()
                yield from self._open(MESSAGE | {"content": []}, "msg_")
                part = dict(PART)
                self._items[-1]["content"].append(part)
                yield self._event("content_part.added", **self._place(0), part=part)
            self._items[-1]["content"][0]["text"] += token.text
            yield self._event("output_text.delta", **self._place(0), delta=token.text, logprobs=[])
        for call in token.calls:
            if call.name:
                yield from self._close()
                item = {"type": "function_call", "call_id": call.id, "name": call.name}
                yield from self._open({**item, "arguments": ""}, "fc_")
            if call.arguments:
                self._items[-1]["arguments"] += call.arguments
                yield self._event(
                    "function_call_arguments.delta", **self._place(), delta=call.arguments
                )
        if token.finish_reason:
            self._status = "incomplete" if token.finish_reason == "length" else "completed"
            if {item["type"] for item in self._items} <= {
                "reasoning"
            }:  # an empty answer is a message, too
                yield from self._close()
                self._append(MESSAGE | {"content": [dict(PART)]}, "msg_", self._status)
            else:
                yield from self._close(self._status)

    def _open(self, item: dict[str, Any], prefix: str):
        self._append(item, prefix)
        index = len(self._items) - 1
        yield self._event("output_item.added", output_index=index, item=self._items[-1])

    def _append(self, item: dict[str, Any], prefix: str, status: str = "in_progress") -> None:
        id = f"{prefix}{secrets.token_hex(12)}"
        self._items.append({"id": id, "type": "", "status": status} | item)

    def _close(self, status: str = "completed"):
        if not self._items:
            return
        item = self._items[-1]
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            yield self._event("output_text.done", **self._place(0), text=part["text"], logprobs=[])
            yield self._event("content_part.done", **self._place(0), part=part)
        elif item["type"] == "reasoning":
            text = item["content"][0]["text"]
            yield self._event("reasoning_text.done", **self._place(0), text=text)
        else:
            yield self._event(
                "function_call_arguments.done", **self._place(),
                name=item["name"], arguments=item["arguments"],
            )  # fmt: skip
        yield self._event("output_item.done", output_index=len(self._items) - 1, item=item)

    def _place(self, content_index: int | None = None) -> dict[str, Any]:
        place = {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}
        return place if content_index is None else place | {"content_index": content_index}

    def _event(self, what: str, /, **fields: Any) -> str:
        kind = f"response.{what}"
        text = event({"type": kind, "sequence_number": self._n_events, **fields}, kind)
        self._n_events += 1
        return text

    def response(self) -> dict[str, Any]:
        """The response object so far."""
        body, generation, defaults = self._body, self._generation, self._llm.defaults
        done, usage = self._status != "in_progress", None
        if done:
            numbers = generation.usage()
            usage = {
                "input_tokens": numbers["prompt_tokens"],
                "input_tokens_details": numbers["prompt_tokens_details"],
                "output_tokens": numbers["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": generation.n_thinking_tokens},
                "total_tokens": numbers["total_tokens"],
            }

        def given(name: str, default: Any) -> Any:
            value = getattr(body, name)
            return default if value is None else value

        incomplete = self._status == "incomplete"
        return {
            "id": generation.id,
            "object": "response",
            "created_at": generation.created,
            "completed_at": int(time.time()) if self._status == "completed" else None,
            "status": self._status,
            "incomplete_details": {"reason": "max_output_tokens"} if incomplete else None,
            "model": generation.model,
            "previous_response_id": None,
            "instructions": body.instructions,
            "output": json.loads(json.dumps(self._items)),
            "error": None,
            "tools": [
                {"type": "function", "description": None, "parameters": None, "strict": None}
                | _tool(tool, i)["function"]
                for i, tool in enumerate(body.tools or [])
            ],
            "tool_choice": body.tool_choice or "auto",
            "truncation": "disabled",
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "text": {"format": {"type": "text"}} | (body.text or {}),
            "top_p": given("top_p", defaults.top_p),
            "presence_penalty": given("presence_penalty", 0.0),
            "frequency_penalty": given("frequency_penalty", 0.0),
            "top_logprobs": 0,
            "temperature": given("temperature", defaults.temperature),
            "reasoning": None,
            "usage": usage,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": None,
            "store": False,
            "background": False,
            "service_tier": "default",
            "metadata": body.metadata or {},
            "safety_identifier": None,
            "prompt_cache_key": None,
        }
