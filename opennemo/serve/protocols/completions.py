"""OpenAI's completions of plain texts, whole and streamed, to one prompt or several."""

from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from opennemo.engine import Token
from opennemo.llm import LLM
from opennemo.reply import Answer
from opennemo.serve.error_bodies import Json, Refusal
from opennemo.serve.protocols.chat import DONE, extras, finish_reason, head, prompt_logprobs
from opennemo.serve.protocols.schema import LEAST_LOGPROB, CompletionRequest
from opennemo.serve.protocols.stream import STREAMS, EventStream, Generation, Several, event
from opennemo.serve.service import TheClient, TheService
from opennemo.tokenizer import Tokenizer

router = APIRouter()
COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens")


@router.post("/v1/completions", responses=STREAMS)
async def completions(
    body: CompletionRequest, service: TheService, client: TheClient, request: Request
) -> Response:
    """Continue texts."""
    prompts, llm = body.prompts(), service.llm
    generations: list[Generation] = []
    try:
        for prompt in prompts:

            def ask(llm: LLM, options: dict[str, Any], prompt: str | list[int] = prompt):
                return llm.complete(body.ids(prompt, llm), **body.arguments(llm), **options)

            generations.append(
                await service.start(
                    client,
                    body.model_copy(update={"prompt": prompt}),  # a limit counts each once
                    ask,
                    prefix="cmpl-",
                    salt=body.cache_salt,
                    is_part=bool(generations),
                )
            )
            generations[-1].keep_stop = bool(body.include_stop_str_in_output)
        first = generations[0]
        if body.stream:
            several = first if len(generations) == 1 else Several(generations)
            return EventStream(several, _CompletionStory(generations, llm, body))
        for generation in generations:
            await generation.whole(request.receive)
    except BaseException:
        for generation in generations:
            generation.close()
        raise
    choices = [
        _CompletionText(g, i, llm, body).choice(answer)
        for g in generations
        for i, answer in enumerate(g.answers)
    ]
    content = {
        "choices": [{**choice, "index": i} for i, choice in enumerate(choices)],
        "usage": _total_usage(generations),
    }
    return Json(head(first, "text_completion") | content, headers=first.headers)


def _total_usage(generations: list[Generation]) -> dict[str, Any]:
    usages = [generation.usage() for generation in generations]
    return usages[0] | {name: sum(usage[name] for usage in usages) for name in COUNTS}


class _CompletionText:
    """One text: gives a choice with all of it, or one choice for each part."""

    def __init__(self, generation: Generation, index: int, llm: LLM, body: CompletionRequest):
        self._generation, self._index, self._llm, self._body = generation, index, llm, body
        self._begun, self._n_characters = False, 0  # of the text before a token
        self._decoder = llm.tokenizer.stream()

    def choice(self, answer: Answer) -> dict[str, Any]:
        """A choice with an answer, or a part of one; the first part shows the prompt, too."""
        tokenizer, body, shown = self._llm.tokenizer, self._body, []
        text, tokens = answer.text, answer.tokens
        reason = finish_reason(answer.finish_reason)
        logprobs: dict[str, list] | None = None
        if body.logprobs is not None:
            names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
            logprobs = {name: [] for name in names}
        if body.echo and not self._begun:
            prompt = tokenizer.decode(self._generation.reply.prompt_ids)
            text, tokens = (prompt, []) if body.max_tokens == 0 else (prompt + text, tokens)
            self._describe(logprobs, prompt_logprobs(self._generation, self._index))
            self._n_characters += len(self._decoder.flush())
            self._decoder = tokenizer.stream()
        eos_ids = self._llm.engine.eos_ids
        shown = [(t.id, t.logprobs) for t in tokens if t.id is not None and t.id not in eos_ids]
        self._describe(logprobs, shown)
        self._begun = True
        choice = {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return choice | (extras(tokenizer, self._generation, self._index, body) if reason else {})

    def _describe(self, logprobs: dict[str, list] | None, shown: list[tuple[int, Any]]) -> None:
        """Add tokens, each with the offset in the text of the character that it belongs to."""
        tokenizer = self._llm.tokenizer
        for id, values in shown if logprobs is not None else ():
            assert logprobs is not None
            logprobs["tokens"].append(_name(tokenizer, id))
            logprobs["text_offset"].append(self._n_characters)
            if id < tokenizer.vocab_size:
                self._n_characters += len(self._decoder.push(id))
            logprobs["token_logprobs"].append(values and max(values.logprob, LEAST_LOGPROB))
            top: dict[str, float] = {}
            for other, logprob in ((id, values.logprob), *values.top) if values else ():
                # Two ids may be spelt alike: a control token, and text that looks like it.
                name = _name(tokenizer, other)
                name = f"token_id:{other}" if name in top and other != id else name
                top[name] = max(logprob, LEAST_LOGPROB)
            logprobs["top_logprobs"].append(top if values else None)


def _name(tokenizer: Tokenizer, id: int) -> str:
    """A token's text; one that is part of a character, as OpenAI writes it: `bytes:\\xf0`."""
    data = tokenizer.token_bytes(id) if id < tokenizer.vocab_size else b""
    try:
        return data.decode() or tokenizer.control_names.get(id, "")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class _CompletionStory:
    """The events of a stream of plain texts, to one prompt or several."""

    def __init__(self, generations: list[Generation], llm: LLM, body: CompletionRequest):
        self._generations, self._body = generations, body
        places = [(g, i) for g in generations for i in range(len(g.answers))]
        self._texts = [_CompletionText(g, i, llm, body) for g, i in places]
        self._held = [Answer() for _ in places]  # tokens without text so far

    def begin(self) -> Iterator[str]:
        return iter(())

    def add(self, token: Token) -> Iterator[str]:
        i, part = token.index, self._held[token.index]
        part.tokens.append(token)
        if token.text or token.finish_reason:
            usage = {"usage": None} if self._body.include_usage else {}
            yield self._chunk(choices=[{**self._texts[i].choice(part), "index": i}], **usage)
            self._held[i] = Answer()

    def end(self) -> Iterator[str]:
        if self._body.include_usage:
            yield self._chunk(choices=[], usage=_total_usage(self._generations))
        yield DONE

    def _chunk(self, **fields: Any) -> str:
        return event(head(self._generations[0], "text_completion") | fields)


@router.post("/v1/fim/completions")
async def fim_completions() -> Response:
    """Refuse to fill in the middle, which these models were not trained for."""
    message = "this model was not trained to fill in the middle"
    raise Refusal(400, message, type="invalid_model", code="1500")


@router.post("/v1/embeddings")
async def embeddings() -> Response:
    """Refuse to embed, which these models were not trained for."""
    raise Refusal(501, "this server generates text; it has no embedding model")
