"""The interface of every engine: token ids in, `Token`s out, many requests at once.

`LocalEngine` (local.py) computes in this process; `Fleet` (cluster/fleet.py) has replicas of it.
"""

import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from opennemo.engine.params import SamplingParams
from opennemo.engine.scoring import Pair, Score
from opennemo.engine.token import TokenCallback
from opennemo.errors import ContextTooLong, InvalidRequest
from opennemo.model.transformer import ModelConfig

MAX_ANSWERS = 16  # n of one request


class Engine(Protocol):
    """A model that answers many requests side by side. All methods are thread-safe.

    Attributes:
        eos_ids: ids that end an answer.
        vocab_size: how many ids there are to choose from.
        max_context: tokens that one request can have, prompt and answer together.
        failed: it has ended, and only a restart helps.
        adapters: names of those that requests may follow.
        seconds_in_step: how long the step in progress has taken; 0 between steps.
    """

    eos_ids: frozenset[int]
    vocab_size: int
    max_context: int
    model_config: ModelConfig
    failed: bool

    @property
    def adapters(self) -> Collection[str]: ...

    @property
    def seconds_in_step(self) -> float: ...

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
        """Queue a prompt for n answers; returns the request's id.

        `on_token` is called with every token; the last of each answer has a `finish_reason`. It is
        called on a thread of the engine's and must return quickly. Prefixes are shared only between
        requests of the same `salt`.

        Raises:
            ContextTooLong: the prompt leaves no room for a single token.
            InvalidRequest: an empty prompt, an id outside the vocabulary, too many answers, an
                unknown adapter.
            Overloaded: the queue is full.
        """
        ...

    def cancel(self, request_id: int, index: int | None = None) -> None:
        """Stop a request, or one of its answers; unknown or ended ids are ignored."""

    def score(
        self, pairs: Sequence[Pair], on_score: Callable[[int, Score], None] | None = None
    ) -> list[Score]:
        """Log-probabilities of continuations, each (ids of its context, its own ids).

        What contexts and continuations share is computed once, so ask for many at a time. Waits for
        the last; `on_score` is called with the index and score of each, on a thread of the
        engine's.

        Raises:
            ContextTooLong: a context with its continuation, without its last token, does not fit.
            InvalidRequest: an empty context or continuation, an id outside the vocabulary.
        """
        ...

    def load_adapter(self, name: str, folder: Path) -> None:
        """Read a LoRA adapter that PEFT saved; from now on requests may name it.

        Raises:
            CheckpointError: it cannot be read, or is not for this model.
        """

    def unload_adapter(self, name: str) -> bool:
        """Unload an adapter; answers that use it finish with it. False if unknown."""
        ...

    def reset_prefix_cache(self) -> None:
        """Forget all cached prompts, before the next step."""

    def sleep(self) -> None:
        """Cancel running requests and free the cache's memory, on a GPU the weights', too."""

    def wake(self) -> None:
        """The opposite of `sleep`."""

    def stats(self) -> dict[str, float]:
        """Numbers about the present state and since the start; all are kept anyway."""
        ...

    def close(self) -> None:
        """Stop for good; unfinished requests are cancelled."""


def check_request(
    engine: Engine, prompt_ids: list[int], params: SamplingParams, n: int, adapter: str | None
) -> int:
    """How many tokens of context a prompt leaves for each of n answers.

    Raises:
        ContextTooLong: it leaves no room for a single token.
        InvalidRequest: an empty prompt, an id outside the vocabulary, too many answers, an
            unknown adapter.
    """
    vocab_size, max_context = engine.vocab_size, engine.max_context
    if adapter is not None and adapter not in engine.adapters:
        raise InvalidRequest(f"there is no adapter {adapter!r}, only {sorted(engine.adapters)}")
    if not prompt_ids:
        raise InvalidRequest("the prompt is empty: at least one token is needed")
    check_ids(prompt_ids, vocab_size)
    named: dict[str, Iterable[int]] = {
        "logit_bias": params.logit_bias,
        "stop_ids": params.stop_ids,
        "allowed_ids": params.allowed_ids or (),
        "bad_words": itertools.chain(*params.bad_words),
        "healing": params.healing.ids if params.healing else (),
    }
    for name, ids in named.items():
        if any(not 0 <= id < vocab_size for id in ids):
            raise InvalidRequest(f"{name} names an id outside 0 to {vocab_size - 1}")
    if not 1 <= n <= MAX_ANSWERS:
        raise InvalidRequest(f"n is {n}, allowed is 1 to {MAX_ANSWERS}")
    if len(prompt_ids) >= max_context:
        raise ContextTooLong(len(prompt_ids) + 1, max_context)
    return max_context - len(prompt_ids)


def check_pair(engine: Engine, context: list[int], continuation: list[int]) -> None:
    """Refuse what cannot be scored.

    Raises:
        ContextTooLong: a context with its continuation, without its last token, does not fit.
        InvalidRequest: an empty context or continuation, an id outside the vocabulary.
    """
    if not context or not continuation:
        raise InvalidRequest("a context and a continuation need at least one token each")
    n = len(context) + len(continuation) - 1
    if n > engine.max_context:
        raise ContextTooLong(n, engine.max_context)
    check_ids(context, engine.vocab_size)
    check_ids(continuation, engine.vocab_size)


def check_ids(ids: list[int], vocab_size: int) -> None:
    """Raise InvalidRequest if one of some ids (at least one) is outside the vocabulary."""
    if not 0 <= min(ids) <= max(ids) < vocab_size:
        raise InvalidRequest(f"a token id is outside the vocabulary (0 to {vocab_size - 1})")
