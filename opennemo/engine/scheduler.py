"""How many tokens of which sequence the next step computes: first come, first served, in a budget.

Every step first gives each decoding sequence its token, so that running answers never stall, then
spends what is left of the budget on prompts, in chunks where they are long, and then on scores.
When pages run out, the sequence that came last gives its own back and is computed anew later (the
prefix cache often saves it from that). Plain Python, no tensors: tests drive it with random
requests.

Continuous batching is Orca's (OSDI 2022), chunked prefill Sarathi's (arXiv:2403.02310).
"""

from array import array
from collections import deque
from dataclasses import dataclass, field, replace
from itertools import islice

from opennemo.engine.kv_cache import KVCache
from opennemo.engine.sequence import Chunk, Sequence

LOOKAHEAD = 256  # sequences that are looked at for one step; some wait for their leaders


@dataclass
class Scheduler:
    """Sequences that wait, and those that run (hold pages), over one cache."""

    cache: KVCache
    max_batched_tokens: int  # in one step, over all sequences
    max_sequences: int  # that run at the same time
    n_draft_tokens: int = 0  # guessed by prompt lookup for each greedy sequence
    max_rows: int = 2**31  # of logits in one step, without drafts
    n_preemptions: int = 0
    waiting: deque[Sequence] = field(default_factory=deque)
    scores: deque[Sequence] = field(default_factory=deque)  # that wait, behind all others
    running: list[Sequence] = field(default_factory=list)  # in order of arrival

    def add(self, sequence: Sequence) -> None:
        self._queue(sequence).append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that is finished, failed or cancelled; its pages are free at once."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self._queue(sequence).remove(sequence)
        self.cache.release(sequence)

    def next_step(self) -> list[Chunk]:
        """Chunks to compute together; empty only when nothing runs or waits."""
        budget, rows = self.max_batched_tokens, self.max_rows
        chunks, preempted = [], False
        for sequence in sorted(self.running, key=lambda s: s.n_pending > 1):  # decoding first
            if min(budget, rows) <= 0:
                break
            if sequence not in self.running:  # preempted in this very loop
                continue
            chunk = self._chunk(sequence, budget, rows)
            end = sequence.n_computed + len(chunk.tokens)
            while not self.cache.extend(sequence, end):
                preempted = True
                busy = {id(c.sequence) for c in chunks}
                victim = next(s for s in reversed(self.running) if id(s) not in busy)
                self._preempt(victim)
                if victim is sequence:
                    break
            else:
                chunks.append(chunk)
                budget -= len(chunk.tokens)
                rows -= chunk.n_rows
        for sequence in (*islice(self.waiting, LOOKAHEAD), *islice(self.scores, LOOKAHEAD)):
            if preempted or min(budget, rows) <= 0 or len(self.running) >= self.max_sequences:
                break
            if not sequence.is_ready:
                continue
            source = self.cache.match(sequence)
            chunk, n_pages = self._chunk(sequence, budget, rows), len(sequence.pages)
            if not self.cache.extend(sequence, sequence.n_computed + len(chunk.tokens)):
                self.cache.release(sequence)
                break
            if source is not None:
                chunk = replace(chunk, copy=(source, sequence.pages[n_pages]))
            self._queue(sequence).remove(sequence)
            self.running.append(sequence)
            chunks.append(chunk)
            budget -= len(chunk.tokens)
            rows -= chunk.n_rows
        return chunks

    def _queue(self, sequence: Sequence) -> deque[Sequence]:
        return self.waiting if sequence.max_tokens else self.scores

    def _chunk(self, sequence: Sequence, budget: int, rows: int) -> Chunk:
        n_rowless = max(0, sequence.first_row - sequence.n_computed)
        n_new = min(sequence.n_pending, budget, n_rowless + rows)
        room = min(
            self.n_draft_tokens,
            budget - n_new,
            sequence.max_tokens - sequence.n_output - 1,
        )
        if n_new == 1 == sequence.n_pending and room > 0 and sequence.params.can_be_drafted:
            return Chunk(sequence, 1, look_up(sequence.tokens, room))
        return Chunk(sequence, n_new)

    def _preempt(self, sequence: Sequence) -> None:
        self.n_preemptions += 1
        self.running.remove(sequence)
        self.cache.release(sequence)
        self._queue(sequence).appendleft(sequence)


def look_up(tokens: list[int], n: int, longest: int = 3) -> tuple[int, ...]:
    """Guess the next n tokens: what followed the last time the latest few tokens stood together.

    Prompt-lookup decoding: answers that quote, edit or summarise their prompt repeat it. Tries
    the last `longest` tokens first, then fewer; () when none of them occurred before.

    >>> look_up([1, 2, 3, 4, 9, 1, 2, 3], 2)
    (4, 9)
    """
    text, width = array("q", tokens).tobytes(), 8
    for size in range(min(longest, len(tokens) - 1), 0, -1):
        tail = text[-size * width :]
        at = text.rfind(tail, 0, len(text) - width)
        while at > 0 and at % width:  # found astride two tokens
            at = text.rfind(tail, 0, at + len(tail) - 1)
        if at >= 0:
            start = at // width + size
            return tuple(tokens[start : start + n])
    return ()
