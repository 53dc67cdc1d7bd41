"""The engine of this process: many requests at once over one model and one paged KV cache.

    step:  calls -> Scheduler.next_step -> Runner.run -> sample -> tokens

A request that fails (no room, numbers that are not finite) gets the error in a token of its own,
and the others continue. The engine knows ids, not text.
"""

import itertools
import logging
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Many
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opennemo.engine.drafts import Drafter, SmallModel, fill_masks
from opennemo.engine.engine import check_pair, check_request
from opennemo.engine.kv_cache import KVCache
from opennemo.engine.loop import Loop
from opennemo.engine.params import SamplingParams
from opennemo.engine.prefix_store import fingerprint, open_store
from opennemo.engine.ranks import Ranks
from opennemo.engine.runner import Runner
from opennemo.engine.sampler import sample, token_logprobs
from opennemo.engine.scheduler import Scheduler
from opennemo.engine.scoring import Pair, Score, Scoring, target_logprobs
from opennemo.engine.sequence import Chunk, Sequence
from opennemo.engine.sizes import EngineConfig, cache_size
from opennemo.engine.token import FinishReason, Token, TokenCallback, TokenLogprobs
from opennemo.errors import InvalidRequest, OpenNemoError, Overloaded
from opennemo.model.lora import Adapter, load_adapter
from opennemo.model.transformer import Transformer

log = logging.getLogger(__name__)
MAX_LOGITS = 1 << 26  # of one step: 256 MiB


