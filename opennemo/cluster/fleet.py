"""Many replicas of a model on Ray Serve, behind the interface of one engine.

    Service -> LLM -> Fleet.submit -> Ray's handle, routed by prefix -> Replica, an LLM of its own
                      Fleet's loop <- events, as many as have come <-

The application with its gate, limits and protocols stays in the process that was started, as it is
with one engine; it sends token ids and receives the engine's events. Ray places the replicas,
watches and replaces them, adds some as requests queue, and lets one that is to end finish its
requests. A request whose replica is lost goes to another one if no token of it has come; else it
fails with an error: an answer that a client has begun to see is never started again.
"""

# Ray is an extra, which few users install.
# pyright: reportMissingImports=false
import asyncio
import itertools
import os
import socket
import threading
from collections.abc import Callable
from collections.abc import Sequence as Many
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog

from opennemo.cluster.replica import Replica
from opennemo.cluster.session import cpus_of, gpus_of, reason, start_ray
from opennemo.engine import SamplingParams, Token
from opennemo.engine.engine import check_request
from opennemo.engine.scoring import Pair, Score
from opennemo.engine.token import TokenCallback
from opennemo.errors import OpenNemoError, Overloaded, Unavailable
from opennemo.llm import LLM
from opennemo.model.transformer import ModelConfig
from opennemo.serve.loading import adapters_of
from opennemo.serve.settings import Settings

TRIES = 3  # replicas that may be lost under one request before it is given up
PART = 1 << 16  # tokens that a replica scores at a time, about
STATS = 2.0  # seconds between looks at what the replicas count
log = structlog.get_logger("opennemo.serve")


def open_fleet(settings: Settings) -> LLM:
    """Start the replicas, and wait until they are loaded.

    Raises:
        OpenNemoError: Ray is missing, there is no cluster, or a replica cannot be started.
    """
    fleet = Fleet(settings)
    llm = LLM.around(settings.model, fleet)  # an error in the model is raised before Ray starts
    try:
        fleet.start()
    except BaseException:
        fleet.close()
        raise
    return llm


