"""The pages of keys and values, in one of the number formats that a cache can have.

A cache in 8 bits holds twice the context of one in bf16, and four times that of float32. In `fp8`
a layer has one scale for its keys and one for its values, known beforehand: they come with the
model, or from calibration. In `int8` each head of each token has its own, so nothing needs to be
known. The engine decides which page belongs to which sequence (engine/kv_cache.py).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from opennemo.errors import InvalidRequest
from opennemo.model.formats import FORMATS, Rounding, names
from opennemo.model.transformer import ModelConfig


@dataclass
class Pages:
    """Keys and values of all layers."""

    codes: Tensor  # (L, 2, P, page_size, K, H)
    format: str  # of FORMATS
    scale: Tensor | None = None  # float32: fp8 (L, 2), int8 (L, 2, P, page_size, K)

    @classmethod
    def empty(
        cls, config: ModelConfig, n_pages: int, page_size: int, format: str,
        device: torch.device | str = "cpu", scale: Tensor | None = None,
    ) -> "Pages":  # fmt: skip
        """Pages in a format; fp8 needs the `scale` (L, 2) of keys and of values.

        Raises:
            InvalidRequest: there is no such format for a cache; or it is fp8 and without scales,
                which would be 1 and cut off what exceeds 448.
        """
        rounding = rounding_of(format)
        size = (config.n_layers, 2, n_pages, page_size)
        heads = (config.n_kv_heads, config.head_dim)
        if rounding.share == "tensor":
            if scale is None:
                rows = [FORMATS[name] for name in names("cache")]
                unscaled = next(r.name for r in rows if r.in_codes and r.kv and r.kv.share == "row")
                raise InvalidRequest(
                    f"a KV cache in {format} needs the scales of keys and values, and this model "
                    f"brings none: write them with opennemo quantize --kv {format}, name one for "
                    f"all, or take {unscaled}, which needs none"
                )
            if scale.shape != size[:2]:
                raise InvalidRequest(f"KV scales of shape {tuple(scale.shape)}, not {size[:2]}")
            scale = scale.float().to(device).contiguous()
        else:
            scale = _zeros((*size, heads[0]), torch.float32, device) if rounding.limit else None
        return cls(_zeros((*size, *heads), rounding.dtype, device), format, scale)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages, their scales included."""
        return self.codes.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def of(self, page: int) -> list[Tensor]:
        """The content of a page: codes (L, 2, page_size, K, H), and scales if it has its own."""
        scales = [] if self.scale is None or self.scale.dim() == 2 else [self.scale[:, :, page]]
        return [self.codes[:, :, page], *scales]

    def write(self, layer: int, slots: Tensor, *kv: Tensor) -> None:
        """Round keys and values (T, K, H) into their slots (T,)."""
        rounding = rounding_of(self.format)
        for part, x in enumerate(kv):
            pool = self.codes[layer, part].flatten(0, 1)
            if self.scale is None:
                pool.index_copy_(0, slots, x.to(pool.dtype))
                continue
            given = self.scale.dim() == 2
            fixed = self.scale[layer, part].reshape(1, 1, 1) if given else None
            codes, scale = rounding.quantize(x, fixed)
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


def rounding_of(format: str) -> Rounding:
    """How a format rounds keys and values. Raises: InvalidRequest, it cannot."""
    row = FORMATS.get(format)
    if row is None or row.kv is None:
        allowed = ", ".join(name for name, row in FORMATS.items() if row.kv)
        raise InvalidRequest(f"KV cache in {format!r}; allowed: {allowed}")
    return row.kv


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Zeros that on a CPU take no memory until they are written; torch.zeros writes them."""
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    untouched = np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)
    return torch.from_numpy(untouched).view(dtype).view(shape)
