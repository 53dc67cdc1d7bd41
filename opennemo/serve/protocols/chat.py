"""OpenAI's and Mistral's completions: of conversations and of plain texts, whole and streamed."""

from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

import opennemo
from opennemo.engine import Token
from opennemo.errors import InvalidRequest
from opennemo.llm import LLM
from opennemo.reply import Answer
from opennemo.serve.error_bodies import Json, Refusal
from opennemo.serve.protocols.schema import ChatRequest, CompletionRequest, Sampling
from opennemo.serve.protocols.stream import STREAMS, EventStream, Generation, event
from opennemo.serve.service import Service, TheClient, TheService
from opennemo.tokenizer import Tokenizer

router = APIRouter()
DONE = event("[DONE]")
FINGERPRINT = f"opennemo-{opennemo.__version__}"
COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens")


@router.post("/v1/chat/completions", responses=STREAMS)
async def chat_completions(
    body: ChatRequest, service: TheService, client: TheClient, request: Request
) -> Response:
    """Answer a conversation."""
    generation = await service.chat(client, body, prefix="chatcmpl-", salt=body.cache_salt)
    generation.keep_stop = bool(body.include_stop_str_in_output)
    mistral = body.is_mistral() or "mistral" in request.headers.get("user-agent", "").lower()
    if body.stream:
        return EventStream(generation, _ChatStory(generation, service, body, mistral))
    await generation.whole(request.receive)
    content = _chat_response(generation, service.llm, body, mistral)
    return Json(content, headers=generation.headers)


def _chat_response(
    generation: Generation, llm: LLM, body: ChatRequest, mistral: bool
) -> dict[str, Any]:
    """The body that answers a chat request, once all is there."""
    choices = []
    for i, answer in enumerate(generation.answers):
        calls = [_call(call) for call in answer.calls]
        message = {
            "role": "assistant",
            # Mistral's first client wants a string, even if empty.
            "content": body.prefix() + answer.text or (None if calls and not mistral else ""),
            "refusal": None,
            "annotations": [],
            "prefix": False,
        }
        if calls:
            message["tool_calls"] = calls
        logprobs = _chat_logprobs(llm, answer.tokens) if body.logprobs else None
        entry = {
            "index": i,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": answer.finish_reason,
        }
        choices.append(entry | _extras(llm.tokenizer, generation, i, body))
    content = {"choices": choices, "usage": generation.usage(), "service_tier": "default"}
    return _head(generation, "chat.completion") | content


def _head(generation: Generation, kind: str) -> dict[str, Any]:
    return {
        "id": generation.id,
        "object": kind,
        "created": generation.created,
        "model": generation.model,
        "system_fingerprint": FINGERPRINT,
    }


