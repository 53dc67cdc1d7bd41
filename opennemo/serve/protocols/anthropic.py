"""Anthropic's Messages API: its blocks to messages and back, whole and streamed."""

import json
from collections.abc import Iterator
from typing import Any

import anyio
from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from opennemo.engine import Token
from opennemo.errors import InvalidRequest
from opennemo.llm import LLM
from opennemo.serve.error_bodies import Json, Refusal
from opennemo.serve.protocols.answer_formats import Format, response_format
from opennemo.serve.protocols.schema import Body, Messages, Stop, Tools
from opennemo.serve.protocols.stream import STREAMS, EventStream, Generation, event
from opennemo.serve.service import TheClient, TheService
from opennemo.tokenizer.chat import encode_chat

router = APIRouter()
STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
PING = event({"type": "ping"}, "ping")


class CountRequest(Body):
    """POST /v1/messages/count_tokens."""

    messages: Messages
    system: str | list[dict[str, Any]] | None = None
    tools: Tools | None = None
    tool_choice: dict[str, Any] | None = None
    thread: dict[str, Any] | None = None

    def conversation(self) -> dict[str, Any]:
        """`messages` and `tools` of the chat API."""
        if self.thread is not None:  # the client then sends all messages by itself
            why = "thread: this server keeps no conversations; send all messages of it"
            raise Refusal(400, why, code="thread_unsupported_request")
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for i, message in enumerate(self.messages):
            messages += _messages(message, f"messages[{i}]")
        if messages[-1]["role"] == "assistant":  # its words are continued
            messages[-1]["prefix"] = True
        tools = []
        for i, tool in enumerate(self.tools or []):
            if tool.get("type", "custom") != "custom" or not isinstance(tool.get("name"), str):
                raise InvalidRequest(f"tools[{i}]: only tools with a name and schema of their own")
            parameters = tool.get("input_schema") or {"type": "object"}
            function = {"name": tool["name"], "parameters": parameters}
            if tool.get("description"):
                function["description"] = tool["description"]
            if tool.get("strict") is not None:
                function["strict"] = tool["strict"]
            tools.append({"type": "function", "function": function})
        return {"messages": messages, "tools": tools or None}


class MessagesRequest(CountRequest):
    """POST /v1/messages."""

    max_tokens: int = Field(ge=1, lt=2**31)
    temperature: float | None = Field(None, ge=0, le=5)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=2**31)
    stop_sequences: Stop | None = None
    output_config: dict[str, Any] | None = None
    output_format: dict[str, Any] | None = None  # its name in the beta
    thinking: dict[str, Any] | None = None

    def arguments(self, llm: LLM) -> dict[str, Any]:
        """Arguments for `LLM.chat`."""
        given: dict[str, Any] = {"max_tokens": self.max_tokens}
        for name in ("temperature", "top_p", "top_k"):
            if (value := getattr(self, name)) is not None:
                given[name] = value
        choice = self.tool_choice or {}
        kind = choice.get("type", "auto")
        if kind not in ("auto", "any", "none", "tool"):
            raise InvalidRequest("tool_choice.type: must be auto, any, tool or none")
        tool_choice = {"type": "function", "name": choice.get("name")} if kind == "tool" else kind
        thinking = self.thinking or {"type": "enabled"}
        if thinking.get("type") not in ("enabled", "adaptive", "disabled"):
            raise InvalidRequest("thinking.type: must be enabled, adaptive or disabled")
        budget = thinking.get("budget_tokens") if thinking["type"] == "enabled" else None
        if budget is not None and (type(budget) is not int or budget < 1):
            raise InvalidRequest(f"thinking.budget_tokens: {budget!r} is not a positive number")
        return given | {
            **self.conversation(),
            "thinking_budget": budget,
            "tool_choice": tool_choice,
            "parallel_tool_calls": not choice.get("disable_parallel_tool_use"),
            "stop": tuple(self.stop_sequences or ()),
            "format": self._format(),
        }

    def _format(self) -> Format | None:
        inner = (self.output_config or {}).get("format")
        if not isinstance(inner, dict | None):
            raise InvalidRequest("output_config.format: must be an object")
        return self.format(
            response_format(inner, "output_config.format"),
            response_format(self.output_format, "output_format"),
        )


