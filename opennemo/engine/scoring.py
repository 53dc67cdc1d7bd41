"""How likely a model finds given continuations: requests that the scheduler treats like any other.

In the order of their ids, a request differs from those before it only in its end. The
sequence that computes its beginning leads it: it waits for that, shares its pages and computes the
rest. So every different prefix of all requests is computed once: worked examples, a question, the
first word of two answers.
"""

from bisect import bisect_right
from collections.abc import Callable
from collections.abc import Sequence as Many
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from opennemo.engine.params import SamplingParams
from opennemo.engine.sequence import Chunk, Sequence, Target
from opennemo.engine.token import Token, TokenCallback
from opennemo.errors import OpenNemoError

Pair = tuple[list[int], list[int]]  # ids of a context, and of its continuation


@dataclass(frozen=True)
class Score:
    """The score of one continuation."""

    logprob: float  # nats, of all its tokens together
    greedy: bool  # whether each of them is the likeliest


class Scoring:
    """The progress of a request to score pairs.

    Attributes:
        sequences: what is to be computed.
        done: gets the scores, or the first error, once all sequences have ended.
    """

    def __init__(
        self,
        request_id: int,
        pairs: Many[Pair],
        on_score: Callable[[int, Score], None] | None,
        cancel: Callable[[int], None],
    ):
        """`cancel` is called with the request's id, on the engine's thread, after an error."""
        self.request_id, self._cancel = request_id, cancel
        self.sequences = plan(request_id, pairs, self.end)
        self.done = Future[list[Score]]()
        self._scores = [Score(0.0, True)] * len(pairs)
        self._missing = [len(continuation) for _, continuation in pairs]
        self._n_open, self._on_score = len(self.sequences), on_score
        self._error: OpenNemoError | None = None
        if not pairs:
            self.done.set_result([])

    def end(self, token: Token) -> None:
        """Record the end of a sequence."""
        sequence = self.sequences[token.index]
        for target, (logprob, likeliest) in zip(sequence.targets, sequence.scores, strict=False):
            i = target.pair
            score, self._missing[i] = self._scores[i], self._missing[i] - 1
            score = Score(score.logprob + logprob, score.greedy and likeliest)
            self._scores[i] = score
            if self._on_score and not self._missing[i]:
                self._on_score(i, score)
        self._n_open -= 1
        if token.finish_reason != "stop" and self._error is None:
            error = token.error or "the scoring was cancelled"
            self._error = OpenNemoError(error) if isinstance(error, str) else error
            self._cancel(self.request_id)
        if self._n_open == 0 and not self.done.done():
            if self._error:
                self.done.set_exception(self._error)
            else:
                self.done.set_result(self._scores)


def plan(request_id: int, pairs: Many[Pair], on_token: TokenCallback) -> list[Sequence]:
    """Sequences in the order of their ids, each led by the one that computes its beginning."""
    inputs = [context + continuation[:-1] for context, continuation in pairs]
    params = SamplingParams()
    sequences: list[Sequence] = []
    path: list[Sequence] = []  # compute the tokens of the last input, from n_shared of each on
    before: list[int] = []
    for i in sorted(range(len(pairs)), key=inputs.__getitem__):
        tokens = inputs[i]
        n_shared = _n_common(before, tokens)
        if n_shared < len(tokens):
            while path and path[-1].n_shared >= n_shared:
                path.pop()
            sequence = Sequence(request_id, tokens, params, on_token, 0, len(sequences))
            sequence.leader, sequence.n_shared = (path[-1] if path else None), n_shared
            sequences.append(sequence)
            path.append(sequence)
        before = tokens
        starts = [sequence.n_shared for sequence in path]
        context, continuation = pairs[i]
        for place, token in enumerate(continuation, len(context) - 1):
            path[bisect_right(starts, place) - 1].targets.append(Target(place, token, i))
    for sequence in sequences:
        sequence.targets.sort()
    return sequences


def target_logprobs(
    logits: Tensor, top: Tensor, chunks: list[Chunk]
) -> dict[Sequence, list[tuple[float, bool]]]:
    """Log-probabilities of what scores among the chunks want, and whether each is the likeliest.

    `logits` (R, V) are the chunks' rows in order, `top` (R,) the largest of each.
    """
    rows, tokens, owners, end = [], [], [], 0
    for chunk in chunks:
        end += chunk.n_rows
        first = end - (chunk.sequence.n_computed + chunk.n_new)  # the row that place 0 would have
        for target in chunk.targets:
            rows.append(first + target.place)
            tokens.append(target.token)
            owners.append(chunk.sequence)
    scores: dict[Sequence, list[tuple[float, bool]]] = {owner: [] for owner in owners}
    if rows:
        own = logits[torch.tensor(rows), torch.tensor(tokens)]
        # On a CPU some rows at a time, which stay in the processor's cache.
        height = 32 if logits.device.type == "cpu" else len(logits)
        parts = zip(logits.split(height), top[:, None].split(height), strict=True)
        total = torch.cat([(part - best).exp_().sum(-1) for part, best in parts]).log_() + top
        logprobs, greedy = (own - total[rows]).tolist(), (own == top[rows]).tolist()
        for owner, *score in zip(owners, logprobs, greedy, strict=True):
            scores[owner].append((score[0], score[1]))
    return scores


def _n_common(a: list[int], b: list[int]) -> int:
    """The number of equal tokens with which both begin."""
    n = min(len(a), len(b))
    return n if a[:n] == b[:n] else next(i for i in range(n) if a[i] != b[i])