class _ChatStory:
    """The events of a chat stream.

    OpenAI's clients get calls as they grow. Mistral's take each delta for a whole call, as Mistral
    sends them, so theirs come in the finishing chunk.
    """

    def __init__(self, generation: Generation, service: Service, body: ChatRequest, mistral: bool):
        self._generation, self._llm, self._body = generation, service.llm, body
        self._mistral = mistral
        self._n_open = len(generation.answers)
        self._held: list[list[Token]] = [[] for _ in generation.answers]  # without text as yet
        self._wants_usage = service.settings.mistral_usage or mistral

    def begin(self) -> Iterator[str]:
        for i in range(self._n_open):
            yield self._chunk(i, {"role": "assistant", "content": self._body.prefix()})

    def add(self, token: Token) -> Iterator[str]:
        i, wants_logprobs = token.index, self._body.logprobs
        held = self._held[i]
        held += [token] if wants_logprobs else ()
        if token.text or (token.finish_reason and held):
            logprobs = _chat_logprobs(self._llm, held) if wants_logprobs else None
            yield self._chunk(i, {"content": token.text}, logprobs=logprobs)
            held.clear()
        for call in () if self._mistral else token.calls:
            yield self._chunk(i, {"tool_calls": [_call(call, delta=True)]})
        if token.finish_reason:
            self._n_open -= 1
            extras = _extras(self._llm.tokenizer, self._generation, i, self._body)
            usage = self._last_usage()
            calls = self._generation.answers[i].calls if self._mistral else []
            whole = {"tool_calls": [_call(call, delta=True) for call in calls]} if calls else {}
            yield self._chunk(i, whole, usage, finish_reason=token.finish_reason, **extras)

    def _last_usage(self) -> dict[str, Any]:
        """What a finishing chunk says of usage: for OpenAI's clients null, for Mistral's counts."""
        if self._body.include_usage:
            return {"usage": None}
        wanted = self._wants_usage and not self._n_open
        return {"usage": self._generation.usage()} if wanted else {}

    def end(self) -> Iterator[str]:
        if self._body.include_usage:
            head = _head(self._generation, "chat.completion.chunk")
            yield event(head | {"choices": [], "usage": self._generation.usage()})
        yield DONE

    def _chunk(self, i: int, delta: dict, beside: dict | None = None, /, **fields: Any) -> str:
        choice = {"index": i, "delta": delta, "logprobs": None, "finish_reason": None} | fields
        head = _head(self._generation, "chat.completion.chunk")
        return event(head | {"choices": [choice]} | (beside or {}))


