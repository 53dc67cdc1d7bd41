"""Many requests at once: `submit`, `cancel`, and `step`, which moves everybody forward.

    step:  inbox -> Scheduler.next_step -> Runner.run -> sample -> tokens

The core is free of threads: tests and batch jobs call `step` themselves. `start` puts one thread
around it for everybody else; `submit` and `cancel` may be called from any thread at any time, and
callbacks run on the engine's thread. A request that fails (no room, numbers that are not finite)
gets the error in a token of its own and the others go on. The engine knows ids, not text.
"""

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Many
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from opennemo.engine.kv_cache import KVCache
from opennemo.engine.ranks import Ranks
from opennemo.engine.runner import Runner
from opennemo.engine.sampler import bias_, sample, token_logprobs
from opennemo.engine.scheduler import Scheduler
from opennemo.engine.scoring import MAX_LOGITS, Pair, Score, Scoring
from opennemo.engine.sequence import Chunk, SamplingParams, Sequence, check_ids, check_request
from opennemo.engine.token import FinishReason, Token, TokenCallback, TokenLogprobs
from opennemo.errors import ContextTooLong, InvalidRequest, OpenNemoError, Overloaded
from opennemo.model.attention import FUSED_PAGE_SIZE
from opennemo.model.formats import SCALED_KV, plain
from opennemo.model.lora import Adapter
from opennemo.model.memory import USABLE, machine_memory
from opennemo.model.pages import Pages
from opennemo.model.transformer import Transformer

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Sizes of the engine."""

    max_context: int | None = None  # tokens of one sequence; None: what the model was trained for
    n_pages: int | None = None  # None: one sequence of `max_context` and some more, if they fit
    page_size: int | None = None  # tokens; None: what fused attention takes on a GPU, else 16
    # Of FORMATS; None: fp8 if the model brings scales, else what its embedding is in.
    kv_format: str | None = None
    kv_scale: float | None = None  # for fp8 where the model brings none
    max_batched_tokens: int = 512  # computed in one step
    max_sequences: int = 64  # that run at the same time
    max_queued: int = 1024  # that wait; one more is refused
    prefix_caching: bool = True
    n_draft_tokens: int = 0  # guessed by prompt lookup and checked in one step; 0: off
    adapters: bool = False  # whether requests may name one; on a CPU this keeps weights twice
    tensor_parallel_size: int = 1  # ranks that share every layer


def _affordable_pages(
    model: Transformer, max_context: int, page_size: int, one: Pages, n_ranks: int
) -> int:
    """Pages for one sequence of `max_context` and 64 more, or as many as memory has room for."""
    weight = model.tok_embeddings.weight
    device = f"cuda:{weight.device.index or 0}" if weight.is_cuda else "cpu"
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    share = 1 if weight.is_cuda else n_ranks  # on a CPU all ranks are in one memory
    room = int(USABLE * machine_memory()[device]) // share - weights
    return max(1, min(-(-max_context // page_size) + 64, room // one.nbytes))


class Engine:
    """A model that answers many requests side by side."""

    def __init__(
        self,
        model: Transformer,
        eos_ids: Iterable[int],
        config: EngineConfig | None = None,
        kv_scale: Tensor | None = None,
        ranks: Ranks | None = None,
    ):
        """`kv_scale` (L, 2) are the scales of keys and of values, for a cache in fp8.

        With `ranks` the model is the share of rank 0.

        Raises:
            InvalidRequest: the KV cache's format is unknown, or fp8 and without scales.
        """
        self.config = config = config or EngineConfig()
        self.eos_ids = frozenset(eos_ids)
        longest = model.config.max_position_embeddings
        self.max_context = min(config.max_context or longest, longest)
        weight = model.tok_embeddings.weight
        own = plain(weight.dtype)
        assert own is not None, weight.dtype
        own = own.name if kv_scale is None else SCALED_KV
        if kv_scale is None and config.kv_scale is not None:
            kv_scale = torch.full((model.config.n_layers, 2), config.kv_scale)
        page_size = config.page_size or (FUSED_PAGE_SIZE if weight.is_cuda else 16)
        format = config.kv_format or own
        make_pages = lambda n: Pages.empty(  # noqa: E731
            model.config, n, page_size, format, weight.device, kv_scale
        )
        n_pages = config.n_pages or _affordable_pages(
            model, self.max_context, page_size, make_pages(1), config.tensor_parallel_size
        )
        self.max_context = min(self.max_context, n_pages * page_size)
        self.model_config, self.vocab_size = model.config, model.config.vocab_size
        self.cache = KVCache(n_pages, page_size, config.prefix_caching)
        self.scheduler = Scheduler(
            self.cache, config.max_batched_tokens, config.max_sequences, config.n_draft_tokens
        )
        n_spare = 1 if weight.is_cuda else 0  # a page that belongs to nobody: model/gpu.py
        self.ranks, n = ranks, n_pages + n_spare
        if ranks is not None:
            ranks.begin(n, page_size, format, kv_scale)
        self.runner = Runner(model, partial(make_pages, n), config.adapters, ranks)
        self._ids = itertools.count(1)
        self._sequences: dict[int, list[Sequence]] = {}  # alive, by request
        self._inbox: deque[Callable[[], None]] = deque()  # what to do before the next step
        self._step_began: float | None = None
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self.failed = False  # its thread ended without being told to
        self._masks = ThreadPoolExecutor(1, "opennemo-grammar")

    def submit(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        on_token: TokenCallback,
        *,
        n: int = 1,
        adapter: Adapter | None = None,
        salt: bytes = b"",
    ) -> int:
        """Queue a prompt for n answers; returns the request's id. Thread-safe.

        `on_token` is called with every token; the last of each answer has a `finish_reason`. It is
        called on the thread that steps and must return quickly. Prefixes are shared only between
        requests of the same `salt`.

        Raises:
            ContextTooLong: the prompt leaves no room for a single token.
            InvalidRequest: an empty prompt, an id outside the vocabulary, too many answers.
            Overloaded: the queue is full.
        """
        room = check_request(
            prompt_ids, params, n, max_context=self.max_context, vocab_size=self.vocab_size
        )
        if len(self.scheduler.waiting) + len(self._inbox) >= self.config.max_queued:
            raise Overloaded(
                f"{self.config.max_queued} requests are waiting already; try again later"
            )
        if adapter is not None and not self.config.adapters:
            raise InvalidRequest("this engine was started without adapters")
        if adapter is not None:  # the same prompt has other keys and values under an adapter
            salt += b"/adapter %d" % adapter.number
        max_tokens = min(params.max_tokens or room, room)
        request_id = next(self._ids)
        answers = [
            Sequence(request_id, list(prompt_ids), params, on_token, max_tokens, i, salt, adapter)
            for i in range(n)
        ]
        for follower in answers[1:]:
            follower.leader = answers[0]
        self.call(lambda: self._add(answers))
        return request_id

    def score(
        self, pairs: Many[Pair], on_score: Callable[[int, Score], None] | None = None
    ) -> list[Score]:
        """Log-probabilities of continuations, each (ids of its context, its own ids). Thread-safe.

        Waits for the last; `on_score` hears of each by its index, on the thread that steps.

        Raises:
            ContextTooLong: a context with its continuation, but for the last token.
            InvalidRequest: an empty context or continuation, an id outside the vocabulary.
        """
        for context, continuation in pairs:
            ids = context + continuation
            if not context or not continuation:
                raise InvalidRequest("a context and a continuation need at least one token each")
            if len(ids) - 1 > self.max_context:
                raise ContextTooLong(len(ids) - 1, self.max_context)
            check_ids(ids, self.vocab_size)
        max_tokens = min(self.config.max_batched_tokens, max(64, MAX_LOGITS // self.vocab_size))
        scoring = Scoring(pairs, self.cache, self.runner, max_tokens, on_score)
        done = Future[list[Score]]()

        def go_on() -> None:  # a step of the scoring, between two steps of everybody else's
            try:
                if scoring.step():
                    self.call(go_on)
                else:
                    done.set_result(scoring.scores)
            except BaseException as error:  # noqa: BLE001  whoever waits is to hear of it
                scoring.close()
                done.set_exception(error)

        self.call(go_on)
        while self._thread is None and not done.done():
            self.step()
        return done.result()

    def cancel(self, request_id: int, index: int | None = None) -> None:
        """Stop a request, or one of its answers; the pages are free at the next step.

        Unknown or ended ids are ignored. Thread-safe.
        """
        self.call(lambda: self._cancel(request_id, index))

    def call(self, function: Callable[[], None]) -> None:
        """Run something small between two steps, on the thread that steps. Thread-safe."""
        with self._wake:
            if self._stopping:
                raise OpenNemoError("the engine has stopped")
            self._inbox.append(function)
            self._wake.notify()

    def stats(self) -> dict[str, float]:
        """What happens now and has happened since the start, in numbers that are kept anyway."""
        scheduler, cache = self.scheduler, self.cache
        return {
            "requests_running": len(scheduler.running),
            "requests_waiting": len(scheduler.waiting),
            "kv_cache_pages": cache.n_pages,
            "kv_cache_pages_used": cache.n_used,
            "prefix_cache_queries": cache.n_asked_tokens,
            "prefix_cache_hits": cache.n_hit_tokens,
            "preemptions": scheduler.n_preemptions,
        }

    @property
    def seconds_in_step(self) -> float:
        """How long the step in progress has taken; 0 between steps."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    def step(self) -> bool:
        """Move every running request forward; False when there is nothing to do."""
        self._step_began = time.monotonic()
        try:
            return self._step()
        finally:
            self._step_began = None

    def _step(self) -> bool:
        self._read_inbox()
        chunks = self.scheduler.next_step()
        if not chunks:
            return bool(self.scheduler.waiting or self._inbox)
        masks = self._masks.submit(self._fill_masks, chunks)  # while the model runs
        try:
            logits = self.runner.run(chunks)
        except RuntimeError as error:  # out of memory, a kernel that fails: theirs, not everyone's
            log.exception("a step of %d sequences failed", len(chunks))
            for chunk in chunks:
                self._finish(chunk.sequence, "error", f"the model failed: {error}")
            self.failed = self.failed or self.runner.is_broken
            return True
        self._advance(chunks, logits, masks.result())
        return True

    def start(self) -> None:
        """Run steps on a thread of the engine's own until `stop`."""
        assert self._thread is None, "the engine is running already"
        self._stopping = self.failed = False
        self._thread = threading.Thread(target=self._loop, name="opennemo-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step in progress; what was not finished is cancelled."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._read_inbox()
        self._finish_all("cancelled")

    def close(self) -> None:
        """Stop for good; other ranks end."""
        self.stop()
        if self.ranks is not None:
            self.ranks.close()

    def _loop(self) -> None:
        try:
            self._step_until_stopped()
        except BaseException:  # not even an exit in some library may leave anybody waiting
            log.critical("the engine's thread has ended", exc_info=True)
            with self._wake:
                self.failed = self._stopping = True  # from now on `call` refuses
            self._read_inbox()
            self._finish_all("error", "the engine has ended; its log tells more")

    def _step_until_stopped(self) -> None:
        while True:
            with self._wake:
                if self._stopping:
                    return
            try:
                busy = self.step()
            except Exception:  # a defect of ours: nobody may be left waiting for an answer
                log.exception("a step failed")
                self._finish_all("error", "the engine failed; its log tells more")
                busy = True
            if not busy:
                with self._wake:
                    self._wake.wait_for(lambda: self._inbox or self._stopping)

    def _read_inbox(self) -> None:
        for _ in range(len(self._inbox)):  # what is put in meanwhile waits for the next step
            self._inbox.popleft()()

    def _add(self, answers: list[Sequence]) -> None:
        self._sequences[answers[0].request_id] = answers
        for sequence in answers:
            self.scheduler.add(sequence)

    def _cancel(self, request_id: int, index: int | None = None) -> None:
        for sequence in list(self._sequences.get(request_id, ())):
            if index in (None, sequence.index):
                self._finish(sequence, "cancelled")

    def _fill_masks(self, chunks: list[Chunk]) -> dict[Sequence, np.ndarray]:
        """Which tokens may come next, one bit each, for answers that follow a grammar."""
        masks = {}
        for chunk in chunks:
            matcher = chunk.sequence.matcher
            if matcher is not None and chunk.reaches_end:
                masks[chunk.sequence] = np.zeros(-(-self.vocab_size // 32), np.int32)
                matcher.fill(masks[chunk.sequence])
        return masks

    def _advance(
        self, chunks: list[Chunk], logits: Tensor, masks: dict[Sequence, np.ndarray]
    ) -> None:
        """Book what was computed, choose tokens where a chunk reached its end, and pass them on."""
        ends = list(itertools.accumulate(chunk.n_rows for chunk in chunks))
        ready = [(c, end - 1) for c, end in zip(chunks, ends, strict=True) if c.reaches_end]
        plain = [(chunk, row) for chunk, row in ready if not chunk.draft]
        sequences = [chunk.sequence for chunk, _ in plain]
        bits = {i: masks[s] for i, s in enumerate(sequences) if s in masks}
        index = torch.tensor([row for _, row in plain], dtype=torch.int64)
        index = index.to(logits.device, non_blocking=True)
        tokens = sample(logits[index], sequences, self.eos_ids, bits)
        # On a GPU nothing waits for the step before its last number is needed, here.
        numbers = torch.cat((logits.amax(-1).isfinite(), tokens)).tolist()
        healthy, tokens = numbers[: len(logits)], numbers[len(logits) :]
        for chunk, end in zip(chunks, ends, strict=True):
            sequence, start = chunk.sequence, end - chunk.n_rows
            if not all(healthy[start:end]):
                self._finish(sequence, "error", "the model computed a number that is not finite")
                continue
            if sequence in masks and not masks[sequence].any():
                reason = sequence.matcher and sequence.matcher.error
                self._finish(sequence, "error", f"the grammar allows no token: {reason}")
                continue
            if sequence.params.prompt_logprobs is not None and sequence.n_output == 0:
                self._note_prompt_logprobs(chunk, logits[start:end])
            sequence.n_computed += chunk.n_new
            self.cache.publish(sequence)
        for (chunk, row), token in zip(plain, tokens, strict=True):
            sequence, n_top = chunk.sequence, chunk.sequence.params.logprobs
            if not sequence.finished:
                logprobs = None if n_top is None else token_logprobs(logits[row], token, n_top)
                self._append(sequence, token, logprobs)
        for chunk, row in ready:
            if chunk.draft and not chunk.sequence.finished:
                self._check_draft(chunk, logits[row - len(chunk.draft) : row + 1])

    def _check_draft(self, chunk: Chunk, logits: Tensor) -> None:
        """Keep the drafted tokens as far as greedy choice agrees, and the one token after them."""
        sequence, logits = chunk.sequence, logits.clone()
        for row in logits:  # what depends on the answer so far is not drafted
            bias_(row, sequence, self.eos_ids)
        for guess, token in zip((*chunk.draft, None), logits.argmax(-1).tolist(), strict=True):
            self._append(sequence, token, None)
            if sequence.finished or token != guess:
                return
            sequence.n_computed += 1
            self.cache.publish(sequence)

    def _note_prompt_logprobs(self, chunk: Chunk, logits: Tensor) -> None:
        """Keep how likely the model found each token of the prompt; row i predicts token i + 1."""
        sequence = chunk.sequence
        n_top = sequence.params.prompt_logprobs or 0
        following = sequence.tokens[sequence.n_computed + 1 :]
        for row, token in zip(logits, following, strict=False):
            sequence.prompt_logprobs.append(token_logprobs(row, token, n_top))

    def _append(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> None:
        """Add a chosen token, and end the answer where it says so."""
        sequence.tokens.append(token)
        params, reason, matcher = sequence.params, None, sequence.matcher
        if matcher is not None and (error := matcher.advance(token)):
            self._finish(sequence, "error", f"the grammar cannot go on: {error}")
            return
        ends = token in params.stop_ids or (token in self.eos_ids and not params.ignore_eos)
        if ends or (matcher is not None and matcher.complete):
            reason = "stop"
        elif sequence.n_output >= sequence.max_tokens:
            reason = "length"
        first = sequence.n_output == 1 and params.prompt_logprobs is not None
        news = Token(
            request_id=sequence.request_id,
            index=sequence.index,
            id=token,
            logprobs=logprobs,
            prompt_logprobs=tuple(sequence.prompt_logprobs) if first else None,
            finish_reason=reason,
            n_cached_tokens=sequence.n_cached,
        )
        if reason:
            self._forget(sequence)
        sequence.on_token(news)

    def _finish(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> None:
        """End an answer from outside: cancelled, or failed."""
        self._forget(sequence)
        sequence.on_token(
            Token(
                request_id=sequence.request_id,
                index=sequence.index,
                finish_reason=reason,
                error=error,
                n_cached_tokens=sequence.n_cached,
            )
        )

    def _finish_all(self, reason: FinishReason, error: str | None = None) -> None:
        for sequence in [s for alive in self._sequences.values() for s in alive]:
            self._finish(sequence, reason, error)

    def _forget(self, sequence: Sequence) -> None:
        sequence.finished = True
        self.scheduler.remove(sequence)
        alive = self._sequences[sequence.request_id]
        alive.remove(sequence)
        if not alive:
            del self._sequences[sequence.request_id]
