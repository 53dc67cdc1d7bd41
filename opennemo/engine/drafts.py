"""Guesses at the next tokens: the model checks several of them in one step.

A guess changes no answer. The token of every place is chosen from the model's own distribution by
that place's own random number (`Sequence.uniform`), with guesses as without them, and a guess is
kept if it is that token. For a guess that involves no chance this is the rejection sampling of
arXiv:2211.17192. A small model guesses with the same random numbers, so that both choose alike
where their distributions are alike (arXiv:2408.07978).

A guess is free to make (the token that followed the previous occurrence of the latest tokens) or
comes from a small model. How many are made follows from two running measurements: how often guesses
of a kind were kept, and what else could be computed in the time that checking one takes.
"""

import logging
import math
import time
from array import array
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F

from opennemo.engine.kv_cache import KVCache
from opennemo.engine.runner import Runner, Stretch
from opennemo.engine.sampler import sample
from opennemo.engine.sequence import Chunk, Prefix, Sequence
from opennemo.engine.sizes import CPU_KV, CacheSize, EngineConfig, cache_size
from opennemo.model.transformer import Transformer

if TYPE_CHECKING:  # llguidance is only needed for grammars
    from opennemo.engine.grammar import Matcher

log = logging.getLogger(__name__)
LONGEST = 3  # the longest run of tokens to look up
FIRST_ODDS = (0.7, 0.2, 0.4, 0.6)  # of a guess by the small model, and after 1, 2 and 3 tokens
MODEL = 0  # the small model's place there
FIRST_PRICE = 0.2
MOST = 16  # guesses for one sequence in one step
BEHIND = 16  # tokens that the small model computes at once while it does not guess


@dataclass
class Pace:
    """How long steps take by their rows, fitted to the latest of them by least squares."""

    _sums: list[float] = field(default_factory=lambda: [0.0] * 7)

    def note(self, n_rows: int, n_tokens: int, seconds: float, seconds_before: float = 0.0) -> None:
        """Record a step: its rows, the tokens that it gave, and the time spent on guessing."""
        total = seconds + seconds_before
        new = (1, n_rows, n_rows**2, seconds, n_rows * seconds, n_tokens, total)
        self._sums = [0.97 * a + b for a, b in zip(self._sums, new, strict=True)]

    def price(self, extra_seconds: float = 0.0) -> float:
        """Tokens that come in the time of one more row and so many seconds, at the present rate.

        A guess is worth making if the chance that it is kept is above this.
        """
        n, rows, squares, seconds, product, tokens, total = self._sums
        spread = n * squares - rows**2
        if spread <= 0.1 * n**2:  # the latest steps were all alike
            return FIRST_PRICE
        slope = max(0.0, (n * product - rows * seconds) / spread)
        return min(1.0, max(0.1, (slope + extra_seconds) * tokens / total))


@dataclass
class _Record:
    """How one sequence's guesses fared."""

    odds: list[float]  # that a guess is kept, by its kind
    kind: int = 0


