"""OpenAI's and Mistral's completions of conversations, whole and streamed."""

from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

import opennemo
from opennemo.engine import Token
from opennemo.llm import LLM
from opennemo.serve.error_bodies import Json
from opennemo.serve.protocols.schema import LEAST_LOGPROB, ChatRequest, Sampling
from opennemo.serve.protocols.stream import STREAMS, EventStream, Generation, event
from opennemo.serve.service import TheClient, TheService
from opennemo.tokenizer import Tokenizer

router = APIRouter()
DONE = event("[DONE]")
FINGERPRINT = f"opennemo-{opennemo.__version__}"


@router.post("/v1/chat/completions", responses=STREAMS)
async def chat_completions(
    body: ChatRequest, service: TheService, client: TheClient, request: Request
) -> Response:
    """Answer a conversation."""
    llm = service.llm  # refused once the server drains; running requests are answered
    generation = await service.chat(client, body, prefix="chatcmpl-", salt=body.cache_salt)
    generation.keep_stop = bool(body.include_stop_str_in_output)
    mistral = body.is_mistral() or "mistral" in request.headers.get("user-agent", "").lower()
    wants_usage = mistral or service.settings.mistral_usage
    if body.stream:
        return EventStream(generation, _ChatStory(generation, llm, body, mistral, wants_usage))
    await generation.whole(request.receive)
    content = _chat_response(generation, llm, body, mistral)
    return Json(content, headers=generation.headers)


def _chat_response(
    generation: Generation, llm: LLM, body: ChatRequest, mistral: bool
) -> dict[str, Any]:
    """The body that answers a chat request, once it is complete."""
    choices = []
    for i, answer in enumerate(generation.answers):
        calls = [_call(call) for call in answer.calls]
        message: dict[str, Any] = {
            "role": "assistant",
            # Mistral's first client wants a string, even if empty.
            "content": body.prefix() + answer.text or (None if calls and not mistral else ""),
            "refusal": None,
            "annotations": [],
            "prefix": False,
        }
        if answer.thinking:
            message |= _thought(answer.thinking, message["content"], mistral=mistral)
        if calls:
            message["tool_calls"] = calls
        logprobs = _chat_logprobs(llm, answer.tokens) if body.logprobs else None
        entry = {
            "index": i,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": finish_reason(answer.finish_reason),
        }
        choices.append(entry | extras(llm.tokenizer, generation, i, body))
    content = {"choices": choices, "usage": generation.usage(), "service_tier": "default"}
    return head(generation, "chat.completion") | content


def head(generation: Generation, kind: str) -> dict[str, Any]:
    """What every body and every chunk begins with."""
    return {
        "id": generation.id,
        "object": kind,
        "created": generation.created,
        "model": generation.model,
        "system_fingerprint": FINGERPRINT,
    }


class _ChatStory:
    """The events of a chat stream.

    OpenAI's clients get calls as they grow. Mistral's clients treat each delta as a whole call, so
    they get all calls in the finishing chunk.
    """

    def __init__(
        self,
        generation: Generation,
        llm: LLM,
        body: ChatRequest,
        mistral: bool,
        wants_usage: bool,
    ):
        self._generation, self._llm, self._body = generation, llm, body
        self._mistral = mistral
        self._n_open = len(generation.answers)
        self._held: list[list[Token]] = [[] for _ in generation.answers]  # without text so far
        self._wants_usage = wants_usage

    def begin(self) -> Iterator[str]:
        for i in range(self._n_open):
            yield self._chunk(i, {"role": "assistant", "content": self._body.prefix()})

    def add(self, token: Token) -> Iterator[str]:
        i, wants_logprobs = token.index, self._body.logprobs
        held = self._held[i]
        held += [token] if wants_logprobs else ()
        logprobs = None
        if token.text or token.thinking or (token.finish_reason and held):
            logprobs = _chat_logprobs(self._llm, held) if wants_logprobs else None
            held.clear()
        if token.thinking:
            thought = _thought(token.thinking, None, mistral=self._mistral)
            yield self._chunk(i, thought, logprobs=logprobs)
            logprobs = None
        if token.text or logprobs:
            yield self._chunk(i, {"content": token.text}, logprobs=logprobs)
        for call in () if self._mistral else token.calls:
            yield self._chunk(i, {"tool_calls": [_call(call, delta=True)]})
        if token.finish_reason:
            self._n_open -= 1
            more = extras(self._llm.tokenizer, self._generation, i, self._body)
            usage = self._last_usage()
            calls = self._generation.answers[i].calls if self._mistral else []
            whole = {"tool_calls": [_call(call, delta=True) for call in calls]} if calls else {}
            reason = finish_reason(token.finish_reason)
            yield self._chunk(i, whole, usage, finish_reason=reason, **more)

    def _last_usage(self) -> dict[str, Any]:
        """Usage for the last finishing chunk: Mistral's clients look for counts there."""
        wanted = self._wants_usage and not self._n_open and not self._body.include_usage
        return {"usage": self._generation.usage()} if wanted else {}

    def end(self) -> Iterator[str]:
        if self._body.include_usage:
            news = {"choices": [], "usage": self._generation.usage()}
            yield event(head(self._generation, "chat.completion.chunk") | news)
        yield DONE

    def _chunk(self, i: int, delta: dict, beside: dict | None = None, /, **fields: Any) -> str:
        choice = {"index": i, "delta": delta, "logprobs": None, "finish_reason": None} | fields
        usage = {"usage": None} if self._body.include_usage else {}  # it comes in a last chunk
        beside = {"choices": [choice]} | usage | (beside or {})
        return event(head(self._generation, "chat.completion.chunk") | beside)


