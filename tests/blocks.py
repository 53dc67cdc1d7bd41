"""Random rows of GGUF's blocks."""

import numpy as np
import torch
from torch import Tensor

from opennemo.model.blocks import TYPES, dequantize


def random_blocks(
    type: str, n_rows: int, width: int, *, exact: bool = False, deviation: float | None = None
) -> Tensor:
    """Rows of random codes; scales are ordinary numbers, or powers of two for exact sums.

    `deviation` is the weights' standard deviation.
    """
    unit = 1 / 64
    if deviation is not None:
        unit *= deviation / float(dequantize(type, random_blocks(type, 8, width)).std())
    n_weights, n_bytes = TYPES[type].n_weights, TYPES[type].n_bytes
    random = np.random.default_rng(width)
    blocks = random.integers(256, size=(n_rows, width // n_weights, n_bytes), dtype=np.uint8)
    at = {"q2_k": [80, 82], "q3_k": [108], "q6_k": [208]}.get(type, [0])
    for i in at + ([2] if type in ("q4_1", "q5_1", "q4_k", "q5_k") else []):
        scale = random.uniform(0.5, 1.5, size=blocks.shape[:2]) * unit
        scale = np.full_like(scale, unit) if exact else scale
        blocks[..., i : i + 2] = scale.astype(np.float16)[..., None].view(np.uint8)
    return torch.from_numpy(blocks.reshape(n_rows, -1))