class Drafter:
    """Sets the `guesses` of sequences before a step, and records after it how many were kept."""

    def __init__(
        self,
        n_guesses: int | None,
        eos_ids: frozenset[int],
        small_model: "SmallModel | None" = None,
    ):
        """`n_guesses`: for one sequence in one step; None: as many as are worth it."""
        self.pace, self.small_model, self.n_guessed, self.n_kept = Pace(), small_model, 0, 0
        self._n_guesses, self._eos_ids, self._usual = n_guesses, eos_ids, list(FIRST_ODDS)
        self._records: WeakKeyDictionary[Sequence, _Record] = WeakKeyDictionary()

    def guess(self, sequences: Collection[Sequence], cache: KVCache) -> None:
        """Guess at the next tokens of those that decode."""
        if self._n_guesses == 0:
            return
        price, model, asked = self.pace.price(), self.small_model, {}
        model_price = 1.0 if model is None else self.pace.price(model.seconds_a_guess)
        for sequence in sequences:
            sequence.guesses = ()
            room = min(self._n_guesses or MOST, sequence.max_tokens - sequence.n_output - 1)
            if sequence.n_pending != 1 or room <= 0:
                continue
            record = self._records.get(sequence)
            if record is None:
                record = self._records[sequence] = _Record(list(self._usual))
            odds = record.odds
            if self._worth(max(odds[1:]), price):
                guesses, record.kind = look_up(sequence.tokens, room)
                n = self._worth(odds[record.kind], price) if guesses else 0
                sequence.guesses = self._possible(sequence, guesses[:n])
            n = 0 if model is None else min(room, self._worth(odds[MODEL], model_price))
            asks = n and not sequence.guesses and cache.n_free >= len(sequences)
            if asks and cache.extend(sequence, len(sequence.tokens) + n):
                record.kind, asked[sequence] = MODEL, n
            if not (sequence.guesses or asked.get(sequence)):  # so that it is tried again
                record.odds = [o + 0.002 * (u - o) for o, u in zip(odds, FIRST_ODDS, strict=True)]
        if asked and model is not None:
            for sequence, guesses in model.guess(asked, self._eos_ids).items():
                sequence.guesses = self._possible(sequence, tuple(guesses))

    def learn(self, sequence: Sequence, n_guesses: int, n_kept: int) -> None:
        """Record that the first `n_kept` of a sequence's guesses were right."""
        self.n_guessed += n_guesses
        self.n_kept += n_kept
        record = self._records.get(sequence)
        if record is not None:
            for odds, weight in ((record.odds, 0.1), (self._usual, 0.01)):
                for kept in [True] * n_kept + [False] * (n_kept < n_guesses):
                    odds[record.kind] += weight * (kept - odds[record.kind])

    def follow(self, chunks: list[Chunk]) -> None:
        """Let the small model compute the tokens that the large one has computed."""
        if self.small_model is not None:
            self.small_model.follow(chunks)

    def _worth(self, odds: float, price: float) -> int:
        """How many guesses in a row to make, each of which is right with these odds."""
        if self._n_guesses is not None:
            return self._n_guesses
        return 0 if odds <= price else int(math.log(price) / math.log(min(odds, 0.99)))

    def _possible(self, sequence: Sequence, guesses: tuple[int, ...]) -> tuple[int, ...]:
        """The guesses up to one that ends the answer or that the grammar forbids."""
        params = sequence.params
        ends = params.stop_ids if params.ignore_eos else params.stop_ids | self._eos_ids
        matcher = sequence.matcher.copy() if sequence.matcher and guesses else None
        for i, guess in enumerate(guesses):
            if matcher is not None and (matcher.complete or matcher.advance(guess)):
                return guesses[:i]
            if guess in ends:
                return guesses[: i + 1]
        return guesses


