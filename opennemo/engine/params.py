"""How to choose the tokens of a request, with bounds for every number."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from opennemo.engine.repetition import Repetition
from opennemo.errors import InvalidRequest

if TYPE_CHECKING:  # llguidance is only needed for grammars
    from opennemo.engine.grammar import Grammar

FORBIDDEN = -1e9  # finite: where a grammar allows only such tokens, one of them is chosen
_BOUNDS: dict[str, tuple[float, float]] = {
    "max_tokens": (1, 2**31),
    "min_tokens": (0, 2**31),
    "temperature": (0, 100),
    "top_k": (0, 2**31),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
    "presence_penalty": (-100, 100),
    "frequency_penalty": (-100, 100),
    "logprobs": (0, 100),
    "prompt_logprobs": (0, 100),
    "typical_p": (0, 1),
    "top_n_sigma": (0, 100),
    "xtc_probability": (0, 1),
    "xtc_threshold": (0, 1),
    "dry_multiplier": (0, 100),
    "dry_base": (1, 100),
    "dry_allowed_length": (0, 2**31),
    "dry_window": (0, 2**31),
}


@dataclass(frozen=True)
class Healing:
    """How an answer may spell the last tokens of a prompt, which were taken back, again.

    The prompt's end may lie within a token that the model would have written. So the answer follows
    `path`, the original tokens, for any length, and leaves it by a token that begins with all the
    text that is left to spell. The answer is then as likely as if the model had been asked for any
    text that begins with the prompt.

    Attributes:
        path: the tokens that were taken back, without the last one.
        ends: the tokens by which the answer may leave at each place of the path, and at its end.
    """

    path: tuple[int, ...]
    ends: tuple[frozenset[int], ...]

    @property
    def ids(self) -> frozenset[int]:
        """All tokens that are in it."""
        return frozenset(self.path).union(*self.ends)

    def ahead(self, answer: list[int]) -> tuple[int, ...] | None:
        """The rest of the path; None once the answer has left it."""
        n = len(answer)
        return self.path[n:] if n <= len(self.path) and self.path[:n] == (*answer,) else None


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens. The defaults are greedy, without limits but the model's own.

    Raises:
        InvalidRequest: a number out of bounds, naming the field and what is allowed.
    """

    max_tokens: int | None = None  # None: as many as the context has room for
    min_tokens: int = 0  # EOS and stop ids are masked until then
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0  # drop tokens below this share of the likeliest one's probability
    typical_p: float = 1.0  # keep this mass of the tokens whose surprise is nearest the entropy
    top_n_sigma: float = 0.0  # keep tokens at most this many deviations below the likeliest; 0: off
    xtc_probability: float = 0.0  # how often all likely tokens but the least likely are dropped
    xtc_threshold: float = 0.1  # tokens of at least this probability are likely
    repetition_penalty: float = 1.0  # divides logits of tokens seen in prompt or answer (CTRL)
    presence_penalty: float = 0.0  # subtracted once from tokens seen in the answer
    frequency_penalty: float = 0.0  # subtracted for each time a token occurs in the answer
    dry_multiplier: float = 0.0  # of DRY's penalty on tokens that would continue a repetition
    dry_base: float = 1.75  # to the power of how much longer the repetition is than
    dry_allowed_length: int = 2  # this many tokens
    dry_window: int = 0  # the last tokens that are searched; 0: all
    dry_breakers: frozenset[int] = frozenset()  # ids that a repetition does not reach across
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    allowed_ids: frozenset[int] | None = None  # nothing else is chosen; a grammar overrides it
    bad_words: tuple[tuple[int, ...], ...] = ()  # runs of ids that never occur in the answer
    stop_ids: frozenset[int] = frozenset()  # besides the model's EOS
    ignore_eos: bool = False
    repetition_detection: Repetition | None = None  # None: an answer may repeat itself
    seed: int | None = None  # same seed, same answer, whatever else is in the batch
    logprobs: int | None = None  # report the chosen token's, and this many of the likeliest
    prompt_logprobs: int | None = None  # the same for the tokens of the prompt
    healing: Healing | None = None  # the answer first spells the prompt's end
    grammar: "Grammar | None" = None  # the answer follows it to its end; min_tokens gives way

    def __post_init__(self) -> None:
        for name, (low, high) in _BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # NaN fails this, too
                raise InvalidRequest(f"{name} is {value}, allowed is {low:g} to {high:g}")
        loops = Repetition.of(self.repetition_detection)  # a Python caller may pass a dict
        object.__setattr__(self, "repetition_detection", loops)
        if self.top_p == 0:
            raise InvalidRequest("top_p is 0, allowed is more than 0, up to 1")
        if any(not -100 <= bias <= 100 for bias in self.logit_bias.values()):
            raise InvalidRequest("logit_bias holds a value outside -100 to 100")
        if self.allowed_ids is not None and min(self.allowed_ids, default=-1) < 0:
            raise InvalidRequest("allowed_ids is empty or names an id below 0")
        if any(not word or min(word) < 0 for word in self.bad_words):
            raise InvalidRequest("bad_words holds an empty word or names an id below 0")

    # Made once: there may be a vocabulary of them, and every step needs them.
    @cached_property
    def allowed_bias(self) -> np.ndarray:
        """What `allowed_ids` add to the logits of the tokens up to the last of them (n,)."""
        ids = np.array(list(self.allowed_ids or ()), np.int64)
        bias = np.full(ids.max(initial=-1) + 1, FORBIDDEN, np.float32)
        bias[ids] = 0
        return bias

    @cached_property
    def biases(self) -> tuple[np.ndarray, np.ndarray]:
        """`logit_bias` as ids (n,) and what is added to them (n,)."""
        ids, values = list(self.logit_bias), list(self.logit_bias.values())
        return np.array(ids, np.int64), np.array(values, np.float32)

    @cached_property
    def breakers(self) -> np.ndarray:
        """`dry_breakers` (n,), sorted."""
        return np.array(sorted(self.dry_breakers), np.int64)

    @property
    def penalises(self) -> bool:
        """Whether the choice of a token depends on which tokens came before."""
        penalties = (self.repetition_penalty - 1, self.presence_penalty, self.frequency_penalty)
        return any(penalties) or self.dry_multiplier > 0

    @property
    def narrows(self) -> bool:
        """Whether a filter of filters.py drops tokens."""
        return self.typical_p < 1 or self.top_n_sigma > 0 or self.xtc_probability > 0
