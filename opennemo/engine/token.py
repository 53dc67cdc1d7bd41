"""One generated token, from the engine to a client: the only type that carries it.

The engine makes a `Token` and passes it to the request's callback; `Reply` adds the text that it
completes, and protocols render lists of them. `Answer` (reply.py) is what they add up to.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from opennemo.errors import OpenNemoError
from opennemo.tokenizer.calls import Call

FinishReason = Literal["stop", "length", "tool_calls", "repetition", "cancelled", "error"]


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """Log-probabilities, in nats, before temperature: the token's own and the likeliest ones'."""

    logprob: float
    rank: int  # 1: the likeliest
    top: tuple[tuple[int, float], ...]  # (id, logprob), likeliest first


@dataclass(kw_only=True, slots=True)
class Token:
    """What one answer adds: a token, its end, or both."""

    request_id: int
    index: int = 0  # which of the n answers
    id: int | None = None  # None: the answer ends without a further token
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None  # with the first token
    finish_reason: FinishReason | None = None
    error: str | OpenNemoError | None = None
    n_cached_tokens: int = 0  # prompt tokens that came from the prefix cache
    # The rest is empty until `Reply` has seen the token.
    text: str = ""  # whole characters, without stop strings and tool calls
    thinking: str = ""  # the same of what the model thinks before it speaks
    calls: tuple[Call, ...] = ()  # tool calls that begin or grow
    stopped_by: str | None = None  # the stop string that ended the answer


TokenCallback = Callable[[Token], Any]
