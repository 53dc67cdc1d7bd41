"""How likely a model finds given continuations: many at once, what they share computed once.

The idea: in the order of their ids, a request differs from those before it only in its end. It
takes over the pages of whoever computes its beginning, the last of them as a copy if it is shared
in part, so that every different prefix of all requests is computed once: worked examples, a
question, the first word of two answers. Only rows that a continuation needs become logits.

Who computes what others wait for comes first; other requests fill the step meanwhile.
"""

from bisect import bisect_right
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from opennemo.engine.kv_cache import KVCache
from opennemo.engine.params import SamplingParams
from opennemo.engine.runner import Runner
from opennemo.engine.sequence import Chunk, Sequence
from opennemo.errors import OpenNemoError

Pair = tuple[list[int], list[int]]  # ids of a context, and of what is to follow it
LOOKAHEAD = 256  # requests that are looked at for one step
MAX_LOGITS = 1 << 26  # of one step: 256 MiB


@dataclass(frozen=True)
class Score:
    """Of one continuation."""

    logprob: float  # nats, of all its tokens together
    greedy: bool  # whether each of them is the likeliest


@dataclass(eq=False)
class _Job:
    """The tokens of a request that no other computes for it."""

    sequence: Sequence
    n_shared: int  # tokens that the parent computes
    parent: "_Job | None"
    children: "list[_Job]" = field(default_factory=list)  # that have not taken its pages yet
    targets: list[tuple[int, int, int]] = field(default_factory=list)  # (place, token, request)

    @property
    def n_left(self) -> int:
        return self.sequence.n_pending

    @property
    def ready(self) -> bool:
        return self.parent is None or self.parent.sequence.n_computed >= self.n_shared


@dataclass(frozen=True)
class _Part(Chunk):
    first_row: int = 0  # place of the first token whose logits are wanted

    @property
    def n_rows(self) -> int:
        end = self.sequence.n_computed + self.n_new
        return max(0, min(self.n_new, end - self.first_row))


