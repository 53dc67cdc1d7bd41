"""How many tokens of which sequence the next step computes: first come, first served, in a budget.

Every step first gives decoding sequences their tokens (turns.py), so that answers never stall, then
spends what is left of the budget on prompts, in chunks where they are long, and then on scores.
When pages run out, the sequence that came last gives up its pages and is computed again later
(often the prefix cache still has them). Plain Python, no tensors: tests drive it with random
requests.

Continuous batching is Orca's (OSDI 2022), chunked prefill Sarathi's (arXiv:2403.02310).
"""

from collections import deque
from dataclasses import dataclass, field, replace
from itertools import islice

from opennemo.engine.kv_cache import KVCache
from opennemo.engine.sequence import Chunk, Sequence
from opennemo.engine.turns import Turns

LOOKAHEAD = 256  # sequences that are considered for one step; some wait for their leaders


@dataclass
class Scheduler:
    """Sequences that wait, and those that run (hold pages), over one cache."""

    cache: KVCache
    max_batched_tokens: int  # in one step, over all sequences
    max_sequences: int  # that run at the same time
    max_rows: int = 2**31  # of logits in one step, without drafts
    n_preemptions: int = 0
    waiting: deque[Sequence] = field(default_factory=deque)
    scores: deque[Sequence] = field(default_factory=deque)  # that wait, behind all others
    running: list[Sequence] = field(default_factory=list)  # in order of arrival
    turns: Turns = field(default_factory=Turns)

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
        # Guesses do not displace other sequences' next tokens.
        spare = max(0, min(budget, rows) - sum(s.n_pending == 1 for s in self.running))
        for sequence in self.turns.order(self.running):  # decoding first
            if min(budget, rows) <= 0:
                break
            if sequence not in self.running:  # preempted in this very loop
                continue
            chunk = self._chunk(sequence, budget, rows, spare)
            end = sequence.n_computed + chunk.n_new
            if not self.cache.extend(sequence, end + len(chunk.draft)):
                chunk = replace(chunk, draft=())  # no other sequence gives way to guesses
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
                spare -= len(chunk.draft)
        for sequence in (*islice(self.waiting, LOOKAHEAD), *islice(self.scores, LOOKAHEAD)):
            if preempted or min(budget, rows) <= 0 or len(self.running) >= self.max_sequences:
                break
            if not sequence.is_ready:
                continue
            source = self.cache.match(sequence)
            sequence.n_drafted = sequence.n_computed
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

    def _chunk(self, sequence: Sequence, budget: int, rows: int, n_guesses: int = 0) -> Chunk:
        n_rowless = max(0, sequence.first_row - sequence.n_computed)
        n_new = min(sequence.n_pending, budget, n_rowless + rows)
        guesses = sequence.guesses[:n_guesses] if sequence.n_pending == 1 else ()
        if n_new == sequence.n_pending and (respelled := sequence.respelled):
            guesses = respelled[: min(budget - n_new, rows - 1)]  # one step weighs all ways to end
        return Chunk(sequence, n_new, guesses)

    def _preempt(self, sequence: Sequence) -> None:
        self.n_preemptions += 1
        self.running.remove(sequence)
        self.cache.release(sequence)
        self._queue(sequence).appendleft(sequence)
