"""Number formats for tensors that lie in parts on several ranks, with the scales of the whole.

Under tensor parallelism a weight, and the input of a layer that is divided by its inputs, are
DTensors. Scales are found over all their parts and each rank rounds its own, so the codes equal
those that one rank alone, or an export, would find.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.distributed.tensor import DTensor

from opennemo.model.formats import Format, Int4, Rounding


def spread(format: Format) -> Format:
    """A number format for tensors of which each rank holds a part: the same codes and scales."""

    def of(rounding: Rounding | None) -> Any:
        kind = _SpreadInt4 if isinstance(rounding, Int4) else _Spread
        return None if rounding is None else kind(**vars(rounding))

    return replace(format, weights=of(format.weights), inputs=of(format.inputs))


class _Spread(Rounding):
    """Finds scales over all parts, and rounds this rank's part."""

    def largest(self, x: Tensor) -> Tensor:
        if not isinstance(x, DTensor):
            return super().largest(x)
        largest = super().largest(x.to_local())
        for dim, placement in enumerate(x.placements):
            along = placement.is_shard(x.ndim - 1)
            if placement.is_shard() if self.share == "tensor" else along and self.share == "row":
                largest = funcol.all_reduce(largest, "max", (x.device_mesh, dim))
        return largest

    def fake_quantize(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        if not isinstance(x, DTensor):
            return super().fake_quantize(x, scale)
        return _SpreadStraightThrough.apply(x, self, scale)  # pyright: ignore[reportReturnType]


class _SpreadInt4(_Spread, Int4):
    def scale(self, x: Tensor) -> Tensor:
        return Int4.scale(self, x.to_local() if isinstance(x, DTensor) else x)


class _SpreadStraightThrough(torch.autograd.Function):
    """As in quantization.py: the gradient passes, except for numbers that a given scale clipped."""

    @staticmethod
    def forward(ctx: Any, x: DTensor, rounding: _Spread, scale: Tensor | None) -> DTensor:
        local, width = x.to_local(), x.to_local().shape[-1]
        used = scale if scale is not None or not rounding.limit else rounding.scale(x)
        ctx.clipped = None if scale is None else _like(x, local.abs() > scale * rounding.limit)
        codes, used = rounding.quantize(local, used)
        return _like(x, rounding.dequantize(codes, used, local.dtype)[..., :width])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        return (grad if ctx.clipped is None else grad.masked_fill(ctx.clipped, 0)), None, None


def _like(x: DTensor, local: Tensor) -> DTensor:
    """This rank's part as a tensor that is spread as x is."""
    return DTensor.from_local(
        local, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride()
    )
