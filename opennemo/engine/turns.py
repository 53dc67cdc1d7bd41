"""Which answers the next step continues, so that one request does not slow the others' streams.

A step computes a token of every running answer, and then chooses these one after the other. On a
CPU both may take long: sixteen answers of one request, sampled at a high temperature out of 131,072
tokens, beside another request's one. Then answers of the same request take turns, so many in a step
that it takes at most two and a half times as long as a step of one answer. A request that runs
alone is not slowed, each has an answer in each step, and no token depends on whose turn it is.
"""

from collections import Counter
from collections.abc import Sequence as Many
from dataclasses import dataclass

from opennemo.engine.sequence import Sequence

MEMORY = 0.8  # of the averages: some five steps
SLOWER = 1.5  # extra time that a step may take, as a multiple of a step with one answer


@dataclass
class Turns:
    """Seconds of the latest steps, and how many answers of a request continue next."""

    alone: float = 0.0  # a step of one row; 0: none so far
    computing: float = 0.0  # a step, without choosing tokens
    choosing: float = 0.0  # of one row
    n_rows: float = 0.0

    def note(self, n_rows: int, computing: float, choosing: float) -> None:
        """Record a step of single tokens: its rows, and the seconds of its two parts."""

        def mean(old: float, new: float) -> float:
            return old + (1 - MEMORY) * (new - old) if old else new

        self.n_rows, self.computing = mean(self.n_rows, n_rows), mean(self.computing, computing)
        self.choosing = mean(self.choosing, choosing / n_rows)
        if n_rows == 1:
            self.alone = mean(self.alone, computing + choosing)

    @property
    def most_rows(self) -> float:
        """How many rows a step may have beside other requests."""
        if not self.alone:  # choosing may take as long as computing
            return self.computing / max(self.choosing, 1e-9)
        more = max(0.0, self.computing - self.alone) / max(self.n_rows - 1, 1)
        return SLOWER * self.alone / max(more + self.choosing, 1e-9)

    def order(self, running: Many[Sequence]) -> list[Sequence]:
        """The sequences whose turn it is to decode, and then those whose prompts are computed."""
        decoding = [s for s in running if s.n_pending == 1]
        prompts = [s for s in running if s.n_pending != 1]
        counts, n_rows = Counter(s.request_id for s in decoding), self.most_rows
        most = each = max(counts.values(), default=0)
        while each > 1 and sum(min(n, each) for n in counts.values()) > n_rows:
            each -= 1
        if len(counts) < 2 or each == most:
            return [*decoding, *prompts]
        # The shortest first: others of their request are ahead.
        left, chosen = dict.fromkeys(counts, each), set()
        for sequence in sorted(decoding, key=lambda s: s.n_output):
            if left[sequence.request_id]:
                left[sequence.request_id] -= 1
                chosen.add(sequence)
        return [*(s for s in decoding if s in chosen), *prompts]
