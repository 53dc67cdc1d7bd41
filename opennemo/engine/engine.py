"""What an engine is, for all that ask one: token ids in, `Token`s out, many requests at once.

`LocalEngine` (local.py) computes in this process; `Fleet` (cluster/fleet.py) has replicas of it.
"""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Protocol

from opennemo.engine.params import SamplingParams
from opennemo.engine.scoring import Pair, Score
from opennemo.engine.token import TokenCallback
from opennemo.model.transformer import ModelConfig


class Engine(Protocol):
    """A model that answers many requests side by side. All methods are thread-safe.

    Attributes:
        eos_ids: ids that end an answer.
        vocab_size: how many rows of logits the model has.
        max_context: tokens that one request can have, prompt and answer together.
        failed: it has ended and only a restart helps.
    """

    eos_ids: frozenset[int]
    vocab_size: int
    max_context: int
    model_config: ModelConfig
    failed: bool

    @property
    def adapters(self) -> Collection[str]:
        """Names of the adapters that requests may follow."""
        ...

    @property
    def seconds_in_step(self) -> float:
        """How long the step in progress has taken; 0 between steps."""
        ...

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
        ...

    def score(
        self, pairs: Sequence[Pair], on_score: Callable[[int, Score], None] | None = None
    ) -> list[Score]:
        """Log-probabilities of continuations, each (ids of its context, its own ids).

        What contexts and continuations share is computed once, so ask for many at a time. Waits for
        the last; `on_score` is called with the index and score of each, on a thread of the
        engine's.

        Raises:
            ContextTooLong: a context with its continuation, but for the last token.
            InvalidRequest: an empty context or continuation, an id outside the vocabulary.
        """
        ...

    def load_adapter(self, name: str, folder: Path) -> None:
        """Read a LoRA adapter that PEFT saved; from now on requests may name it.

        Raises:
            CheckpointError: it cannot be read, or is not for this model.
        """
        ...

    def unload_adapter(self, name: str) -> bool:
        """Forget an adapter; answers that follow it end as they began. False if unknown."""
        ...

    def reset_prefix_cache(self) -> None:
        """Forget all cached prompts, before the next step."""
        ...

    def sleep(self) -> None:
        """Cancel what runs and give the cache's memory back, on a GPU the weights', too."""
        ...

    def wake(self) -> None:
        """The opposite of `sleep`."""
        ...

    def stats(self) -> dict[str, float]:
        """What happens now and has happened since the start, in numbers that are kept anyway."""
        ...

    def close(self) -> None:
        """Stop for good; what was not finished is cancelled."""
        ...
