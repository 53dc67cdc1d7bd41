"""One request's life in the engine: its tokens, how far they are computed, what happened.

A sequence is a list of token ids of which the first `n_computed` have their keys and values in the
cache. Prefill, chunked prefill, decoding, recomputation after preemption and the checking of
drafted tokens are then one thing: compute some of the tokens that are pending. A score is a
sequence that generates nothing and wants the log-probabilities of some tokens. This module knows
no tensors.
"""

import random
from array import array
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from opennemo.engine.params import SamplingParams
from opennemo.engine.repetition import Runs
from opennemo.engine.token import TokenCallback, TokenLogprobs
from opennemo.model.lora import Adapter

if TYPE_CHECKING:  # llguidance is only needed for grammars
    from opennemo.engine.grammar import Matcher


class Target(NamedTuple):
    """A token whose log-probability is wanted, after the sequence's token at `place`."""

    place: int
    token: int
    pair: int  # which continuation it belongs to; see scoring.py


@dataclass(eq=False)
class Sequence:
    """Token ids, how far they are computed, and where: the engine's unit of work."""

    request_id: int
    tokens: list[int]
    params: SamplingParams
    on_token: TokenCallback
    max_tokens: int  # of the answer, at most what the context has room for; 0: a score
    index: int = 0
    salt: bytes = b""  # sequences share cached pages only within the same salt
    adapter: Adapter | None = None
    n_prompt: int = field(init=False)
    n_computed: int = 0
    n_cached: int = 0
    pages: list[int] = field(default_factory=list)
    page_keys: list[bytes] = field(default_factory=list)  # chain keys of the full pages
    n_stored: int = 0  # of them, those that are on the disk
    leader: "Sequence | None" = None  # computes the first `n_shared` tokens, which are the same
    n_shared: int = 0
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=lambda: [None])
    targets: list[Target] = field(default_factory=list)  # of a score, by place
    scores: list[tuple[float, bool]] = field(default_factory=list)  # of `targets`; is it likeliest?
    matcher: "Matcher | None" = None  # the state of the answer in its grammar
    runs: Runs | None = None  # how long the answer has repeated itself
    guesses: tuple[int, ...] = ()  # at the tokens that come next; see drafts.py
    n_drafted: int = 0  # tokens that lie in the draft model's cache
    finished: bool = False
    _uniforms: array = field(default_factory=lambda: array("d"))

    def __post_init__(self) -> None:
        self.n_prompt = len(self.tokens)
        if self.params.grammar is not None:
            self.matcher = self.params.grammar.start()
        if self.params.repetition_detection is not None:
            self.runs = Runs(self.params.repetition_detection)

    @cached_property
    def _rng(self) -> random.Random:
        seed = self.params.seed
        return random.Random(None if seed is None else f"{seed}/{self.index}")

    def uniform(self, place: int) -> float:
        """The random number, from 0 to 1, that chooses the answer's token at a place."""
        while len(self._uniforms) <= place:
            self._uniforms.append(self._rng.random())
        return self._uniforms[place]

    @property
    def n_pending(self) -> int:
        """Tokens whose keys and values are not in the cache yet; 1 while decoding."""
        return len(self.tokens) - self.n_computed

    @property
    def n_output(self) -> int:
        return len(self.tokens) - self.n_prompt

    @property
    def respelled(self) -> tuple[int, ...]:
        """Tokens of the prompt's end that the answer may spell as they were; see Healing."""
        healing = self.params.healing
        return healing.ahead(self.tokens[self.n_prompt :]) or () if healing else ()

    @property
    def first_row(self) -> int:
        """Place of the first token after which logits are wanted."""
        if self.max_tokens == 0:
            n = len(self.scores)
            return self.targets[n].place if n < len(self.targets) else len(self.tokens)
        if self.params.prompt_logprobs is not None and self.n_output == 0:
            return len(self.prompt_logprobs) - 1
        return len(self.tokens) - 1

    @property
    def is_ready(self) -> bool:
        """Whether its leader has computed what they share."""
        leader = self.leader
        return leader is None or leader.finished or leader.n_computed >= self.n_shared


class Prefix(NamedTuple):
    """A sequence, and guesses at its next tokens, after which another one is chosen."""

    sequence: Sequence
    guesses: tuple[int, ...] = ()

    @property
    def params(self) -> SamplingParams:
        return self.sequence.params

    @property
    def n_output(self) -> int:
        return self.sequence.n_output + len(self.guesses)

    @property
    def answer(self) -> list[int]:
        return [*self.sequence.tokens[self.sequence.n_prompt :], *self.guesses]

    @property
    def uniform(self) -> float:
        """The sequence's random number for the token that is chosen here."""
        return self.sequence.uniform(self.n_output)


@dataclass(frozen=True)
class Chunk:
    """The part of one step that belongs to one sequence: compute the next `n_new` tokens.

    `draft` holds guesses at tokens after the last known one, computed along and then checked.
    """

    sequence: Sequence
    n_new: int
    draft: tuple[int, ...] = ()
    copy: tuple[int, int] | None = None  # first copy a page that another fills, into one of its own

    @property
    def tokens(self) -> list[int]:
        start = self.sequence.n_computed
        return self.sequence.tokens[start : start + self.n_new] + list(self.draft)

    @property
    def reaches_end(self) -> bool:
        """Whether the chunk ends at the last known token, so that the next one can be chosen."""
        return self.n_new == self.sequence.n_pending

    @property
    def n_rows(self) -> int:
        """How many of its last positions are to be turned into logits."""
        end = self.sequence.n_computed + self.n_new
        return max(0, min(self.n_new, end - self.sequence.first_row)) + len(self.draft)

    @property
    def prefixes(self) -> list[Prefix]:
        """After which tokens are chosen, by the last rows, if it reaches the end of an answer."""
        if not (self.reaches_end and self.sequence.max_tokens):
            return []
        return [Prefix(self.sequence, self.draft[:i]) for i in range(len(self.draft) + 1)]

    @property
    def targets(self) -> list[Target]:
        """The tokens whose log-probabilities it computes."""
        sequence = self.sequence
        end = sequence.n_computed + self.n_new
        return [t for t in sequence.targets[len(sequence.scores) :] if t.place < end]