class LocalEngine(Loop):
    """An `Engine`; `start` it, or call `step` as long as it returns True."""

    def __init__(
        self,
        model: Transformer,
        eos_ids: Iterable[int],
        config: EngineConfig | None = None,
        kv_scale: Tensor | None = None,
        ranks: Ranks | None = None,
        n_tokens: int | None = None,
        draft: Transformer | None = None,
    ):
        """`kv_scale` (L, 2) are the scales of keys and of values, for a cache in fp8.

        With `ranks` the model is the share of rank 0. A model may have more rows than `n_tokens`,
        the tokens of its vocabulary; ids beyond it are neither accepted nor chosen. `draft` is a
        small model of the same vocabulary, which guesses the next tokens.

        Raises:
            InvalidRequest: the KV cache's format is unknown, or fp8 and without scales; `cache_dir`
                cannot be used.
        """
        super().__init__()
        self.config = config = config or EngineConfig()
        self.eos_ids = frozenset(eos_ids)
        self.model_config, self.vocab_size = model.config, model.config.vocab_size
        self.vocab_size = min(self.vocab_size, n_tokens or self.vocab_size)
        longest = model.config.max_position_embeddings
        longest = min(config.max_context or longest, longest)
        size = cache_size(model, config, longest, kv_scale)
        self.max_context = min(longest, size.n_pages * size.page_size)
        if ranks is not None:
            ranks.begin(size)
        self.ranks = ranks
        models = [model] if draft is None else [model, draft]
        # Before the first runner takes the weights into its own order.
        identity = fingerprint(*models) if config.cache_dir else b""
        self.runner = Runner(model, size, config.adapters, ranks, config.keep_model, config.kernels)
        n_guesses = config.n_draft_tokens
        if draft is None and self.runner.device.type != "cpu":
            n_guesses = n_guesses or 0  # a GPU's recorded steps have one token a sequence
        small_model = draft and SmallModel(draft, size, config, self.vocab_size)
        self.drafter = Drafter(n_guesses, self.eos_ids, small_model)
        self._runners = [self.runner, *([small_model.runner] if small_model else [])]
        self._store = open_store(config, identity, lambda: [r.pages for r in self._runners])
        self.cache = KVCache(size.n_pages, size.page_size, config.prefix_caching, self._store)
        self.scheduler = Scheduler(
            self.cache, config.step_tokens(self.runner.device.type), config.max_sequences,
            max_rows=max(config.max_sequences, MAX_LOGITS // self.vocab_size),
        )  # fmt: skip
        self.adapters: dict[str, Adapter] = {}
        self._ids = itertools.count(1)
        self._sequences: dict[int, dict[int, Sequence]] = {}  # alive, by request and index
        self._masks = ThreadPoolExecutor(1, "opennemo-grammar")

    def submit(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        on_token: TokenCallback,
        *,
        n: int = 1,
        adapter: str | None = None,
        salt: bytes = b"",
    ) -> int:
        room = check_request(self, prompt_ids, params, n, adapter)
        if len(self.scheduler.waiting) + len(self._calls) >= self.config.max_queued:
            raise Overloaded(
                f"{self.config.max_queued} requests are waiting already; try again later"
            )
        lora = None if adapter is None else self.adapters[adapter]
        if lora is not None:
            if not self.config.adapters:
                raise InvalidRequest("this engine was started without adapters")
            # The same prompt has other keys and values under an adapter.
            salt += b"/adapter %d" % lora.number
        max_tokens = min(params.max_tokens or room, room)
        request_id = next(self._ids)
        answers = [
            Sequence(request_id, list(prompt_ids), params, on_token, max_tokens, i, salt, lora)
            for i in range(n)
        ]
        for follower in answers[1:]:
            follower.leader, follower.n_shared = answers[0], len(prompt_ids)
        self.call(lambda: self._add(answers))
        return request_id

    def score(
        self, pairs: Many[Pair], on_score: Callable[[int, Score], None] | None = None
    ) -> list[Score]:
        for context, continuation in pairs:
            check_pair(self, context, continuation)
        scoring = Scoring(next(self._ids), pairs, on_score, self._cancel)
        if scoring.sequences:
            self.call(lambda: self._add(scoring.sequences))
        try:
            while self._thread is None and not scoring.done.done():
                self.step()
            return scoring.done.result()
        except BaseException:  # an interrupt: the rest is not needed
            if not scoring.done.done():
                with suppress(OpenNemoError):  # the engine has stopped
                    self.cancel(scoring.request_id)
            raise

    def cancel(self, request_id: int, index: int | None = None) -> None:
        self.call(lambda: self._cancel(request_id, index))

    def load_adapter(self, name: str, folder: Path) -> None:
        self.adapters[name] = load_adapter(folder, self.runner.model)

    def unload_adapter(self, name: str) -> bool:
        return self.adapters.pop(name, None) is not None

    def reset_prefix_cache(self) -> None:
        self.call(self.cache.reset)
        if self._store is not None:
            self.call(self._store.clear)

    def sleep(self) -> None:
        self.stop()
        self.cache.reset()
        for runner in self._runners:
            runner.sleep()

    def wake(self) -> None:
        for runner in self._runners:
            runner.wake()
        self.start()

    def close(self) -> None:
        self.stop()
        if self._store is not None:
            self._store.close()
        if self.ranks is not None:
            self.ranks.close()

    def stats(self) -> dict[str, float]:
        scheduler, cache = self.scheduler, self.cache
        return {
            "requests_running": len(scheduler.running),
            "requests_waiting": len(scheduler.waiting),
            "kv_cache_pages": cache.n_pages,
            "kv_cache_pages_used": cache.n_used,
            "kv_cache_tokens": cache.n_pages * cache.page_size,
            "prefix_cache_queries": cache.n_asked_tokens,
            "prefix_cache_hits": cache.n_hit_tokens,
            "preemptions": scheduler.n_preemptions,
            "draft_tokens": self.drafter.n_guessed,
            "draft_tokens_kept": self.drafter.n_kept,
        }

    def _step(self) -> bool:
        start = time.perf_counter()
        self.drafter.guess(self.scheduler.running, self.cache)
        guessed = time.perf_counter()
        chunks = self.scheduler.next_step()
        if not chunks:
            return bool(self.scheduler.waiting or self.scheduler.scores)
        masks = self._masks.submit(fill_masks, chunks, self.vocab_size)  # while the model runs
        try:
            logits = self.runner.run(chunks)[:, : self.vocab_size]
        except RuntimeError as error:  # out of memory, a kernel that fails: other requests continue
            log.exception("a step of %d sequences failed", len(chunks))
            for chunk in chunks:
                self._finish(chunk.sequence, "error", f"the model failed: {error}")
            self.failed = self.failed or self.runner.is_broken
            return True
        self.drafter.follow(chunks)
        computed = time.perf_counter()
        n_tokens = self._advance(chunks, logits, masks.result())
        if all(chunk.n_new == 1 for chunk in chunks):
            end = time.perf_counter()
            self.drafter.pace.note(len(logits), n_tokens, end - guessed, guessed - start)
            if logits.is_cpu:  # others compute while the host waits for their tokens
                self.scheduler.turns.note(len(logits), computed - guessed, end - computed)
        return True

    def _add(self, sequences: list[Sequence]) -> None:
        self._sequences[sequences[0].request_id] = {s.index: s for s in sequences}
        for sequence in sequences:
            self.scheduler.add(sequence)

    def _cancel(self, request_id: int, index: int | None = None) -> None:
        for sequence in list(self._sequences.get(request_id, {}).values()):
            if index in (None, sequence.index):
                self._finish(sequence, "cancelled")

    def _advance(
        self, chunks: list[Chunk], logits: Tensor, masks: dict[Sequence, list[np.ndarray]]
    ) -> int:
        """Record what was computed, choose tokens where a chunk reached its end, and pass them on.

        -> the number of tokens.
        """
        ends = list(itertools.accumulate(chunk.n_rows for chunk in chunks))
        choices, bits, prefixes, rows = [chunk.prefixes for chunk in chunks], {}, [], []
        for chunk, end, places in zip(chunks, ends, choices, strict=True):
            bits |= dict(enumerate(masks.get(chunk.sequence, ()), len(prefixes)))
            prefixes += places
            rows += range(end - len(places), end)
        index = torch.tensor(rows, dtype=torch.int64).to(logits.device, non_blocking=True)
        tokens = sample(logits.index_select(0, index), prefixes, self.eos_ids, bits)
        # On a GPU nothing waits for the step before its last number is needed, here.
        top = logits.amax(-1)
        numbers = torch.cat((top.isfinite(), tokens)).tolist()
        healthy, chosen = numbers[: len(logits)], iter(numbers[len(logits) :])
        scores = target_logprobs(logits, top, chunks)
        for chunk, end in zip(chunks, ends, strict=True):
            sequence, start = chunk.sequence, end - chunk.n_rows
            if sequence.finished:  # another answer of its request has failed
                continue
            if not all(healthy[start:end]):
                self._finish(sequence, "error", "the model computed a number that is not finite")
                continue
            if sequence in masks and not masks[sequence][0].any():
                reason = sequence.matcher and sequence.matcher.error
                wrong = InvalidRequest(f"the grammar allows no token: {reason}")
                self._finish(sequence, "error", wrong)
                continue
            if sequence.params.prompt_logprobs is not None and sequence.n_output == 0:
                self._note_prompt_logprobs(chunk, logits[start:end])
            sequence.n_computed += chunk.n_new
            sequence.scores += scores.get(sequence, ())
            self.cache.publish(sequence)
            if not (sequence.max_tokens or sequence.n_pending):
                self._finish(sequence, "stop")
        n_tokens = 0
        for chunk, end, places in zip(chunks, ends, choices, strict=True):
            tokens = list(itertools.islice(chosen, len(places)))
            if tokens and not chunk.sequence.finished:
                n_tokens += self._take(chunk, tokens, logits[end - len(tokens) : end])
        return n_tokens

    def _take(self, chunk: Chunk, tokens: list[int], logits: Tensor) -> int:
        """Take the tokens that were chosen after a chunk's prefixes, as far as guesses were right.

        `logits` (R, V) are the rows that they were chosen from -> how many are taken.
        """
        sequence, n_top = chunk.sequence, chunk.sequence.params.logprobs
        before, n_kept = sequence.n_output, 0
        for row, guess, token in zip(logits, (*chunk.draft, None), tokens, strict=True):
            logprobs = None if n_top is None else token_logprobs(row, token, n_top)
            self._append(sequence, token, logprobs)
            n_kept += token == guess
            if sequence.finished or token != guess:
                break
            sequence.n_computed += 1
            self.cache.publish(sequence)
        sequence.n_drafted = min(sequence.n_drafted, sequence.n_computed)
        if chunk.draft:
            self.drafter.learn(sequence, len(chunk.draft), n_kept)
        return sequence.n_output - before

    def _note_prompt_logprobs(self, chunk: Chunk, logits: Tensor) -> None:
        """Store the log-probability of each token of the prompt; row i predicts token i + 1."""
        sequence = chunk.sequence
        n_top = sequence.params.prompt_logprobs or 0
        following = sequence.tokens[len(sequence.prompt_logprobs) :]
        for row, token in zip(logits, following, strict=False):
            sequence.prompt_logprobs.append(token_logprobs(row, token, n_top))

    def _append(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> None:
        """Add a chosen token, and end the answer where the request asks for it."""
        sequence.tokens.append(token)
        params, reason, matcher = sequence.params, None, sequence.matcher
        if matcher is not None and (error := matcher.advance(token)):
            self._finish(sequence, "error", InvalidRequest(f"the grammar cannot continue: {error}"))
            return
        ends = token in self.eos_ids and not params.ignore_eos
        if token in params.stop_ids:  # never in the middle of what a grammar guarantees
            ends |= matcher is None or matcher.accepts
        if ends or (matcher is not None and matcher.complete):
            reason = "stop"
        elif sequence.runs is not None and sequence.runs.add(token):
            reason = "repetition"
        elif sequence.n_output >= sequence.max_tokens:
            reason = "length"
        first = sequence.n_output == 1 and params.prompt_logprobs is not None
        prompt_logprobs = tuple(sequence.prompt_logprobs) if first else None
        self._pass_on(
            sequence, reason, id=token, logprobs=logprobs, prompt_logprobs=prompt_logprobs
        )

    def _finish(
        self, sequence: Sequence, reason: FinishReason, error: str | OpenNemoError | None = None
    ) -> None:
        """End a sequence without a further token: it is a score, was cancelled, or failed."""
        if not sequence.finished:
            self._pass_on(sequence, reason, error=error)

    def _pass_on(self, sequence: Sequence, reason: FinishReason | None, **news: Any) -> None:
        """Call the request's callback; with a reason, after the sequence has ended."""
        if reason:
            sequence.finished = True
            self.scheduler.remove(sequence)
            alive = self._sequences[sequence.request_id]
            del alive[sequence.index]
            if not alive:
                del self._sequences[sequence.request_id]
        sequence.on_token(
            Token(
                request_id=sequence.request_id, index=sequence.index, finish_reason=reason,
                n_cached_tokens=sequence.n_cached, **news,
            )
        )  # fmt: skip

    def _give_up(self, error: str | None = None) -> None:
        for sequence in [s for alive in self._sequences.values() for s in alive.values()]:
            self._finish(sequence, "error" if error else "cancelled", error)
