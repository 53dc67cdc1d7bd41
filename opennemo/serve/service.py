"""The server's state: the model, the answers under way, and whether it takes more.

HTTP stays outside: routes ask `start` for a generation and write it in their protocol's form.
"""

import asyncio
import secrets
import shlex
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import structlog
from fastapi import Depends, Request

from opennemo.errors import InvalidRequest, OpenNemoError
from opennemo.llm import LLM, Reply
from opennemo.serve.auth import Client, Gatekeeper, KeyLimits, read_clients
from opennemo.serve.error_bodies import Refusal
from opennemo.serve.loading import load_model
from opennemo.serve.prometheus import Metrics
from opennemo.serve.protocols.schema import Body
from opennemo.serve.protocols.stream import Generation
from opennemo.serve.settings import Settings

NEMO_NAMES = (
    "open-mistral-nemo-2407",
    "open-mistral-nemo",
    "mistral-tiny-2407",
    "mistral-tiny-latest",
)
ELSEWHERE = {  # how names of other services' models begin, which clients have as defaults
    "gpt-": "OpenAI", "chatgpt-": "OpenAI", "o1": "OpenAI", "o3": "OpenAI", "o4": "OpenAI",
    "text-": "OpenAI", "davinci": "OpenAI", "babbage": "OpenAI", "claude": "Anthropic",
    "gemini": "Google", "mistral-": "Mistral", "codestral": "Mistral", "ministral": "Mistral",
    "magistral": "Mistral", "devstral": "Mistral", "pixtral": "Mistral", "open-mi": "Mistral",
    "deepseek": "DeepSeek", "grok": "xAI", "command-": "Cohere",
}  # fmt: skip
INSIDE = "opennemo.client"  # in the scope of a request from a batch: its client
log = structlog.get_logger("opennemo.serve")


# Settings of the command line come as floats.
WHOLE_NUMBERS = {"max_tokens", "min_tokens", "top_k", "dry_allowed_length", "dry_window"}


