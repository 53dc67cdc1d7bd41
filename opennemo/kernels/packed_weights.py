"""Products on a GPU with matrices whose weights lie in codes of four to eight bits.

A few rows of inputs are multiplied by weights that are unpacked in registers, so that a step reads
no more than the codes. For many rows a part of the matrix is unpacked into 16 bits and PyTorch
multiplies. Where a format rounds its inputs to int8 in groups, the rows are rounded in the same
way. One body serves all types: a weight is `scale * code - min`, and only the places of their bits
differ.

What must be computed is defined by model/formats.py and model/blocks.py; this file knows nothing of
models. In Triton; its interpreter runs it on a CPU. Layouts: ggml-common.h of ggml.
"""

# pyright: reportIndexIssue=false
# (kernel[grid] is Triton's syntax for launching a kernel.)

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

FEW = 64  # rows up to which weights are unpacked in registers
PART = 2**26  # weights that are unpacked at a time
ROWS_OUT = 16  # rows of a matrix for each program


class Packing(NamedTuple):
    """How rows of bytes are divided, for `_tile`."""

    n_bytes: int  # of a block; of 256 weights where a row has none
    size: int  # weights that share a scale


PACKINGS = {
    "q4_0": Packing(18, 32), "q4_1": Packing(20, 32), "q5_0": Packing(22, 32),
    "q5_1": Packing(24, 32), "q8_0": Packing(34, 32), "q4_k": Packing(144, 32),
    "q5_k": Packing(176, 32), "q6_k": Packing(210, 16), "int4": Packing(128, 32),
    "int8": Packing(256, 32),
}  # fmt: skip


class PackedMatrix(NamedTuple):
    """A matrix (O, D) in codes."""

    type: str  # of PACKINGS
    rows: Tensor  # (O, bytes)
    scales: Tensor | None  # float32: int4 (O, D / 32), int8 (O, 1); the others hold theirs
    width: int  # D

    def arguments(self) -> dict:
        rows, scales = self.rows.view(torch.uint8), self.scales
        assert rows.is_contiguous() and (scales is None or scales.is_contiguous())
        kind = PACKINGS[self.type]
        return {
            "data": rows, "scales": scales, "row_bytes": rows.shape[-1], "D": self.width,
            "n_scales": 0 if scales is None else scales.shape[-1], "O": len(rows),
            "TYPE": self.type, "BYTES": kind.n_bytes, "SIZE": kind.size,
        }  # fmt: skip


def serves(type: str, width: int) -> bool:
    """Whether matrices of this type and width are multiplied here."""
    return type in PACKINGS and width % (256 if type.endswith("_k") else 32) == 0