class SmallModel:
    """A model of the same vocabulary that guesses, over pages of its own.

    Its pages have the numbers of the large model's, so that they hold the same tokens and one
    table serves both. Where it is behind, or wrong, fewer guesses are kept, and no answer changes.
    """

    def __init__(self, model: Transformer, size: CacheSize, config: EngineConfig, vocab_size: int):
        """`size` and `vocab_size`, rows of logits, are the large model's."""
        same = {"n_pages": size.n_pages, "page_size": size.page_size, "kv_scale": None}
        same["kv_format"] = None if model.norm.weight.is_cuda else CPU_KV
        own = cache_size(model, replace(config, **same), size.n_pages * size.page_size, None)
        self.runner, self.seconds_a_guess = Runner(model, own), 0.0
        self._vocab_size, self._page_size, self._failed = vocab_size, own.page_size, False

    def follow(self, chunks: list[Chunk]) -> None:
        """Compute prompts, and answers some tokens at a time."""
        for chunk in chunks:
            if chunk.copy is not None:
                self.runner.copy_page(*chunk.copy)
        stretches = []
        for chunk in chunks:
            sequence, end = chunk.sequence, chunk.sequence.n_computed + chunk.n_new
            start = sequence.n_drafted
            # A page that the large model has filled may be shared and stored: both halves are.
            fills = end // self._page_size > start // self._page_size
            if fills or end - start >= BEHIND or (chunk.n_new > 1 and end > start):
                stretches.append(Stretch(start, sequence.tokens[start:end], 0, sequence.pages))
                sequence.n_drafted = end
        if stretches and not self._failed:
            self._compute(stretches)

    @torch.inference_mode()
    def guess(
        self, lengths: Mapping[Sequence, int], eos_ids: frozenset[int]
    ) -> dict[Sequence, list[int]]:
        """Guesses for sequences, as many as requested; they have pages for them."""
        began = time.perf_counter()
        guesses: dict[Sequence, list[int]] = {sequence: [] for sequence in lengths}
        matchers = {s: s.matcher.copy() for s in lengths if s.matcher}
        going = [] if self._failed else list(lengths)
        for sequence in going:  # guesses that were never checked are computed again
            sequence.n_drafted = min(sequence.n_drafted, len(sequence.tokens) - 1)
        while going:
            stretches = []
            for sequence in going:
                tokens = sequence.tokens + guesses[sequence]
                start, sequence.n_drafted = sequence.n_drafted, len(tokens)
                stretches.append(Stretch(start, tokens[start:], 1, sequence.pages))
            logits = self._compute(stretches)
            if logits is None:
                break
            masks: dict[int, np.ndarray] = {}
            for i, sequence in enumerate(going):
                if sequence in matchers:
                    masks[i] = _mask(matchers[sequence], self._vocab_size)
            prefixes = [Prefix(s, tuple(guesses[s])) for s in going]
            for sequence, token in zip(
                going, sample(logits, prefixes, eos_ids, masks).tolist(), strict=True
            ):
                guesses[sequence].append(token)
                matcher = matchers.get(sequence)
                wrong = matcher is not None and (matcher.advance(token) or matcher.complete)
                if wrong or token in eos_ids or len(guesses[sequence]) == lengths[sequence]:
                    lengths = {**lengths, sequence: 0}
            going = [s for s in going if lengths[s]]
        n = max(map(len, guesses.values()))
        seconds = (time.perf_counter() - began) / max(1, n) / len(guesses)
        self.seconds_a_guess += (0.1 if self.seconds_a_guess else 1) * (
            seconds - self.seconds_a_guess
        )
        return guesses

    def _compute(self, stretches: list[Stretch]) -> torch.Tensor | None:
        """Logits (R, V), or None after an error, after which it never guesses again."""
        # The vocabulary may be padded further in the large model.
        last = self.runner.model.config.vocab_size - 1
        stretches = [s._replace(tokens=[min(t, last) for t in s.tokens]) for s in stretches]
        try:
            logits = self.runner.compute(self.runner.lay_out(stretches))
        except (RuntimeError, ValueError) as error:  # answers come without it
            log.warning("the draft model failed and is left out: %s", error)
            self._failed = True
            return None
        return F.pad(logits, (0, self._vocab_size - logits.shape[1]), value=-torch.inf)


def fill_masks(chunks: list[Chunk], vocab_size: int) -> dict[Sequence, list[np.ndarray]]:
    """Which tokens a grammar allows, one bit each (ceil(V / 32),) int32, after each guess."""
    masks = {}
    for chunk in chunks:
        matcher = chunk.sequence.matcher
        if matcher is None or not chunk.prefixes:
            continue
        places = masks[chunk.sequence] = [_mask(matcher, vocab_size)]
        matcher = matcher.copy() if chunk.draft else matcher
        for guess in chunk.draft:
            over = matcher.complete or matcher.advance(guess) or matcher.complete
            places.append(np.zeros_like(places[0]) if over else _mask(matcher, vocab_size))
    return masks


def _mask(matcher: "Matcher", vocab_size: int) -> np.ndarray:
    mask = np.zeros(-(-vocab_size // 32), np.int32)
    matcher.fill(mask)
    return mask


def look_up(tokens: list[int], n: int, longest: int = LONGEST) -> tuple[tuple[int, ...], int]:
    """Guess the next n tokens: those that followed the previous occurrence of the latest few.

    Prompt-lookup decoding: answers that quote, edit or summarise their prompt repeat it. Tries
    the last `longest` tokens first, then fewer -> guesses, and how many tokens occurred before; ()
    when not even the last one did.

    >>> look_up([1, 2, 3, 4, 9, 1, 2, 3], 2)
    ((4, 9), 3)
    """
    text, width = array("q", tokens).tobytes(), 8
    for size in range(min(longest, len(tokens) - 1), 0, -1):
        tail = text[-size * width :]
        at = text.rfind(tail, 0, len(text) - width)
        while at > 0 and at % width:  # found astride two tokens
            at = text.rfind(tail, 0, at + len(tail) - 1)
        if at >= 0:
            # After the tail the text continues as it did after its previous occurrence.
            return tuple(islice(cycle(tokens[at // width + size :]), n)), size
    return (), 0