class Service:
    """One model, answering."""

    def __init__(self, settings: Settings, open_model: Callable[[Settings], LLM] = load_model):
        """`open_model` makes the model when `load` is called."""
        self.settings, self._open_model = settings, open_model
        limits = KeyLimits(
            requests_per_minute=settings.requests_per_minute,
            tokens_per_minute=settings.tokens_per_minute,
            max_concurrent=settings.max_concurrent,
        )
        clients = read_clients(settings.api_key, settings.api_key_file, limits)
        self.gatekeeper = Gatekeeper(clients, limits, settings.admin_key)
        self.metrics = Metrics(
            Path(settings.model).name, compat=settings.metrics_compat,
            n_requests=settings.max_num_seqs,
        )  # fmt: skip
        self.created = int(time.time())
        self.active: set[Generation] = set()
        self._n_starting = 0  # requests that are admitted, and have no generation yet
        self.draining = self.asleep = False
        self.names: list[str] = []
        self.typed: tuple[str, ...] = ()  # also accepted as the model's name
        self._llm: LLM | None = None

    def load(self) -> None:
        """Load the model and have it compute a token; slow, so run it on a thread of its own.

        Raises:
            OpenNemoError: it cannot be loaded.
        """
        llm = self._open_model(self.settings)
        try:
            self.use(llm)
        except OpenNemoError:
            llm.close()
            raise

    def use(self, llm: LLM) -> None:
        """Serve a model that is loaded already."""
        given: dict[str, Any] = {
            name: int(value) if name in WHOLE_NUMBERS else value
            for name, value in self.settings.override_generation_config.items()
        }
        try:
            llm.defaults = replace(llm.defaults, **given)
        except TypeError as error:
            raise InvalidRequest(f"--override-generation-config: {error}") from None
        llm.complete([llm.tokenizer.bos_id], max_tokens=1).finish()
        assert llm.grammars  # made now: it blocks the interpreter for seconds
        config = llm.engine.model_config
        is_nemo = (config.dim, config.n_layers, config.vocab_size) == (5120, 40, 131072)
        is_instruct = llm.tokenizer.instruct_version is not None
        nemo_names = NEMO_NAMES if is_nemo and is_instruct else ()
        self.names = self.settings.served_model_name or [*nemo_names, llm.name]
        # Clients may also use the name given on the command line, perhaps a path.
        self.typed = () if self.settings.served_model_name else (self.settings.model,)
        asked = min(config.max_position_embeddings, self.settings.max_model_len or 2**31)
        if llm.engine.max_context < asked:
            log.warning("context shortened to what memory has room for",
                        context=llm.engine.max_context, asked=asked)  # fmt: skip
        self.metrics.model_name = self.names[0]
        self.metrics.watch(llm)
        self._llm = llm

    @property
    def is_ready(self) -> bool:
        return not (self._llm is None or self.draining or self.asleep or self.is_broken)

    @property
    def is_broken(self) -> bool:
        """Whether the engine has ended, so that only a restart helps."""
        return self._llm is not None and self._llm.engine.failed

    @property
    def llm(self) -> LLM:
        """The model. Raises: Refusal, 503, while it cannot answer."""
        if self._llm is None or not self.is_ready:
            what = "shutting down" if self.draining else "asleep" if self.asleep else "loading"
            what = "broken" if self.is_broken else what
            raise Refusal(503, f"the server is {what}", code=what.replace(" ", "_"), retry_after=5)
        return self._llm

    @property
    def loaded(self) -> LLM | None:
        return self._llm

    def serves(self, model: str) -> bool:
        """Whether a model's name is one of ours, or an adapter's."""
        adapters = () if self._llm is None else self._llm.engine.adapters
        return model in self.names or model in self.typed or model in adapters

    def adapter(self, model: str | None) -> str | None:
        """The adapter that a model's name stands for; None for the model itself.

        Raises:
            Refusal: 404, there is no such model.
        """
        llm = self.llm
        if model is None or model in self.names:
            return None
        if model in llm.engine.adapters:
            return model
        if model in self.typed:
            return None
        there = ", ".join([*self.names, *llm.engine.adapters])[:500]
        message = f"there is no model {model!r} here; there are: {there}. "
        owner = next((o for start, o in ELSEWHERE.items() if model.lower().startswith(start)), "")
        if owner:
            message += f"{model} runs at {owner}, not here: set the client's model to "
            message += f"{self.names[0]!r}, or "
        else:
            message += "To answer to another name, "
        message += f"start the server with --served-model-name {shlex.quote(model)}"
        raise Refusal(404, message, type="invalid_model", code="model_not_found", param="model")

    async def chat(
        self, client: Client, body: Any, *, prefix: str, salt: str | None = None
    ) -> Generation:
        """Begin to answer a conversation; `body.arguments(llm)` gives arguments of `LLM.chat`."""

        def ask(llm: LLM, options: dict[str, Any]) -> Reply:
            return llm.chat(**body.arguments(llm), **options)

        return await self.start(client, body, ask, prefix=prefix, salt=salt)

    async def start(
        self,
        client: Client,
        body: Body,
        ask: Callable[[LLM, dict[str, Any]], Reply],
        *,
        prefix: str,
        salt: str | None = None,
        is_part: bool = False,
    ) -> Generation:
        """Begin to answer.

        Args:
            ask: calls the model on a worker thread, with keyword arguments to pass on.
            prefix: of the answer's id.
            is_part: an earlier part of the same request was admitted.

        Raises:
            OpenNemoError: the request is invalid, beyond a limit, or cannot be answered now.
        """
        adapter, llm = self.adapter(body.model), self.llm
        ignored = body.ignored(strict=self.settings.strict_params)
        ignored = [name for name in ignored if name not in body.applied(llm)]
        n_expected = body.n_expected(llm) if client.limits.tokens_per_minute else 0
        self.gatekeeper.admit(client, n_expected, is_part=is_part)
        self._n_starting += 1
        # Keys share no pages: timing would reveal to one what the other asked. Two keys may have
        # one name, so the key itself is used here.
        own = "" if self.settings.share_prefix_cache else client.digest.hex()
        options = {"adapter": adapter, "salt": f"{own}/{salt or ''}".encode()}
        task = asyncio.create_task(asyncio.to_thread(ask, llm, options))
        try:
            reply = await asyncio.shield(task)
        except BaseException as error:
            self.gatekeeper.release(client, 0, n_expected)
            if isinstance(error, asyncio.CancelledError):  # the thread runs on; its reply must not
                task.add_done_callback(
                    lambda t: t.cancelled() or t.exception() or t.result().cancel()
                )
            raise
        finally:
            self._n_starting -= 1
        generation = Generation(
            f"{prefix}{secrets.token_hex(12)}",
            body.model or self.names[0],
            reply,
            lambda generation: self._ended(generation, client, n_expected),
            keep_alive=self.settings.sse_keep_alive_interval,
        )
        if ignored:
            names = [n for n in ignored if n.isascii() and n.isidentifier()][:20]
            generation.headers["x-ignored-params"] = ", ".join(names)
        room = llm.engine.max_context - reply.n_prompt_tokens
        if (body.longest or 0) > room:
            generation.headers["x-max-tokens"] = str(room)
        if reply.not_held:
            text = ", ".join(reply.not_held).encode("ascii", "replace").decode()
            generation.headers["x-not-held"] = "".join(filter(str.isprintable, text))[:1000]
        self.active.add(generation)
        return generation

    def _ended(self, generation: Generation, client: Client, n_expected: int) -> None:
        self.active.discard(generation)
        reply, seconds = generation.reply, time.perf_counter() - generation.started
        n_used = reply.n_prompt_tokens + generation.n_output_tokens
        self.gatekeeper.release(client, n_used, n_expected)
        self.metrics.finished(generation, seconds)
        log.info(
            "answer",
            id=generation.id,
            client=client.name,
            n_prompt=reply.n_prompt_tokens,
            n_cached=reply.n_cached_tokens,
            n_output=generation.n_output_tokens,
            seconds=round(seconds, 4),
            end=[answer.finish_reason for answer in generation.answers],
            failure=type(generation.failure).__name__ if generation.failure else None,
        )

    async def drain(self) -> None:
        """Accept no requests, let answers finish within `shutdown_timeout`, then end them."""
        self.draining = True
        await self._wait_until_idle(self.settings.shutdown_timeout)
        for generation in list(self.active):
            generation.abort(Refusal(503, "the server is shutting down"))
        await self._wait_until_idle(5)

    async def sleep(self) -> None:
        """Let answers finish, then stop the engine and free its memory."""
        llm = self.llm
        self.asleep = True
        await self._wait_until_idle(self.settings.shutdown_timeout)
        await asyncio.to_thread(llm.engine.sleep)

    async def wake(self) -> None:
        if self._llm is not None and self.asleep:
            await asyncio.to_thread(self._llm.engine.wake)
            self.asleep = False

    async def _wait_until_idle(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (self.active or self._n_starting) and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    @property
    def is_alive(self) -> bool:
        """False once the engine has ended, or while a step takes over `watchdog_timeout` s."""
        engine = None if self._llm is None else self._llm.engine
        hangs = engine and engine.seconds_in_step >= self.settings.watchdog_timeout
        return not (hangs or self.is_broken)

    def close(self) -> None:
        if self._llm is not None:  # asleep or not: there may be replicas, or ranks
            self._llm.close()


def service_of(request: Request) -> Service:
    """The service behind a request; a dependency of routes."""
    return request.app.state.service


def client_of(request: Request) -> Client:
    """The client that the gate has identified; a dependency of routes."""
    return request.state.client


TheService = Annotated[Service, Depends(service_of)]
TheClient = Annotated[Client, Depends(client_of)]
