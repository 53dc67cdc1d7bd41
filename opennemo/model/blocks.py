"""Blocks of codes as GGUF files hold them: what the bytes of each type mean.

In every type of block a weight is `scale * code - min`, and 16 or 32 weights share scale and min:
one family, whatever the bits. A row of weights is a row of bytes. This is the definition that the
CPU kernel (kernels/blocks.h), which reads the rows where they are, is tested against.

Layouts: ggml-common.h of ggml; tests compare with `gguf.dequantize`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Codes(NamedTuple):
    """Weights (..., D) = scale * code - min."""

    codes: Tensor  # (..., D) int8
    scale: Tensor  # (..., groups of D) float32
    min: Tensor | None  # as scale; None where it is zero


@dataclass(frozen=True)
class BlockType:
    """How many weights lie in how many bytes, and how to take blocks (..., bytes) apart."""

    n_weights: int
    n_bytes: int
    unpack: Callable[[Tensor], Codes]

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of weights, whose width must be whole blocks."""
        return width // self.n_weights * self.n_bytes


def decode(type: str, rows: Tensor) -> Codes:
    """Rows of bytes (O, B) of a type -> codes (O, D), and scale and min (O, groups)."""
    kind = TYPES[type]
    codes, scale, min = kind.unpack(rows.unflatten(-1, (-1, kind.n_bytes)))
    return Codes(codes.flatten(-2), scale.flatten(-2), None if min is None else min.flatten(-2))


def dequantize(type: str, rows: Tensor) -> Tensor:
    """Rows of bytes (O, B) of a type -> weights (O, D) in float32."""
    codes, scale, min = decode(type, rows)
    weights = codes.float().unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]
    return (weights if min is None else weights - min[..., None]).flatten(-2)


def quantize_q8_0(weights: Tensor) -> Tensor:
    """Weights (O, D) -> rows of bytes (O, B) of q8_0, D being a multiple of 32."""
    groups = weights.float().unflatten(-1, (-1, 32))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    codes = (groups / scale.clamp(min=1e-30)).round().clamp(-127, 127).to(torch.int8)
    return torch.cat((scale.half().view(torch.uint8), codes.view(torch.uint8)), -1).flatten(-2)


# ---- what each type means: blocks (..., bytes) -> codes (..., D), scale and min (..., groups) ----


def _half(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.float16).float()


def _nibbles(x: Tensor) -> Tensor:
    """Lower halves of bytes (..., n), then the upper ones: (..., 2 n)."""
    return torch.cat((x & 15, x >> 4), -1)


def _bits(x: Tensor, shifts: range, mask: int) -> Tensor:
    """Bytes (..., n) -> (..., shifts, n), each shifted to the right and masked."""
    at = torch.tensor(shifts, dtype=torch.uint8, device=x.device)
    return x[..., None, :] >> at[:, None] & mask


def _codes(x: Tensor, *, zero: int = 0) -> Tensor:
    """Codes without a sign -> int8, `zero` being what stands for 0."""
    return x.to(torch.int8) - zero


def _fifth_bits(x: Tensor) -> Tensor:
    """Bits of four bytes (..., 4) -> (..., 32), worth 16 each."""
    return _bits(x, range(8), 1).transpose(-1, -2).flatten(-2) << 4