class Fleet:
    """An `Engine` over all replicas."""

    eos_ids: frozenset[int]
    vocab_size: int
    max_context: int
    model_config: ModelConfig
    failed, seconds_in_step = False, 0.0  # Ray watches each replica and replaces it

    def __init__(self, settings: Settings):
        self._settings, self._generation = settings, 0
        # Servers that share a cluster have replicas of their own, and find them again.
        port = settings.port or f"process-{os.getpid()}"
        self._app = f"opennemo-{socket.gethostname()}-{port}"
        self._n_most = settings.max_replicas or settings.replicas
        self._per_replica = settings.max_num_seqs + settings.max_num_queued_reqs
        self._ids = itertools.count(1)
        self._running: dict[int, _Running] = {}
        self.adapters = {n: str(f.absolute()) for n, f in adapters_of(settings).items()}  # folders
        self._stats: list[dict[str, float]] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="opennemo-fleet", daemon=True
        )
        self._ray: Any = None

    def start(self) -> None:
        """Join or start a cluster, and deploy."""
        self._ray, settings = start_ray(self._settings), self._settings
        from ray import serve  # not before: Ray reads its settings when it is imported

        serve.start(proxy_location="Disabled")
        self._thread.start()
        self.deploy()
        (described, *_) = self.broadcast("describe")
        for name, value in described.items():
            setattr(self, name, value)
        asyncio.run_coroutine_threadsafe(self._look(), self._loop)
        log.info("replicas", n=settings.replicas, cluster=settings.ray_address or "own")

    def deploy(self) -> None:
        """Start the replicas, or replace those that run; waits until the last is ready.

        Raises:
            OpenNemoError: one cannot be started; those that ran continue.
        """
        from ray import serve

        from opennemo.cluster.prefixes import Prefixes

        settings, self._generation = self._settings, self._generation + 1
        scaling: dict[str, Any] = {"num_replicas": settings.replicas}
        if self._n_most > settings.replicas:
            scaling = {
                "autoscaling_config": {
                    "min_replicas": settings.replicas,
                    "max_replicas": self._n_most,
                    # Answers beyond it are not computed side by side, but wait.
                    "target_ongoing_requests": settings.max_num_seqs,
                }
            }
        deployment = serve.deployment(
            Replica,
            name="engine",
            max_ongoing_requests=self._per_replica,
            ray_actor_options={"num_cpus": cpus_of(settings), "num_gpus": gpus_of(settings)},
            request_router_config={
                "request_router_class": Prefixes,
                "request_routing_stats_period_s": STATS,
            },
            health_check_period_s=2,
            graceful_shutdown_wait_loop_s=0.5,
            graceful_shutdown_timeout_s=settings.shutdown_timeout,
            max_constructor_retry_count=2,
            logging_config={"log_level": "WARNING", "enable_access_log": False},
            **scaling,
        )
        kept = {"api_key": [], "api_key_file": None, "admin_key": None}
        kept["replica_cpus"] = cpus_of(settings)
        # Keys stay here.
        replica = deployment.bind(settings.model_copy(update=kept), self._generation)
        try:
            handle = serve.run(replica, name=self._app, route_prefix=None)
        except RuntimeError as error:
            raise OpenNemoError(f"the replicas cannot be started: {reason(error)}") from None
        self._handle, self._asked = handle, handle.options(method_name="answer", stream=True)

    def submit(
        self, prompt_ids: list[int], params: SamplingParams, on_token: TokenCallback, *, n: int = 1,
        adapter: str | None = None, salt: bytes = b"",
    ) -> int:  # fmt: skip
        """As Engine.submit; events come on the fleet's thread."""
        check_request(self, prompt_ids, params, n, adapter)
        if len(self._running) >= self._per_replica * max(1, len(self._stats)):
            raise Overloaded(f"{len(self._running)} requests are under way; try again later")
        fields = vars(params) | {"logit_bias": dict(params.logit_bias)}
        fields["grammar"] = params.grammar and params.grammar.definition
        request_id = next(self._ids)
        running = self._running[request_id] = _Running(request_id, n, on_token)
        call = (prompt_ids, salt, fields, n, adapter and (adapter, self.adapters[adapter]))
        self._loop.call_soon_threadsafe(self._begin, running, call)
        return request_id

    def score(
        self, pairs: Many[Pair], on_score: Callable[[int, Score], None] | None = None
    ) -> list[Score]:
        """As Engine.score, by parts of neighbours; `on_score` is called on the fleet's thread."""
        order = sorted(range(len(pairs)), key=lambda i: pairs[i])
        # Some for each replica, so that they end together; within a part nothing is computed twice.
        n_tokens = sum(len(context) + len(continuation) for context, continuation in pairs)
        n_parts = max(4 * self._n_most, n_tokens // PART)
        size = max(16, len(pairs) // n_parts)
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        scores, free = [Score(0.0, True)] * len(pairs), asyncio.Semaphore(2 * self._n_most)

        async def score_part(part: list[int]) -> None:
            async with free:
                part_scores = await self._score([pairs[i] for i in part])
            for i, score in zip(part, part_scores, strict=True):
                scores[i] = score
                if on_score:
                    on_score(i, score)

        async def score_all() -> None:
            async with asyncio.TaskGroup() as group:
                for part in parts:
                    group.create_task(score_part(part))

        try:
            asyncio.run_coroutine_threadsafe(score_all(), self._loop).result()
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        return scores

    def load_adapter(self, name: str, folder: Path) -> None:
        """Load it on all replicas; those that come later load it on its first request."""
        path = str(folder.absolute())
        self.broadcast("load_adapter", (name, path))
        self.adapters[name] = path

    def unload_adapter(self, name: str) -> bool:
        return self.adapters.pop(name, None) is not None

    def reset_prefix_cache(self) -> None:
        self.broadcast("reset_prefix_cache")

    def sleep(self) -> None:
        self.broadcast("sleep")

    def wake(self) -> None:
        self.broadcast("wake")

    def cancel(self, request_id: int, index: int | None = None) -> None:
        """As Engine.cancel; of several answers, the replica goes on computing a cancelled one."""
        self._loop.call_soon_threadsafe(self._cancel, request_id, index)

    def broadcast(self, method: str, *args: Any) -> list[Any]:
        """Call a method of all replicas; returns what each returns.

        Raises:
            OpenNemoError: as one of them did, or one is lost.
        """
        from ray.exceptions import RayError

        try:
            return self._handle.broadcast(method, *args).results(timeout_s=600)
        except OpenNemoError as error:
            raise getattr(error, "cause", error) from None
        except (RayError, TimeoutError) as error:
            raise Unavailable(f"a replica did not {method.replace('_', ' ')}") from error

    def stats(self) -> dict[str, float]:
        """As Engine.stats, of all replicas, a moment ago."""
        replicas = self._stats
        total = {name: sum(stats[name] for stats in replicas) for name in (replicas or [{}])[0]}
        return {"kv_cache_pages": 1, "kv_cache_pages_used": 0, **total, "replicas": len(replicas)}

    def close(self) -> None:
        """End the replicas, and the cluster if it is ours; running requests are cancelled."""
        if self._ray is None:
            return
        if self._thread.is_alive():
            with suppress(TimeoutError):
                asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        if self._settings.ray_address:  # else they end with the cluster
            from ray import serve

            with suppress(Exception):  # whatever Ray raises here, the cluster is ending
                serve.delete(self._app)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._ray.shutdown()
        self._ray = None

    async def _end(self) -> None:
        for request_id in [*self._running]:
            self._cancel(request_id)
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, running: "_Running", call: tuple) -> None:
        if not running.finished:
            running.task = self._loop.create_task(self._answer(running, call))

    async def _answer(self, running: "_Running", call: tuple) -> None:
        from ray.exceptions import RayActorError
        from ray.serve.exceptions import RayServeException

        failure: Any = "the replica ended without a word"
        for _ in range(TRIES):
            stream: Any = self._asked.remote(*call)
            try:
                async for tokens in stream:
                    for token in tokens:
                        running.tell(token)
            except asyncio.CancelledError:
                stream.cancel()
                break
            except (RayActorError, RayServeException):
                failure = Unavailable("the replica that was answering is lost; ask again")
                log.warning("replica lost", request=running.id, heard=running.heard)
                if not running.heard:
                    continue
            except Exception as error:  # its own errors come wrapped in Ray's
                failure = getattr(error, "cause", error)
                if not isinstance(failure, OpenNemoError):
                    log.error("defect", exc_info=error)
                    failure = "a replica has a defect; see its log"
            break
        running.end("error", failure)
        self._running.pop(running.id, None)

    async def _score(self, pairs: list[Pair]) -> list[Score]:
        from ray.exceptions import RayActorError
        from ray.serve.exceptions import RayServeException

        for _ in range(TRIES):
            try:
                return await self._handle.score.remote(pairs[0][0], b"", pairs)
            except (RayActorError, RayServeException):
                log.warning("replica lost", n_continuations=len(pairs))
            except OpenNemoError as error:
                raise getattr(error, "cause", error) from None
        raise Unavailable(f"{TRIES} replicas were lost one after the other")

    def _cancel(self, request_id: int, index: int | None = None) -> None:
        running = self._running.get(request_id)
        if running is None:
            return
        running.end("cancelled", index=index)
        if running.finished:
            self._running.pop(request_id)
            if running.task:
                running.task.cancel()

    async def _look(self) -> None:
        """Refresh the numbers that the replicas count."""
        while True:
            with suppress(Exception):  # a replica that is being lost; the next look is soon
                self._stats = await self._handle.broadcast("stats").results_async(timeout_s=30)
            await asyncio.sleep(STATS)


class _Running:
    """A request that is being answered."""

    def __init__(self, id: int, n: int, on_token: TokenCallback):
        self.id, self.heard = id, False
        self.task: asyncio.Task | None = None
        self._open, self._on_token = set(range(n)), on_token

    @property
    def finished(self) -> bool:
        return not self._open

    def tell(self, token: Token) -> None:
        self.heard = True
        if token.index in self._open:
            if token.finish_reason:
                self._open.discard(token.index)
            self._on_token(replace(token, request_id=self.id))

    def end(self, reason: Any, error: Any = None, index: int | None = None) -> None:
        for i in sorted(self._open):
            if index in (None, i):
                self.tell(Token(request_id=self.id, index=i, finish_reason=reason, error=error))
