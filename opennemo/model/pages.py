"""The pages that keys and values lie in, and the number formats they can have there.

A cache in 8 bits holds twice the context of one in bf16, and four times that of float32. In `fp8`
a layer has one scale for its keys and one for its values, known beforehand: they come with the
model, or from calibration. In `int8` each head of each token has its own, so nothing needs to be
known. Which page belongs to whom is the engine's business (engine/kv_cache.py).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from opennemo.errors import InvalidRequest
from opennemo.model.quantization import Rounding
from opennemo.model.transformer import ModelConfig

KV_FORMATS: dict[str, Rounding] = {
    "fp32": Rounding(dtype=torch.float32),
    "bf16": Rounding(dtype=torch.bfloat16),
    "fp16": Rounding(dtype=torch.float16),
    "fp8": Rounding(dtype=torch.float8_e4m3fn, limit=448, share="tensor", power_of_two=True),
    "int8": Rounding(dtype=torch.int8, limit=127, share="row"),
}


@dataclass
class Pages:
    """Keys and values of all layers."""

    codes: Tensor  # (L, 2, P, page_size, K, H)
    scale: Tensor | None = None  # float32: fp8 (L, 2), int8 (L, 2, P, page_size, K)

    @classmethod
    def empty(
        cls, config: ModelConfig, n_pages: int, page_size: int, format: str,
        device: torch.device | str = "cpu", scale: Tensor | None = None,
    ) -> "Pages":  # fmt: skip
        """Pages in one of `KV_FORMATS`; fp8 needs the `scale` (L, 2) of keys and of values.

        Raises:
            InvalidRequest: fp8 without scales, which would be 1 and cut off what exceeds 448.
        """
        if format not in KV_FORMATS:
            raise InvalidRequest(f"KV cache in {format!r}; allowed: {', '.join(KV_FORMATS)}")
        rounding, size = KV_FORMATS[format], (config.n_layers, 2, n_pages, page_size)
        heads = (config.n_kv_heads, config.head_dim)
        if rounding.share == "tensor":
            if scale is None:
                raise InvalidRequest(
                    "a KV cache in fp8 needs the scales of keys and values, and this model brings "
                    "none: write them with opennemo quantize --kv fp8, name one for all, or take "
                    "int8, which needs none"
                )
            if scale.shape != size[:2]:
                raise InvalidRequest(f"KV scales of shape {tuple(scale.shape)}, not {size[:2]}")
            scale = scale.float().to(device).contiguous()
        else:
            scale = _zeros((*size, heads[0]), torch.float32, device) if rounding.limit else None
        return cls(_zeros((*size, *heads), rounding.dtype, device), scale)

    @property
    def format(self) -> str:
        """The name in `KV_FORMATS`."""
        return next(n for n, r in KV_FORMATS.items() if r.dtype == self.codes.dtype)

    @property
    def nbytes(self) -> int:
        """Of all pages, their scales included."""
        return self.codes.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def write(self, layer: int, slots: Tensor, *kv: Tensor) -> None:
        """Round keys and values (T, K, H) into their slots (T,)."""
        rounding = KV_FORMATS[self.format]
        for part, x in enumerate(kv):
            pool = self.codes[layer, part].flatten(0, 1)
            if self.scale is None:
                pool.index_copy_(0, slots, x.to(pool.dtype))
                continue
            given = self.scale.dim() == 2
            known = self.scale[layer, part].reshape(1, 1, 1) if given else None
            codes, scale = rounding.quantize(x, known)
            # As bytes: PyTorch copies those by index in every build.
            pool.view(torch.uint8).index_copy_(0, slots, codes.view(torch.uint8))
            if not given:
                self.scale[layer, part].flatten(0, 1).index_copy_(0, slots, scale.squeeze(-1))

    def read(self, layer: int, part: int, pages: Tensor, dtype: torch.dtype) -> Tensor:
        """Keys (part 0) or values (1) of some pages (P',) -> (P', page_size, K, H)."""
        codes = self.codes[layer, part].view(torch.uint8)[pages].view(self.codes.dtype)
        if self.scale is None:
            return codes.to(dtype)
        scale = self.scale[layer, part]
        scale = scale if self.scale.dim() == 2 else scale[pages].unsqueeze(-1)
        return (codes.float() * scale).to(dtype)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Zeros that on a CPU take no memory before they are written to; torch.zeros writes them."""
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    untouched = np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)
    return torch.from_numpy(untouched).view(dtype).view(shape)