def _six_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Twelve bytes of Q4_K and Q5_K -> eight scales, eight minima."""
    a, b, c = x.unflatten(-1, (3, 4)).unbind(-2)
    upper = (c & 15 | (a >> 6) << 4, c >> 4 | (b >> 6) << 4)
    return torch.cat((a & 63, upper[0]), -1), torch.cat((b & 63, upper[1]), -1)


def _q4_0(x: Tensor) -> Codes:
    return Codes(_codes(_nibbles(x[..., 2:]), zero=8), _half(x[..., :2]), None)


def _q4_1(x: Tensor) -> Codes:
    return Codes(_codes(_nibbles(x[..., 4:])), _half(x[..., :2]), -_half(x[..., 2:4]))


def _q5_0(x: Tensor) -> Codes:
    codes = _nibbles(x[..., 6:]) | _fifth_bits(x[..., 2:6])
    return Codes(_codes(codes, zero=16), _half(x[..., :2]), None)


def _q5_1(x: Tensor) -> Codes:
    codes = _nibbles(x[..., 8:]) | _fifth_bits(x[..., 4:8])
    return Codes(_codes(codes), _half(x[..., :2]), -_half(x[..., 2:4]))


def _q8_0(x: Tensor) -> Codes:
    return Codes(x[..., 2:].contiguous().view(torch.int8), _half(x[..., :2]), None)


def _q2_k(x: Tensor) -> Codes:
    codes = _bits(x[..., 16:80].unflatten(-1, (2, 32)), range(0, 8, 2), 3).flatten(-3)
    scale, min = x[..., :16] & 15, x[..., :16] >> 4
    return Codes(_codes(codes), _half(x[..., 80:82]) * scale, _half(x[..., 82:84]) * min)


def _q3_k(x: Tensor) -> Codes:
    low = _bits(x[..., 32:96].unflatten(-1, (2, 32)), range(0, 8, 2), 3).flatten(-3)
    high = _bits(x[..., :32], range(8), 1).flatten(-2)
    scale = _nibbles(x[..., 96:104]) | _bits(x[..., 104:108], range(0, 8, 2), 3).flatten(-2) << 4
    return Codes(
        _codes(low | high << 2, zero=4), _half(x[..., 108:110]) * _codes(scale, zero=32), None
    )


def _q4_k(x: Tensor) -> Codes:
    scale, min = _six_bits(x[..., 4:16])
    codes = _nibbles(x[..., 16:].unflatten(-1, (4, 32))).flatten(-2)
    return Codes(_codes(codes), _half(x[..., :2]) * scale, _half(x[..., 2:4]) * min)


def _q5_k(x: Tensor) -> Codes:
    scale, min = _six_bits(x[..., 4:16])
    codes = _nibbles(x[..., 48:].unflatten(-1, (4, 32))).flatten(-2)
    codes = codes | _bits(x[..., 16:48], range(8), 1).flatten(-2) << 4
    return Codes(_codes(codes), _half(x[..., :2]) * scale, _half(x[..., 2:4]) * min)


def _q6_k(x: Tensor) -> Codes:
    low = _nibbles(x[..., :128].unflatten(-1, (2, 64))).flatten(-2)
    high = _bits(x[..., 128:192].unflatten(-1, (2, 32)), range(0, 8, 2), 3).flatten(-3)
    scale = x[..., 192:208].contiguous().view(torch.int8)
    return Codes(_codes(low | high << 4, zero=32), _half(x[..., 208:210]) * scale, None)


def _looked_up(x: Tensor) -> Tensor:
    values = torch.tensor(
        [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113],
        dtype=torch.int8, device=x.device,
    )  # fmt: skip
    return values[x.int()]


def _iq4_nl(x: Tensor) -> Codes:
    return Codes(_looked_up(_nibbles(x[..., 2:])), _half(x[..., :2]), None)


def _iq4_xs(x: Tensor) -> Codes:
    high = _bits(x[..., 2:4], range(0, 8, 2), 3).transpose(-1, -2).flatten(-2)
    low = _bits(x[..., 4:8], range(0, 8, 4), 15).transpose(-1, -2).flatten(-2)
    scale = _codes(low | high << 4, zero=32)
    codes = _nibbles(x[..., 8:].unflatten(-1, (8, 16))).flatten(-2)
    return Codes(_looked_up(codes), _half(x[..., :2]) * scale, None)


TYPES = {
    "q4_0": BlockType(32, 18, _q4_0),
    "q4_1": BlockType(32, 20, _q4_1),
    "q5_0": BlockType(32, 22, _q5_0),
    "q5_1": BlockType(32, 24, _q5_1),
    "q8_0": BlockType(32, 34, _q8_0),
    "q2_k": BlockType(256, 84, _q2_k),
    "q3_k": BlockType(256, 110, _q3_k),
    "q4_k": BlockType(256, 144, _q4_k),
    "q5_k": BlockType(256, 176, _q5_k),
    "q6_k": BlockType(256, 210, _q6_k),
    "iq4_nl": BlockType(32, 18, _iq4_nl),
    "iq4_xs": BlockType(256, 136, _iq4_xs),
}