def _messages(message: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """One message of blocks as messages of the chat API: tool results become their own messages."""
    role, content = message.get("role"), message.get("content")
    if not isinstance(content, list):
        return [{"role": role, "content": content}]
    texts: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for i, block in enumerate(content):
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "text":
            texts.append({"type": "text", "text": block.get("text")})
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input") or {}}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "tool_result":
            id, result = block.get("tool_use_id"), block.get("content")
            results.append({"role": "tool", "tool_call_id": id, "content": result})
        elif kind == "thinking":
            texts.append({"type": "thinking", "thinking": block.get("thinking")})
        elif kind != "redacted_thinking":
            raise InvalidRequest(f"{where}.content[{i}].type: {str(kind)[:100]!r} is not supported")
    words = [{"role": role, "content": texts}] if texts or not (calls or results) else []
    if calls:
        words = [{"role": role, "content": texts or None, "tool_calls": calls}]
    return [*results, *words]


@router.post("/v1/messages", responses=STREAMS)
async def create_message(
    body: MessagesRequest, service: TheService, client: TheClient, request: Request
) -> Response:
    """Answer a conversation."""
    generation = await service.chat(client, body, prefix="msg_")
    if body.stream:
        return EventStream(generation, _MessageStory(generation), ping=PING)
    await generation.whole(request.receive)
    text, calls = generation.answers[0].text, generation.answers[0].calls
    content: list[dict[str, Any]] = []
    if thinking := generation.answers[0].thinking:
        content.append(_thinking(thinking))
    if text or not calls:
        content.append(_text(text))
    for call in calls:
        content.append(_tool_use(call.id, call.name, _object(call.arguments)))
    message = _head(generation) | {"content": content, **_stop(generation)}
    message["usage"] |= {"output_tokens": generation.n_output_tokens}
    return Json(message, headers=generation.headers)


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: CountRequest, service: TheService) -> Response:
    """How many tokens a conversation has."""
    body.ignored(strict=service.settings.strict_params)
    service.adapter(body.model)
    llm = service.llm

    def count() -> int:
        given = body.conversation()
        return len(encode_chat(llm.tokenizer, given["messages"], given["tools"]))

    return Json({"input_tokens": await anyio.to_thread.run_sync(count)})


class _MessageStory:
    """The events of a stream: blocks open, grow and close one after the other."""

    def __init__(self, generation: Generation):
        self._generation = generation
        self._index, self._kind = -1, ""  # of the block that is open

    def begin(self) -> Iterator[str]:
        yield _event("message_start", message=_head(self._generation))

    def add(self, token: Token) -> Iterator[str]:
        if token.thinking:
            if self._kind != "thinking":
                yield from self._open(_thinking(""))
            yield self._delta({"type": "thinking_delta", "thinking": token.thinking})
        if token.text:
            if self._kind != "text":
                yield from self._open(_text(""))
            yield self._delta({"type": "text_delta", "text": token.text})
        for call in token.calls:
            if call.name:
                yield from self._open(_tool_use(call.id, call.name, {}))
            if call.arguments:
                yield self._delta({"type": "input_json_delta", "partial_json": call.arguments})

    def end(self) -> Iterator[str]:
        yield from self._close()
        # The cached tokens are known now, and some clients read the counts only here.
        names = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
        usage = _head(self._generation)["usage"]
        usage = {name: usage[name] for name in names}
        usage["output_tokens"] = self._generation.n_output_tokens
        yield _event("message_delta", delta=_stop(self._generation), usage=usage)
        yield _event("message_stop")

    def _open(self, block: dict[str, Any]) -> Iterator[str]:
        yield from self._close()
        self._index, self._kind = self._index + 1, block["type"]
        yield _event("content_block_start", index=self._index, content_block=block)

    def _close(self) -> Iterator[str]:
        if self._index >= 0:
            yield _event("content_block_stop", index=self._index)

    def _delta(self, delta: dict[str, Any]) -> str:
        return _event("content_block_delta", index=self._index, delta=delta)


def _head(generation: Generation) -> dict[str, Any]:
    cached = generation.reply.n_cached_tokens
    return {
        "id": generation.id,
        "type": "message",
        "role": "assistant",
        "model": generation.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "stop_details": None,
        "container": None,
        "usage": {
            "input_tokens": generation.reply.n_prompt_tokens - cached,
            "output_tokens": 0,
            "output_tokens_details": {"thinking_tokens": generation.n_thinking_tokens},
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "cache_creation": None,
            "inference_geo": None,
            "server_tool_use": None,
            "service_tier": "standard",
        },
    }


def _stop(generation: Generation) -> dict[str, Any]:
    answer = generation.answers[0]
    by, reason = answer.stopped_by, STOP_REASONS[answer.finish_reason or "stop"]
    return {"stop_reason": "stop_sequence" if by else reason, "stop_sequence": by}


def _text(text: str) -> dict[str, Any]:
    # Anthropic's specification asks for the field, and Vercel's client for a list.
    return {"type": "text", "text": text, "citations": []}


def _thinking(text: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": text, "signature": ""}


def _tool_use(id: str, name: str, input: Any) -> dict[str, Any]:
    caller = {"type": "direct"}
    return {"type": "tool_use", "id": id, "name": name, "input": input, "caller": caller}


def _object(arguments: str) -> Any:
    """Arguments that the length limit cut off become {}."""
    try:
        return json.loads(arguments)
    except ValueError:
        return {}


def _event(type: str, **fields: Any) -> str:
    return event({"type": type, **fields}, type)