class Scoring:
    """Requests under way: each `step` computes some tokens, and `scores` fills."""

    def __init__(
        self, pairs: Many[Pair], cache: KVCache, runner: Runner, max_tokens: int,
        on_score: Callable[[int, Score], None] | None,
    ):  # fmt: skip
        self.scores = [Score(0.0, True)] * len(pairs)
        self._missing = [len(continuation) for _, continuation in pairs]
        self._cache, self._runner, self._on_score = cache, runner, on_score
        self._max_tokens = max_tokens
        self._pending = _plan(pairs)
        self._running: list[_Job] = []
        self._shared: list[_Job] = []  # complete, but with children to come
        longest = max((len(job.sequence.tokens) for job in self._pending), default=0)
        self._spare = -(-longest // cache.page_size) + 1  # pages kept for whose turn it is

    def step(self) -> bool:
        """Compute some tokens; False when there is nothing left."""
        if work := self._choose():
            self._book(work, self._runner.run([part for _, part in work]))
        return bool(self._pending or self._running)

    def close(self) -> None:
        """Give all pages back."""
        for job in self._running + self._shared:
            self._cache.release(job.sequence)

    def _choose(self) -> list[tuple[_Job, _Part]]:
        waiting, n_started, wanted = [], 0, sum(job.n_left for job in self._running)
        for job in islice(self._pending, LOOKAHEAD):
            if wanted >= self._max_tokens:
                break
            if job.ready and self._start(job, first=not waiting):
                n_started, wanted = n_started + 1, wanted + job.n_left
            else:
                waiting.append(job)
        self._pending = waiting + self._pending[len(waiting) + n_started :]
        work, budget = [], self._max_tokens
        for job in self._running:
            part = _Part(job.sequence, min(budget, job.n_left), first_row=min(job.targets)[0])
            work += [(job, part)] * (part.n_new > 0)
            budget -= part.n_new
        return work

    def _start(self, job: _Job, first: bool) -> bool:
        """Give a request its pages, if enough are free; the last only to the first in turn."""
        cache, sequence, parent = self._cache, job.sequence, job.parent
        n_whole, n_rest = divmod(job.n_shared, cache.page_size)
        missing = -(-len(sequence.tokens) // cache.page_size) - n_whole
        if missing + (0 if first else self._spare) > cache.n_free:
            if first and not self._running:  # what is kept for others takes too much: forget it
                for other in self._shared:
                    for child in other.children:
                        child.parent, child.n_shared = None, 0
                    cache.release(other.sequence)
                self._shared = []
            return False
        if parent:
            cache.fork(parent.sequence, sequence, job.n_shared)
        cache.extend(sequence, len(sequence.tokens))
        if parent:
            if n_rest:
                self._runner.copy_page(parent.sequence.pages[n_whole], sequence.pages[n_whole])
            parent.children.remove(job)
            if parent in self._shared and not parent.children:
                self._shared.remove(parent)
                cache.release(parent.sequence)
        sequence.n_computed = job.n_shared
        self._running.append(job)
        return True

    def _book(self, work: list[tuple[_Job, _Part]], logits: Tensor) -> None:
        """Add up what the logits (R, V) say, and let go of what is complete."""
        rows, tokens, requests, end = [], [], [], 0
        for job, part in work:
            end += part.n_rows
            computed = job.sequence.n_computed + part.n_new
            for place, token, request in job.targets:
                if job.sequence.n_computed <= place < computed:
                    rows.append(end - (computed - place))
                    tokens.append(token)
                    requests.append(request)
        for job, part in work:
            job.sequence.n_computed += part.n_new
            if not job.n_left:
                self._running.remove(job)
                if job.children:
                    self._shared.append(job)
                else:
                    self._cache.release(job.sequence)
        for request, logprob, likeliest in zip(
            requests, *_look_up(logits, rows, tokens), strict=True
        ):
            score, self._missing[request] = self.scores[request], self._missing[request] - 1
            score = Score(score.logprob + logprob, score.greedy and likeliest)
            self.scores[request] = score
            if self._on_score and not self._missing[request]:
                self._on_score(request, score)


def _look_up(logits: Tensor, rows: list[int], tokens: list[int]) -> tuple[list, list]:
    """Log-probability of each token in its row of (R, V), and whether it is the likeliest."""
    own = logits[torch.tensor(rows, dtype=torch.int64), torch.tensor(tokens, dtype=torch.int64)]
    # On a CPU some rows at a time, which stay in the processor's cache.
    height = 32 if logits.device.type == "cpu" else max(1, len(logits))
    parts = [(part.amax(-1), part.logsumexp(-1)) for part in logits.split(height)]
    top, total = (torch.cat(x)[rows] for x in zip(*parts, strict=True)) if rows else (own, own)
    if not total.isfinite().all():
        raise OpenNemoError("the model computed a number that is not finite")
    return (own - total).tolist(), (own == top).tolist()


def _plan(pairs: Many[Pair]) -> list[_Job]:
    """Requests in the order of their ids, each with what is left of it to compute."""
    inputs = [context + continuation[:-1] for context, continuation in pairs]
    jobs: list[_Job] = []
    before: list[int] = []
    path: list[_Job] = []  # who computes the tokens of `before`, from n_shared of each on
    for i in sorted(range(len(pairs)), key=inputs.__getitem__):
        tokens = inputs[i]
        n_shared = _common(before, tokens)
        if n_shared < len(tokens):
            while path and path[-1].n_shared >= n_shared:
                path.pop()
            parent = path[-1] if path else None
            sequence = Sequence(0, tokens, SamplingParams(), lambda token: None, max_tokens=0)
            jobs.append(_Job(sequence, n_shared, parent))
            if parent:
                parent.children.append(jobs[-1])
            path.append(jobs[-1])
        before = tokens
        starts = [job.n_shared for job in path]
        context, continuation = pairs[i]
        for place, token in enumerate(continuation, len(context) - 1):
            path[bisect_right(starts, place) - 1].targets.append((place, token, i))
    return jobs


def _common(a: list[int], b: list[int]) -> int:
    """With how many equal tokens both begin."""
    n = min(len(a), len(b))
    return n if a[:n] == b[:n] else next(i for i in range(n) if a[i] != b[i])
