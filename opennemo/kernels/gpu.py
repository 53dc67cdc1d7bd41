"""The operations between the matrix products of a decoder's layer on a GPU, each as one kernel.

PyTorch would run some forty small kernels a layer, and at one token a step they would take about
as long as reading the weights. Here a row (one token's channels) is read once: residual sum and
norm, SwiGLU, and rotary angles with the write into the KV cache each end in the rounding that
follows. Numbers are rounded wherever the definition rounds them, in the same way.

What must be computed is defined by model/transformer.py, model/formats.py and model/pages.py;
this file knows nothing of them. In Triton; its interpreter runs it on a CPU.
"""

# pyright: reportIndexIssue=false
# (kernel[grid] is Triton's syntax for launching a kernel.)

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor
from torch.nn.functional import ScalingType

FP8 = torch.float8_e4m3fn
CACHES = {FP8: 1, torch.int8: 2}  # of codes; any other holds the numbers themselves


class RoundedRows(NamedTuple):
    """Rows (T, D) as the next product takes them: numbers, or E4M3 codes with scales (T, 1)."""

    values: Tensor
    scale: Tensor | None = None


class ToFP8(NamedTuple):
    """Round to E4M3, by one scale (1, 1) for all rows, or by the finest of each row.

    The finest scale is the largest magnitude over 448, or the next power of two.
    """

    scale: Tensor | None = None
    power_of_two: bool = True


def multiplies_fp8(device: torch.device) -> bool:
    """Whether products of E4M3 codes run here: from compute capability 8.9 on, and on a CPU."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def fp8_linear(rows: RoundedRows, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes of rows (T, D) times codes (O, D) with scales (1, O) -> (T, O); D and O by 16.

    Sums are kept in float32. The tensor cores' faster sums, of 14 bits, are not used: they would
    cost quality.
    """
    assert rows.scale is not None
    by_row = ScalingType.RowWise
    return F.scaled_mm(
        rows.values, weight.t(), rows.scale, by_row, scale, by_row, output_dtype=dtype
    )


def norm(
    x: Tensor, update: Tensor | None, gains: Tensor, eps: float, rounding: ToFP8 | None = None
) -> RoundedRows:
    """Add an update to x (T, D), in place, and norm its rows by their root mean square."""
    rows, arguments = _prepare(x, x.shape[-1], rounding)
    _norm[(len(x),)](x, update, gains, eps, **arguments)
    return rows


