"""Whose answers the next step goes on with, so that one request does not slow the others' streams.

A step computes a token of every answer that runs, and then chooses these one after the other. On a
CPU the choosing may take the longer time: sixteen answers of one request, sampled at a high
temperature out of 131,072 tokens, beside another request's one. Then answers of the same request
take turns, so many in a step that choosing takes no longer than computing. A request that runs
alone is not held back, each has an answer in each step, and no token depends on whose turn it is.
"""

from collections import Counter
from collections.abc import Sequence as Many
from dataclasses import dataclass

from opennemo.engine.sequence import Sequence

MEMORY = 0.8  # of what is measured: some five steps


@dataclass
class Turns:
    """What the latest steps took, and how many answers of a request go on in the next."""

    computing: float = 0.0  # seconds of a step
    choosing: float = 0.0  # seconds of a row

    def note(self, n_rows: int, computing: float, choosing: float) -> None:
        """Record a step of single tokens: its rows, and the seconds of its two parts."""
        weight = 1 - MEMORY if self.computing else 1.0
        self.computing += weight * (computing - self.computing)
        self.choosing += weight * (choosing / n_rows - self.choosing)

    def order(self, running: Many[Sequence]) -> list[Sequence]:
        """Those whose turn it is to decode, and then those whose prompts are computed."""
        decoding = [s for s in running if s.n_pending == 1]
        prompts = [s for s in running if s.n_pending != 1]
        counts = Counter(s.request_id for s in decoding)
        most = each = max(counts.values(), default=0)
        while each > 1 and sum(min(n, each) for n in counts.values()) * self.choosing > (
            self.computing
        ):
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
