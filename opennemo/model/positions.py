"""How a token's place affects attention: angles of RoPE, the scale of queries, windows.

Plain models only have one base for RoPE's angles. Models for long contexts slow angles down, scale
queries far out, or let some layers see only the last tokens. This file knows numbers;
scaling_fields.py knows their names in the files of models.

Sources: YaRN (arXiv:2309.00071), and `modeling_rope_utils.py` of transformers for Llama 3's.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# How many tokens back a token sees, itself included; a tuple is repeated through the layers.
Window = int | tuple[int | None, ...] | None


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How RoPE's angles are slowed down, for contexts longer than a model was first trained for.

    `linear` divides all by `factor`. `llama3` and `yarn` divide the slow ones and leave the fast
    ones, counted in turns over the original context: from `low` turns on down all of it, from
    `high` on up none. Between them the share runs in turns in `llama3`, in channels in `yarn`.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original: int = 0  # context that the model was first trained for, in tokens; not of linear
    low: float = 1.0  # low_freq_factor, or YaRN's beta_slow
    high: float = 4.0  # high_freq_factor, or YaRN's beta_fast
    gain: float = 1.0  # YaRN's attention factor, which multiplies rotated queries and keys
    truncate: bool = True  # whether YaRN's range of channels is widened to whole ones


@dataclass(frozen=True, kw_only=True)
class QueryScaling:
    """Queries far out are multiplied by 1 + beta * log(1 + floor(position / original))."""

    beta: float
    original: int


def window_in(window: Window, layer: int) -> int | None:
    """The window of one layer."""
    return window[layer % len(window)] if isinstance(window, tuple) else window


def query_scale(positions: Tensor, scaling: QueryScaling) -> Tensor:
    """What queries at these positions (T,) are multiplied by: (T, 1, 1) in float64."""
    blocks = torch.floor(positions.double() / scaling.original)
    return (1 + scaling.beta * torch.log1p(blocks))[:, None, None]


def yarn_gain(factor: float, mscale: float = 1.0) -> float:
    """YaRN's attention factor by default."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device | str = "cpu"
) -> Tensor:
    """RoPE's angles of one position, (H/2,) in float64, in radians.

    They are made on the device, since nothing may be copied to it while a graph is recorded.
    """
    channels = torch.arange(0, head_dim, 2, device=device, dtype=torch.float64)
    plain = theta ** (-channels / head_dim)
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    if scaling.kind == "llama3":
        turns = scaling.original * plain / (2 * math.pi)
        fast = (turns - scaling.low) / (scaling.high - scaling.low)
    else:
        # In channels, of which a pair counts as one: where this many turns are made.
        first, last = (
            head_dim * math.log(scaling.original / (turns * 2 * math.pi)) / (2 * math.log(theta))
            for turns in (scaling.high, scaling.low)
        )
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        # As in other implementations: a range of one channel is widened a little.
        fast = 1 - (channels / 2 - first) / (last - first if last != first else 0.001)
    fast = fast.clamp(0, 1)
    return plain * (fast + (1 - fast) / scaling.factor)
