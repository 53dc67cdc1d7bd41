"""Cross-entropy fused with the head's product, so that not all logits exist at once."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def by_pytorch(
    hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str, chunk: int
) -> Tensor:
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
    return F.linear_cross_entropy(hidden, weight, targets, reduction=reduction, options=options)


def by_chunks(
    hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str, chunk: int
) -> Tensor:
    """The same in chunks whose logits are computed again for the backward pass."""

    def losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")

    found = [
        checkpoint(losses, h, weight, t, use_reentrant=False)
        for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True)
    ]
    each = torch.cat(found).type_as(hidden)  # pyright: ignore[reportArgumentType]
    return each.sum() if reduction == "sum" else each


# PyTorch has such a loss from 2.13 on.
fused_losses = by_pytorch if hasattr(F, "linear_cross_entropy") else by_chunks