def _thought(thinking: str, text: str | None, *, mistral: bool) -> dict[str, Any]:
    """Thinking in a message or a delta: a chunk before the text, or a field beside it."""
    if not mistral:
        return {"reasoning_content": thinking}
    chunk = {"type": "thinking", "thinking": [{"type": "text", "text": thinking}]}
    return {"content": [chunk] + [{"type": "text", "text": text}] * bool(text)}


def _call(call: Any, *, delta: bool = False) -> dict[str, Any]:
    if delta and not call.name:  # clients add names up, and some insist on one in each delta
        return {"index": call.index, "function": {"name": "", "arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    entry = {"id": call.id, "type": "function", "function": function}
    return {"index": call.index, **entry} if delta else entry


def _token(tokenizer: Tokenizer, id: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(id) if id < tokenizer.vocab_size else b""
    text = data.decode("utf-8", "replace") if data else tokenizer.control_names.get(id, "")
    logprob = max(logprob, LEAST_LOGPROB)
    return {"token": text, "logprob": logprob, "bytes": list(data), "token_id": id}


def _chat_logprobs(llm: LLM, tokens: list[Token]) -> dict[str, Any]:
    """OpenAI's and Mistral's shape in one; the end of the answer is not a token of it."""
    content = []
    for token in tokens:
        if token.id is None or token.logprobs is None or token.id in llm.engine.eos_ids:
            continue
        top = [_token(llm.tokenizer, id, logprob) for id, logprob in token.logprobs.top]
        entry = _token(llm.tokenizer, token.id, token.logprobs.logprob)
        content.append(entry | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def finish_reason(reason: str | None) -> str | None:
    """In OpenAI's words, which have none for an answer that ended because it repeated itself."""
    return "length" if reason == "repetition" else reason


def extras(
    tokenizer: Tokenizer, generation: Generation, index: int, body: Sampling
) -> dict[str, Any]:
    """vLLM's additions to a choice, where they were asked for."""
    more: dict[str, Any] = {}
    if body.repetition_detection is not None:
        repeats = generation.answers[index].finish_reason == "repetition"
        more["stop_reason"] = "repetition_detected" if repeats else None
    if body.return_token_ids:
        ids = generation.answers[index].ids
        more |= {"token_ids": ids, "prompt_token_ids": generation.reply.prompt_ids}
    if body.prompt_logprobs is not None:
        more["prompt_logprobs"] = [
            logprobs
            and {
                str(id): {
                    "logprob": max(value, LEAST_LOGPROB),
                    "decoded_token": tokenizer.decode([id]),
                }
                for id, value in ((token, logprobs.logprob), *logprobs.top)
            }
            for token, logprobs in prompt_logprobs(generation, index)
        ]
    return more


def prompt_logprobs(generation: Generation, index: int) -> list[tuple[int, Any]]:
    """Ids of the prompt, each with its log-probabilities."""
    tokens = generation.answers[index].tokens
    logprobs = next((t.prompt_logprobs for t in tokens if t.prompt_logprobs is not None), ())
    return list(zip(generation.reply.prompt_ids, logprobs, strict=False))