def _call(call: Any, *, delta: bool = False) -> dict[str, Any]:
    if delta and not call.name:  # clients add names up, and some insist on one in each delta
        return {"index": call.index, "function": {"name": "", "arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    entry = {"id": call.id, "type": "function", "function": function}
    return {"index": call.index, **entry} if delta else entry


def _token(tokenizer: Tokenizer, id: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(id) if id < tokenizer.vocab_size else b""
    text = data.decode("utf-8", "replace") if data else tokenizer.control_names.get(id, "")
    # -inf is no JSON number; OpenAI's own server writes this instead.
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(data), "token_id": id}


def _chat_logprobs(llm: LLM, tokens: list[Token]) -> dict[str, Any]:
    """OpenAI's and Mistral's shape in one; the end of the answer is no token of it."""
    content = []
    for token in tokens:
        if token.id is None or token.logprobs is None or token.id in llm.engine.eos_ids:
            continue
        top = [_token(llm.tokenizer, id, logprob) for id, logprob in token.logprobs.top]
        entry = _token(llm.tokenizer, token.id, token.logprobs.logprob)
        content.append(entry | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def _extras(
    tokenizer: Tokenizer, generation: Generation, index: int, body: Sampling
) -> dict[str, Any]:
    """vLLM's additions to a choice, where they were asked for."""
    extras: dict[str, Any] = {}
    if body.return_token_ids:
        ids = generation.answers[index].ids
        extras |= {"token_ids": ids, "prompt_token_ids": generation.reply.prompt_ids}
    if body.prompt_logprobs is not None:
        extras["prompt_logprobs"] = [
            logprobs
            and {
                str(id): {"logprob": max(value, -9999.0), "decoded_token": tokenizer.decode([id])}
                for id, value in ((token, logprobs.logprob), *logprobs.top)
            }
            for token, logprobs in _prompt_logprobs(generation, index)
        ]
    return extras


def _prompt_logprobs(generation: Generation, index: int) -> list[tuple[int, Any]]:
    tokens = generation.answers[index].tokens
    logprobs = next((t.prompt_logprobs for t in tokens if t.prompt_logprobs is not None), ())
    return list(zip(generation.reply.prompt_ids, logprobs, strict=False))


@router.post("/v1/completions", responses=STREAMS)
async def completions(
    body: CompletionRequest, service: TheService, client: TheClient, request: Request
) -> Response:
    """Continue texts."""
    prompts = body.prompts()
    if body.stream and len(prompts) > 1:
        raise InvalidRequest("stream: takes one prompt, not a list of them")
    generations: list[Generation] = []
    try:
        for prompt in prompts:

            def ask(llm: LLM, options: dict[str, Any], prompt: str | list[int] = prompt):
                return llm.complete(body.ids(prompt, llm), **body.arguments(llm), **options)

            generations.append(
                await service.start(client, body, ask, prefix="cmpl-", salt=body.cache_salt)
            )
            generations[-1].keep_stop = bool(body.include_stop_str_in_output)
        llm, first = service.llm, generations[0]
        if body.stream:
            return EventStream(first, _CompletionStory(first, llm, body))
        for generation in generations:
            await generation.whole(request.receive)
    finally:
        if not body.stream:
            for generation in generations:
                generation.close()
    choices = [
        _completion_choice(g, llm, body, i, answer)
        for g in generations
        for i, answer in enumerate(g.answers)
    ]
    usages = [generation.usage() for generation in generations]
    content = {
        "choices": [{**choice, "index": i} for i, choice in enumerate(choices)],
        "usage": usages[0] | {name: sum(usage[name] for usage in usages) for name in COUNTS},
    }
    return Json(_head(first, "text_completion") | content, headers=first.headers)


def _completion_choice(
    generation: Generation,
    llm: LLM,
    body: CompletionRequest,
    index: int,
    answer: Answer,
    *,
    begins: bool = True,
) -> dict[str, Any]:
    """A choice with an answer, or with a part of one; the first part shows the prompt, too."""
    tokenizer, shown, text, tokens = llm.tokenizer, [], answer.text, answer.tokens
    if body.echo and begins:
        shown = _prompt_logprobs(generation, index)
        prompt = tokenizer.decode(generation.reply.prompt_ids)
        text, tokens = (prompt, []) if body.max_tokens == 0 else (prompt + text, tokens)
    logprobs = None
    if body.logprobs is not None:
        shown = shown + [
            (token.id, token.logprobs)
            for token in tokens
            if token.id is not None and token.id not in llm.engine.eos_ids
        ]
        logprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        offset = 0
        for id, values in shown:
            logprobs["tokens"].append(_token(tokenizer, id, 0)["token"])
            logprobs["text_offset"].append(offset)
            offset += len(tokenizer.decode([id]))
            logprobs["token_logprobs"].append(values and max(values.logprob, -9999.0))
            top = values and {
                _token(tokenizer, id, 0)["token"]: max(logprob, -9999.0)
                for id, logprob in values.top
            }
            logprobs["top_logprobs"].append(top)
    reason = answer.finish_reason
    choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
    return choice | (_extras(tokenizer, generation, index, body) if reason else {})


class _CompletionStory:
    """The events of a stream of plain text."""

    def __init__(self, generation: Generation, llm: LLM, body: CompletionRequest):
        self._generation, self._llm, self._body = generation, llm, body
        self._held = [Answer() for _ in generation.answers]  # tokens without text as yet
        self._begun: set[int] = set()

    def begin(self) -> Iterator[str]:
        return iter(())

    def add(self, token: Token) -> Iterator[str]:
        i, part = token.index, self._held[token.index]
        part.tokens.append(token)
        if token.text or token.finish_reason:
            begins = i not in self._begun
            entry = _completion_choice(
                self._generation, self._llm, self._body, i, part, begins=begins
            )
            yield self._chunk(choices=[entry])
            self._begun.add(i)
            self._held[i] = Answer()

    def end(self) -> Iterator[str]:
        if self._body.include_usage:
            yield self._chunk(choices=[], usage=self._generation.usage())
        yield DONE

    def _chunk(self, **fields: Any) -> str:
        return event(_head(self._generation, "text_completion") | fields)


@router.post("/v1/fim/completions")
async def fim_completions() -> Response:
    """Refuse to fill in the middle, which these models were not trained for."""
    message = "this model was not trained to fill in the middle"
    raise Refusal(400, message, type="invalid_model", code="1500")


@router.post("/v1/embeddings")
async def embeddings() -> Response:
    """Refuse to embed, which these models were not trained for."""
    raise Refusal(501, "this server generates text; it has no embedding model")
