"""Static scales while a run learns them: equal on all ranks, and slowly forgetting outliers."""

import torch
import torch.distributed as dist

from opennemo.model.quantization import observers
from opennemo.model.transformer import Transformer

# How much of a static scale's largest magnitude a step forgets, so that one outlier of the first
# steps does not cost precision for good: half of it is gone after 700 steps.
FORGET = 0.999


@torch.no_grad()
def settle_scales(model: Transformer, n_ranks: int) -> None:
    """Combine the ranks' largest magnitudes, in place, and decay them a little."""
    scales = observers(model)
    if not scales:
        return
    together = torch.cat([largest.flatten() for largest in scales.values()])
    if n_ranks > 1:
        dist.all_reduce(together, dist.ReduceOp.MAX)
    parts = together.mul_(FORGET).split([largest.numel() for largest in scales.values()])
    for largest, part in zip(scales.values(), parts, strict=True):
        largest.copy_(part.view_as(largest))
