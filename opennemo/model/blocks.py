"""Blocks of codes as GGUF files store them: what the bytes of each type mean.

In every type of block a weight is `scale * code - min`, and 16 or 32 weights share scale and min:
one family, whatever the bits. A row of weights is a row of bytes. This is the definition that the
CPU kernel (kernels/blocks.h), which rearranges the rows, is tested against. block_scales.py chooses
the codes and scales for given weights.

Layouts: ggml-common.h of ggml; tests compare with `gguf.dequantize`.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from opennemo.model.block_scales import Grid, Scaled, fit

# Weights that are rounded at a time. The search's intermediate results stay in a core's cache, and
# PyTorch does not divide its operations among threads, which would wait for each other each time.
CHUNK = 2**17


class Codes(NamedTuple):
    """Weights (..., D) = scale * code - min."""

    codes: Tensor  # (..., D) int8
    scale: Tensor  # (..., groups of D) float32
    min: Tensor | None  # as scale; None where it is zero


@dataclass(frozen=True)
class BlockType:
    """How many weights are in how many bytes, and how blocks (..., bytes) are read and made.

    `pack` takes codes (B, n_weights), the smallest being 0, and their scales and minima.
    """

    n_weights: int
    n_bytes: int
    unpack: Callable[[Tensor], Codes]
    pack: Callable[[Tensor, Scaled], Sequence[Tensor]]
    grid: Grid
    in_panels: int = 0  # bytes in the CPU kernel's panels, where small scales take a byte each

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of weights, whose width must be whole blocks."""
        return width // self.n_weights * self.n_bytes


def at_width(type: str, width: int) -> str:
    """A type, or the one that llama.cpp uses instead where rows are not whole blocks."""
    return type if width % TYPES[type].n_weights == 0 else NARROWER.get(type, type)


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


