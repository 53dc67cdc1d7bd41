"""One engine of many, in a process that Ray watches: its requests, and its answers.

It gets requests and sends the engine's events, as many at a time as have come. What the application
asks of all replicas (adapters, an empty cache, sleep) each does for itself. Ray checks its health
and lets it end when it has answered its requests. This file knows no text.
"""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from opennemo.cluster.session import listen_on_loopback
from opennemo.engine import SamplingParams, Token
from opennemo.engine.scoring import Pair, Score
from opennemo.errors import OpenNemoError
from opennemo.serve.loading import adapters_of, load_model
from opennemo.serve.settings import Settings


class Replica:
    """One engine, in a process that Ray watches."""

    def __init__(self, settings: Settings, generation: int):
        """Ray takes a new `generation` for new code, and replaces the old one by it."""
        if settings.ray_address is None:
            listen_on_loopback()
        if settings.replica_cpus:
            torch.set_num_threads(settings.replica_cpus)
        self._llm = load_model(settings)
        self._folders = {n: str(f.absolute()) for n, f in adapters_of(settings).items()}
        self._loading = threading.Lock()
        self._stale = settings.watchdog_timeout

    async def answer(
        self, ids: list[int], salt: bytes, params: dict[str, Any], n: int,
        adapter: tuple[str, str] | None,
    ) -> AsyncIterator[list[Token]]:  # fmt: skip
        """Answer a prompt: lists of tokens as they come. Closing it frees the pages."""
        loop, tokens = asyncio.get_running_loop(), asyncio.Queue[Token]()

        def begin() -> int:
            if adapter:
                self.load_adapter(adapter)
            if params["grammar"]:
                params["grammar"] = self._llm.grammars.compile(*params["grammar"])

            def listen(token: Token) -> None:
                with suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(tokens.put_nowait, token)

            name = adapter and adapter[0]
            asked = SamplingParams(**params)
            return self._llm.engine.submit(ids, asked, listen, n=n, adapter=name, salt=salt)

        request_id = await asyncio.to_thread(begin)
        try:
            n_open = n
            while n_open:
                news = [await tokens.get()]
                while not tokens.empty():
                    news.append(tokens.get_nowait())
                n_open -= sum(token.finish_reason is not None for token in news)
                yield news
        finally:
            with suppress(OpenNemoError):  # the engine has stopped
                self._llm.engine.cancel(request_id)

    async def score(self, ids: list[int], salt: bytes, pairs: list[Pair]) -> list[Score]:
        """As Engine.score; the arguments before `pairs` are for the router."""
        return await asyncio.to_thread(self._llm.score, pairs)

    def load_adapter(self, adapter: tuple[str, str]) -> None:
        name, folder = adapter
        with self._loading:
            if self._folders.get(name) != folder:
                self._llm.engine.load_adapter(name, Path(folder))
                self._folders[name] = folder

    def reset_prefix_cache(self) -> None:
        self._llm.engine.reset_prefix_cache()

    def sleep(self) -> None:
        self._llm.engine.sleep()

    def wake(self) -> None:
        self._llm.engine.wake()

    def describe(self) -> dict[str, Any]:
        """What the fleet must know about the engine."""
        engine = self._llm.engine
        names = ("eos_ids", "vocab_size", "max_context", "model_config")
        return {name: getattr(engine, name) for name in names}

    def stats(self) -> dict[str, float]:
        return self._llm.engine.stats()

    def record_routing_stats(self) -> dict[str, int]:
        """Reported to Ray, for `Prefixes`."""
        return {"n_tokens": int(self._llm.engine.stats()["kv_cache_tokens"])}

    def check_health(self) -> None:
        """Asked by Ray, which replaces a replica that raises."""
        if self._llm.engine.failed or self._llm.engine.seconds_in_step > self._stale:
            raise RuntimeError("the engine has ended, or hangs")

    def __del__(self) -> None:
        if hasattr(self, "_llm"):
            self._llm.close()