def swiglu(gate_up: Tensor, rounding: ToFP8 | None = None) -> RoundedRows:
    """(T, 2 F), gates before the rest -> silu(gate) * up, (T, F)."""
    rows, arguments = _prepare(gate_up, gate_up.shape[-1] // 2, rounding)
    _swiglu[(len(gate_up),)](gate_up, **arguments)
    return rows


def round_rows(x: Tensor, rounding: ToFP8 | None = None) -> RoundedRows:
    """x (T, D) as the next product takes it."""
    if rounding is None:
        return RoundedRows(x)
    rows, arguments = _prepare(x, x.shape[-1], rounding)
    _round[(len(x),)](x, **arguments)
    return rows


def rotate_and_write(
    qkv: Tensor, rope: Tensor, n_heads: int, codes: Tensor, scale: Tensor | None, slots: Tensor
) -> Tensor:
    """Rotate queries and keys of qkv (T, (N + 2 K) H), write keys and values -> queries (T, N, H).

    `rope` (T, 1, H / 2, 2) are cosines and sines in float32. `codes` (2, P, page_size, K, H) are
    one layer's keys and values; `scale` belongs to them if they have 8 bits: (2,) for FP8, and
    written as well for int8, (2, P, page_size, K). `slots` (T,) are int64.
    """
    n_kv_heads, head_dim = codes.shape[-2:]
    assert qkv.is_contiguous() and rope.is_contiguous() and codes.is_contiguous()
    q = torch.empty(len(qkv), n_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    _rotate_and_write[(len(qkv), n_heads + 2 * n_kv_heads)](
        qkv, rope, q, codes, scale, slots, codes[0].numel() // head_dim,
        HEADS=n_heads, KV_HEADS=n_kv_heads, HALF=head_dim // 2,
        WIDTH=triton.next_power_of_2(head_dim // 2), CACHE=CACHES.get(codes.dtype, 0), num_warps=1,
    )  # fmt: skip
    return q


def _prepare(x: Tensor, width: int, rounding: ToFP8 | None) -> tuple[RoundedRows, dict]:
    """Buffers for the rows that a kernel makes of x, and its arguments for making them."""
    assert x.is_contiguous()
    given = None if rounding is None else rounding.scale
    rows = RoundedRows(x.new_empty(len(x), width))
    if rounding is not None:
        scale = torch.empty(len(x), 1, device=x.device)
        rows = RoundedRows(torch.empty(len(x), width, dtype=FP8, device=x.device), scale)
    # A warp for every 512 channels: 16 a thread.
    size = triton.next_power_of_2(width)
    return rows, {
        "out": rows.values, "scales": rows.scale, "given": given, "D": width, "SIZE": size,
        "POWER": rounding is None or rounding.power_of_two, "DTYPE": TYPES[x.dtype],
        "num_warps": min(max(size // 512, 1), 16),
    }  # fmt: skip


TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _norm(
    x, update, gains, eps, out, scales, given,
    D: tl.constexpr, SIZE: tl.constexpr, DTYPE: tl.constexpr, POWER: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, SIZE)
    at, mask = tl.program_id(0).to(tl.int64) * D + columns, columns < D
    row = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if update is not None:
        row += tl.load(update + at, mask=mask, other=0.0).to(tl.float32)
        row = row.to(DTYPE).to(tl.float32)
        tl.store(x + at, row.to(DTYPE), mask=mask)
    row *= tl.rsqrt(tl.sum(row * row, 0) / D + eps)
    row *= tl.load(gains + columns, mask=mask, other=0.0).to(tl.float32)
    _store(row.to(DTYPE), out, scales, given, D, SIZE, POWER)


@triton.jit
def _swiglu(
    gate_up, out, scales, given,
    D: tl.constexpr, SIZE: tl.constexpr, DTYPE: tl.constexpr, POWER: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, SIZE)
    at, mask = tl.program_id(0).to(tl.int64) * 2 * D + columns, columns < D
    gate = tl.load(gate_up + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at + D, mask=mask, other=0.0).to(tl.float32)
    gate = (gate / (1 + tl.exp(-gate))).to(DTYPE).to(tl.float32)
    _store((gate * up).to(DTYPE), out, scales, given, D, SIZE, POWER)


@triton.jit
def _round(
    x, out, scales, given,
    D: tl.constexpr, SIZE: tl.constexpr, DTYPE: tl.constexpr, POWER: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, SIZE)
    at = tl.program_id(0).to(tl.int64) * D + columns
    _store(tl.load(x + at, mask=columns < D, other=0.0), out, scales, given, D, SIZE, POWER)


@triton.jit
def _store(
    row, out, scales, given, D: tl.constexpr, SIZE: tl.constexpr, POWER: tl.constexpr
):  # fmt: skip
    """Store a row (SIZE,) as it is, or as codes with the given scale, or with its own."""
    columns, token = tl.arange(0, SIZE), tl.program_id(0).to(tl.int64)
    if scales is not None:
        row = row.to(tl.float32)
        if given is not None:
            scale = tl.load(given)
            row = tl.div_rn(row, scale)
        elif not POWER:
            scale = tl.div_rn(tl.maximum(tl.max(tl.abs(row), 0), 1e-12), 448.0)
            row = tl.div_rn(row, scale)
        else:
            # 448 is 1.75 * 2**8, so the exponent of extreme / 448, rounded up, is that of extreme,
            # one more if its mantissa is above 1.75, less 8. Scale and inverse are exact.
            extreme = tl.maximum(tl.max(tl.abs(row), 0), 1e-12)
            exponent = ((extreme.to(tl.int32, bitcast=True) + 0x1FFFFF) >> 23) - 8
            finite = extreme < float("inf")
            scale = tl.where(finite, (exponent << 23).to(tl.float32, bitcast=True), extreme)
            # An infinite row becomes NaN, as it does in the definition; it must not be hidden.
            inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
            row *= tl.where(finite, inverse, 0.0)
        row = _nearest_e4m3(row)
        tl.store(scales + token, scale)
    tl.store(out + token * D + columns, row.to(out.dtype.element_ty), mask=columns < D)


@triton.jit
def _nearest_e4m3(x):
    """The E4M3 number next to x, ties to even: in float32, so that the cast has nothing to round.

    The interpreter's casts would, and not to even. A sum with 1.5 * 2**(e + 20) rounds numbers of
    exponent e to multiples of 2**(e - 3); below 2**-6 they all share the multiples of 2**-9.
    """
    x = tl.where(x > 448, 448.0, tl.where(x < -448, -448.0, x))  # a NaN stays one
    exponent = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 0xFF, 127 - 6)
    shift = (((exponent + 20) << 23) | 0x400000).to(tl.float32, bitcast=True)
    return (x + shift) - shift


@triton.jit
def _rotate_and_write(
    qkv, rope, q, codes, scale, slots, slots_in_pool,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr,
    CACHE: tl.constexpr,
):  # fmt: skip
    """One head of one token: a query, then keys, then values."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pairs = tl.arange(0, WIDTH)
    mask = pairs < HALF
    at = (token * (HEADS + 2 * KV_HEADS) + head) * 2 * HALF + 2 * pairs
    even, odd = tl.load(qkv + at, mask=mask, other=0.0), tl.load(qkv + at + 1, mask=mask, other=0.0)
    if head < HEADS + KV_HEADS:
        angle = token * 2 * HALF + 2 * pairs
        cos, sin = tl.load(rope + angle, mask=mask), tl.load(rope + angle + 1, mask=mask)
        real, imag = even.to(tl.float32), odd.to(tl.float32)
        even = (real * cos - imag * sin).to(even.dtype)
        odd = (real * sin + imag * cos).to(odd.dtype)
    if head < HEADS:
        at = (token * HEADS + head) * 2 * HALF + 2 * pairs
        tl.store(q + at, even, mask=mask)
        tl.store(q + at + 1, odd, mask=mask)
    else:
        part = (head - HEADS) // KV_HEADS  # keys 0, values 1
        slot = part * slots_in_pool + tl.load(slots + token) * KV_HEADS + (head - HEADS) % KV_HEADS
        first, second = even.to(tl.float32), odd.to(tl.float32)
        if CACHE == 1:
            given = tl.load(scale + part)
            first = _nearest_e4m3(tl.div_rn(first, given))
            second = _nearest_e4m3(tl.div_rn(second, given))
        if CACHE == 2:
            extreme = tl.max(tl.maximum(tl.abs(first), tl.abs(second)), 0)
            own = tl.div_rn(tl.maximum(extreme, 1e-12), 127.0)
            # Adding and taking away 1.5 * 2**23 rounds to whole numbers, ties to even.
            first = (tl.div_rn(first, own) + 12582912.0) - 12582912.0
            second = (tl.div_rn(second, own) + 12582912.0) - 12582912.0
            tl.store(scale + slot, own)
        at = slot * 2 * HALF + 2 * pairs
        tl.store(codes + at, first.to(codes.dtype.element_ty), mask=mask)
        tl.store(codes + at + 1, second.to(codes.dtype.element_ty), mask=mask)