def quantize(type: str, weights: Tensor, importance: Tensor | None = None) -> Tensor:
    """Weights (O, D) -> rows of bytes (O, B) of a type, with the least loss that was found.

    Args:
        importance: (D,) how much an error counts in each column, by default the same: the mean
            square of that input, so that what the loss measures is the layer's output.

    Raises:
        ValueError: D is not a multiple of the type's block.
    """
    kind = TYPES[type]
    width, n = weights.shape[-1], kind.n_weights
    if width % n:
        raise ValueError(f"{type} needs widths in multiples of {n}, not {width:,}")
    if importance is None or not importance.any():
        importance = torch.ones(width, device=weights.device)
    # Every column gets a positive importance; with zero its codes would be arbitrary.
    importance = importance.float() / importance.float().mean()
    importance = importance.clamp(min=1e-3)
    chunk = CHUNK if weights.device.type == "cpu" else 2**24
    parts = weights.detach().split(max(1, chunk // width))
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        return torch.cat(list(threads.map(lambda rows: _quantize(kind, rows, importance), parts)))


def _quantize(kind: BlockType, weights: Tensor, importance: Tensor) -> Tensor:
    n = kind.n_weights
    importance = importance.expand_as(weights).reshape(-1, n)
    blocks = fit(weights.float().reshape(-1, n), importance, kind.grid)
    parts = kind.pack(blocks.codes, blocks)
    return torch.cat([part.view(torch.uint8) for part in parts], -1).view(len(weights), -1)


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
    return torch.tensor(IQ4, dtype=torch.int8, device=x.device)[x.int()]


def _iq4_nl(x: Tensor) -> Codes:
    return Codes(_looked_up(_nibbles(x[..., 2:])), _half(x[..., :2]), None)


def _iq4_xs(x: Tensor) -> Codes:
    high = _bits(x[..., 2:4], range(0, 8, 2), 3).transpose(-1, -2).flatten(-2)
    low = _bits(x[..., 4:8], range(0, 8, 4), 15).transpose(-1, -2).flatten(-2)
    scale = _codes(low | high << 4, zero=32)
    codes = _nibbles(x[..., 8:].unflatten(-1, (8, 16))).flatten(-2)
    return Codes(_looked_up(codes), _half(x[..., :2]) * scale, None)


# ---- and back: codes from 0 and their scales -> the parts of blocks, one after the other ----


def _float16(x: Tensor | None) -> Tensor:
    assert x is not None
    return x[:, None].contiguous()


def _whole(x: Tensor | None, zero: int = 0) -> Tensor:
    assert x is not None
    return (x + zero).to(torch.uint8)


def _in_nibbles(codes: Tensor) -> Tensor:
    """The inverse of `_nibbles`."""
    low, high = codes.chunk(2, -1)
    return low | high << 4


def _in_bits(codes: Tensor, shifts: range) -> Tensor:
    """The inverse of `_bits`."""
    at = torch.tensor(shifts, dtype=torch.uint8, device=codes.device)
    return (codes << at[:, None]).sum(-2, dtype=torch.uint8)


def _in_fifth_bits(codes: Tensor) -> Tensor:
    return _in_bits((codes >> 4).unflatten(-1, (4, 8)).transpose(-1, -2), range(8))


def _in_six_bits(blocks: Scaled) -> Tensor:
    units, min_units = _whole(blocks.units), _whole(blocks.min_units)
    (a, upper_a), (b, upper_b) = units.chunk(2, -1), min_units.chunk(2, -1)
    c = upper_a & 15 | (upper_b & 15) << 4
    return torch.cat((a | (upper_a >> 4) << 6, b | (upper_b >> 4) << 6, c), -1)


def _as_q4_0(codes: Tensor, blocks: Scaled) -> Sequence[Tensor]:
    return _float16(blocks.unit), _in_nibbles(codes)


def _as_q4_1(codes: Tensor, blocks: Scaled) -> Sequence[Tensor]:
    assert blocks.min_unit is not None
    return _float16(blocks.unit), _float16(-blocks.min_unit), _in_nibbles(codes)


def _as_q5_0(codes: Tensor, blocks: Scaled) -> Sequence[Tensor]:
    return _float16(blocks.unit), _in_fifth_bits(codes), _in_nibbles(codes & 15)


def _as_q5_1(codes: Tensor, blocks: Scaled) -> Sequence[Tensor]:
    unit, minimum, nibbles = _as_q4_1(codes & 15, blocks)
    return unit, minimum, _in_fifth_bits(codes), nibbles


def _as_q8_0(codes: Tensor, blocks: Scaled) -> Sequence[Tensor]:
    return _float16(blocks.unit), codes - 127  # modulo 256, as two's complement has it


def _as_q2_k(codes: Tensor, blocks: Scaled) -> Sequence[Tensor]:
    scales = _whole(blocks.units) | _whole(blocks.min_units) << 4
    low = _in_bits(codes.unflatten(-1, (2, 4, 32)), range(0, 8, 2)).flatten(-2)
    return scales, low, _float16(blocks.unit), _float16(blocks.min_unit)


def _as_q3_k(codes: Tensor, blocks: Scaled) -> Sequence[Tensor]:
    high = _in_bits((codes >> 2).unflatten(-1, (8, 32)), range(8))
    low = _in_bits((codes & 3).unflatten(-1, (2, 4, 32)), range(0, 8, 2)).flatten(-2)
    scale = _whole(blocks.units, 32)
    upper = _in_bits((scale >> 4).unflatten(-1, (4, 4)), range(0, 8, 2))
    return high, low, _in_nibbles(scale & 15), upper, _float16(blocks.unit)


def _as_q4_k(codes: Tensor, blocks: Scaled) -> Sequence[Tensor]:
    nibbles = _in_nibbles(codes.unflatten(-1, (4, 64))).flatten(-2)
    return _float16(blocks.unit), _float16(blocks.min_unit), _in_six_bits(blocks), nibbles


def _as_q5_k(codes: Tensor, blocks: Scaled) -> Sequence[Tensor]:
    *scales, nibbles = _as_q4_k(codes & 15, blocks)
    return *scales, _in_bits((codes >> 4).unflatten(-1, (8, 32)), range(8)), nibbles


def _as_q6_k(codes: Tensor, blocks: Scaled) -> Sequence[Tensor]:
    low = _in_nibbles((codes & 15).unflatten(-1, (2, 128))).flatten(-2)
    high = _in_bits((codes >> 4).unflatten(-1, (2, 4, 32)), range(0, 8, 2)).flatten(-2)
    assert blocks.units is not None
    return low, high, blocks.units.to(torch.int8), _float16(blocks.unit)


def _as_iq4_xs(codes: Tensor, blocks: Scaled) -> Sequence[Tensor]:
    scale = _whole(blocks.units, 32)
    high = _in_bits((scale >> 4).unflatten(-1, (2, 4)).transpose(-1, -2), range(0, 8, 2))
    low = _in_bits((scale & 15).unflatten(-1, (4, 2)).transpose(-1, -2), range(0, 8, 4))
    nibbles = _in_nibbles(codes.unflatten(-1, (8, 32))).flatten(-2)
    return _float16(blocks.unit), high, low, nibbles


IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
TYPES = {
    "q4_0": BlockType(32, 18, _q4_0, _as_q4_0, Grid(32, -8, 7)),
    "q4_1": BlockType(32, 20, _q4_1, _as_q4_1, Grid(32, 0, 15, has_min=True, free_min=True)),
    "q5_0": BlockType(32, 22, _q5_0, _as_q5_0, Grid(32, -16, 15)),
    "q5_1": BlockType(32, 24, _q5_1, _as_q5_1, Grid(32, 0, 31, has_min=True, free_min=True)),
    # -128 is not used: its magnitude is not an int8, and some kernels rely on that.
    "q8_0": BlockType(32, 34, _q8_0, _as_q8_0, Grid(32, -127, 127)),
    "q2_k": BlockType(256, 84, _q2_k, _as_q2_k, Grid(16, 0, 3, has_min=True, units=(0, 15)), 100),
    "q3_k": BlockType(256, 110, _q3_k, _as_q3_k, Grid(16, -4, 3, units=(-32, 31)), 114),
    "q4_k": BlockType(256, 144, _q4_k, _as_q4_k, Grid(32, 0, 15, has_min=True, units=(0, 63)), 148),
    "q5_k": BlockType(256, 176, _q5_k, _as_q5_k, Grid(32, 0, 31, has_min=True, units=(0, 63)), 180),
    "q6_k": BlockType(256, 210, _q6_k, _as_q6_k, Grid(16, -32, 31, units=(-128, 127))),
    "iq4_nl": BlockType(32, 18, _iq4_nl, _as_q4_0, Grid(32, -127, 113, table=IQ4)),
    "iq4_xs": BlockType(
        256, 136, _iq4_xs, _as_iq4_xs, Grid(32, -127, 113, table=IQ4, units=(-32, 31)), 138
    ),
}
NARROWER = {
    "q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0",
    "iq4_xs": "iq4_nl",
}  # fmt: skip