def multiply(x: Tensor, matrix: PackedMatrix, *, rounds_inputs: bool) -> Tensor:
    """x (T, D) times a matrix (O, D) -> (T, O)."""
    assert x.is_contiguous()
    n_tokens, n_out = len(x), len(matrix.rows)
    if n_tokens <= FEW:
        out = torch.empty(n_tokens, n_out, dtype=x.dtype, device=x.device)
        tokens = max(16, triton.next_power_of_2(n_tokens))
        _multiply[(triton.cdiv(n_out, ROWS_OUT),)](
            x, out, n_tokens, ROUNDS=rounds_inputs, TOKENS=tokens, OUT=ROWS_OUT,
            num_stages=2, **matrix.arguments(),
        )  # fmt: skip
        return out
    if rounds_inputs:
        x = rounded(x)
    step = max(1, PART // matrix.width)
    parts = []
    for start in range(0, n_out, step):
        scales = None if matrix.scales is None else matrix.scales[start : start + step]
        part = matrix._replace(rows=matrix.rows[start : start + step], scales=scales)
        parts.append(F.linear(x, unpack(part, x.dtype)))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def unpack(matrix: PackedMatrix, dtype: torch.dtype, indices: Tensor | None = None) -> Tensor:
    """The rows of a matrix, or those of `indices` (R,), as numbers (R, D)."""
    n_rows = len(matrix.rows) if indices is None else len(indices)
    out = torch.empty(n_rows, matrix.width, dtype=dtype, device=matrix.rows.device)
    grid = (triton.cdiv(n_rows, ROWS_OUT), triton.cdiv(matrix.width, 256))
    _unpack[grid](out, indices, n_rows, OUT=ROWS_OUT, **matrix.arguments())
    return out


def rounded(x: Tensor) -> Tensor:
    """x (T, D) as int8 in groups of 32 would hold it."""
    out = torch.empty_like(x)
    _round_groups[(len(x), triton.cdiv(x.shape[-1], 256))](x, out, x.shape[-1])
    return out


@triton.jit
def _half(data, at):
    """The float16 in two bytes, in float32."""
    low, high = tl.load(data + at).to(tl.uint16), tl.load(data + at + 1).to(tl.uint16)
    return (low | (high << 8)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _tile(
    data, scales, row, chunk, row_bytes, D, n_scales,
    TYPE: tl.constexpr, BYTES: tl.constexpr, SIZE: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """256 weights of each of the rows `row` (OUT,): (OUT, 256) float32, zeros after a row's end."""
    GROUPS: tl.constexpr = 256 // SIZE
    g, s = tl.arange(0, GROUPS), tl.arange(0, SIZE)
    # After the row's end the first group is read instead, and masked.
    inside = chunk * 256 + g * SIZE < D
    start = row.to(tl.int64)[:, None] * row_bytes
    if TYPE == "q4_k" or TYPE == "q5_k" or TYPE == "q6_k":
        at = start + chunk * BYTES + 0 * g[None, :]
    elif TYPE == "int4" or TYPE == "int8":
        at = start + tl.where(inside, chunk * BYTES + g * (BYTES // GROUPS), 0)[None, :]
    else:
        at = start + tl.where(inside, chunk * GROUPS + g, 0)[None, :] * BYTES
    first = at[:, :, None]
    h, i = g[None, :, None], s[None, None, :]
    if TYPE == "q4_k" or TYPE == "q5_k":
        LOW: tl.constexpr = 16 if TYPE == "q4_k" else 48
        codes = (tl.load(data + first + LOW + h // 2 * 32 + i) >> (h % 2 * 4).to(tl.uint8)) & 15
        if TYPE == "q5_k":
            codes |= ((tl.load(data + first + 16 + i) >> h.to(tl.uint8)) & 1) << 4
        j = (g % 4)[None, :]
        a, b = tl.load(data + at + 4 + j), tl.load(data + at + 8 + j)
        c = tl.load(data + at + 12 + j)
        plain = (g < 4)[None, :]
        unit = tl.where(plain, a & 63, (c & 15) | ((a >> 6) << 4)).to(tl.float32)
        least = tl.where(plain, b & 63, (c >> 4) | ((b >> 6) << 4)).to(tl.float32)
        scale, low = _half(data, at) * unit, _half(data, at + 2) * least
        weights = codes.to(tl.float32) * scale[:, :, None] - low[:, :, None]
    elif TYPE == "q6_k":
        byte = h // 8 * 64 + h % 4 * 16 + i
        codes = (tl.load(data + first + byte) >> (h % 8 // 4 * 4).to(tl.uint8)) & 15
        byte = 128 + h // 8 * 32 + h % 2 * 16 + i
        codes |= ((tl.load(data + first + byte) >> (h % 8 // 2 * 2).to(tl.uint8)) & 3) << 4
        unit = tl.load(data + at + 192 + g[None, :]).to(tl.int8, bitcast=True).to(tl.float32)
        scale = _half(data, at + 208) * unit
        weights = (codes.to(tl.float32) - 32) * scale[:, :, None]
    elif TYPE == "q8_0":
        codes = tl.load(data + first + 2 + i).to(tl.int8, bitcast=True)
        weights = codes.to(tl.float32) * _half(data, at)[:, :, None]
    elif TYPE == "int8":
        codes = tl.load(data + first + i).to(tl.int8, bitcast=True)
        scale = tl.load(scales + row.to(tl.int64) * n_scales)[:, None]
        weights = codes.to(tl.float32) * scale[:, :, None]
    elif TYPE == "int4":
        codes = (tl.load(data + first + i // 2) >> (i % 2 * 4).to(tl.uint8)) & 15
        group = tl.where(inside, chunk * GROUPS + g, 0)[None, :]
        scale = tl.load(scales + row.to(tl.int64)[:, None] * n_scales + group)
        weights = (codes.to(tl.float32) - 8) * scale[:, :, None]
    else:
        FIFTH: tl.constexpr = TYPE == "q5_0" or TYPE == "q5_1"
        HAS_MIN: tl.constexpr = TYPE == "q4_1" or TYPE == "q5_1"
        BITS: tl.constexpr = 4 if HAS_MIN else 2  # where the fifth bits begin, else the codes
        LOW4: tl.constexpr = BITS + 4 if FIFTH else BITS
        codes = (tl.load(data + first + LOW4 + i % 16) >> (i // 16 * 4).to(tl.uint8)) & 15
        if FIFTH:
            codes |= ((tl.load(data + first + BITS + i // 8) >> (i % 8).to(tl.uint8)) & 1) << 4
        scale = _half(data, at)[:, :, None]
        if HAS_MIN:
            weights = codes.to(tl.float32) * scale + _half(data, at + 2)[:, :, None]
        else:
            weights = (codes.to(tl.float32) - (16 if FIFTH else 8)) * scale
    weights = tl.where(inside[None, :, None], weights, 0.0)
    return tl.reshape(weights, [OUT, 256])


@triton.jit
def _in_int8(x, TOKENS: tl.constexpr):
    """x (TOKENS, 256) as int8 in groups of 32 holds it, in its own type."""
    groups = tl.reshape(x.to(tl.float32), [TOKENS, 8, 32])
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(groups), 2), 1e-12), 127.0)[:, :, None]
    # Adding and taking away 1.5 * 2**23 rounds to whole numbers, ties to even.
    codes = (tl.div_rn(groups, scale + 0 * groups) + 12582912.0) - 12582912.0
    return tl.reshape(codes * scale, [TOKENS, 256]).to(x.dtype)


@triton.jit
def _multiply(
    x, out, n_tokens, data, scales, row_bytes, D, n_scales, O,
    TYPE: tl.constexpr, BYTES: tl.constexpr, SIZE: tl.constexpr, ROUNDS: tl.constexpr,
    TOKENS: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Some rows of the matrix, with all of the tokens."""
    tokens, columns = tl.arange(0, TOKENS), tl.arange(0, 256)
    outputs = tl.program_id(0) * OUT + tl.arange(0, OUT)
    row = tl.minimum(outputs, O - 1)
    sums = tl.zeros([TOKENS, OUT], tl.float32)
    for chunk in range(tl.cdiv(D, 256)):
        weights = _tile(data, scales, row, chunk, row_bytes, D, n_scales, TYPE, BYTES, SIZE, OUT)
        place = chunk * 256 + columns
        mask = (tokens < n_tokens)[:, None] & (place < D)[None, :]
        inputs = tl.load(x + tokens[:, None] * D + place[None, :], mask=mask, other=0.0)
        if ROUNDS:
            inputs = _in_int8(inputs, TOKENS)
        sums += tl.dot(inputs, tl.trans(weights.to(inputs.dtype)), input_precision="ieee")
    at = tokens[:, None] * O + outputs[None, :]
    mask = (tokens < n_tokens)[:, None] & (outputs < O)[None, :]
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _unpack(
    out, indices, n_rows, data, scales, row_bytes, D, n_scales, O,
    TYPE: tl.constexpr, BYTES: tl.constexpr, SIZE: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """256 columns of some rows."""
    targets = tl.program_id(0).to(tl.int64) * OUT + tl.arange(0, OUT)
    row = tl.minimum(targets, n_rows - 1)
    if indices is not None:
        row = tl.load(indices + row)
    chunk = tl.program_id(1)
    weights = _tile(data, scales, row, chunk, row_bytes, D, n_scales, TYPE, BYTES, SIZE, OUT)
    place = chunk * 256 + tl.arange(0, 256)
    mask = (targets < n_rows)[:, None] & (place < D)[None, :]
    at = targets[:, None] * D + place[None, :]
    tl.store(out + at, weights.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _round_groups(x, out, D):
    """256 columns of one row."""
    place = tl.program_id(1) * 256 + tl.arange(0, 256)
    at = tl.program_id(0).to(tl.int64) * D + place
    row = tl.load(x + at, mask=place < D, other=0.0)
    tl.store(out + at, tl.reshape(_in_int8(row[None, :], 1), [256]), mask=place < D)
