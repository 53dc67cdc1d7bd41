"""Scales, minima and codes for blocks of weights: those that lose least.

A group of weights becomes `scale * value - min`, where `value` is one of a few numbers. The loss is
the sum of `importance * (weight - result)^2`. Given the codes, the best scale and min solve least
squares; given scale and min, the best codes are the nearest. So the search begins at several
scales, keeps the best and alternates between the two. Where groups of a block have small whole
numbers as scales, the unit of these numbers is found in the same way.

Weights of a group lie along the first axis, (n, groups), where sums over them are fast. This file
knows nothing about bytes; blocks.py does.

Ideas: the k-quants and importance matrices of llama.cpp, Lloyd's algorithm for scalar quantisation.
"""

import ctypes
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from opennemo.kernels import cpu

TINY = 1e-30
# Scales at which the search begins, relative to the one that just reaches the extreme.
STARTS = (0.82, 0.87, 0.91, 0.94, 0.97, 1.0, 1.03, 1.07, 1.12, 1.18, 1.26)
MIRRORED = (-1.1, -1.0, -0.9)  # with the table the other way round, as it is not symmetric
N_ALTERNATIONS = 3


@dataclass(frozen=True)
class Grid:
    """The numbers that a type of block can stand for."""

    n: int  # weights that share a scale
    low: int  # the smallest value of a code, and the largest
    high: int
    has_min: bool = False
    free_min: bool = False  # it may be negative; otherwise zero lies within a group's range
    # The limits of the whole numbers that are groups' scales and minima, in units of two floats
    # of the block; None: each group has floats of its own.
    units: tuple[int, int] | None = None
    table: Sequence[int] | None = None  # the values, if they are not all of low to high

    def nearest(self, x: Tensor) -> Tensor:
        """Any numbers to the nearest of those that codes stand for."""
        if self.table is None:
            return x.round().clamp_(self.low, self.high)
        values = torch.tensor(self.table, dtype=torch.float32)
        return self._look_up(values, x)

    def codes(self, values: Tensor) -> Tensor:
        """The result of `nearest` as codes from 0: how many lower values there are."""
        if self.table is None:
            return (values - self.low).to(torch.uint8)
        return self._look_up(torch.arange(len(self.table), dtype=torch.uint8), values)

    def _look_up(self, entries: Tensor, x: Tensor) -> Tensor:
        """The entry of the nearest value; `entries` has one for each value."""
        assert self.table is not None
        # Half-way marks are multiples of a half: doubled, rounding down decides exactly.
        marks = torch.tensor([a + b for a, b in pairwise(self.table)])
        entries = entries[torch.bucketize(torch.arange(-256, 256), marks, right=True)]
        doubled = (2 * x).floor_().clamp_(-256, 255).add_(256).int()
        return entries.to(x.device).index_select(0, doubled.flatten()).view(x.shape)


class Scaled(NamedTuple):
    """Blocks of weights in codes. Weights are unit * units * value - min_unit * min_units."""

    codes: Tensor  # (blocks, weights) uint8, the smallest value being 0
    unit: Tensor  # (blocks,) float16
    min_unit: Tensor | None
    units: Tensor | None  # (blocks, groups) whole numbers, if groups have those
    min_units: Tensor | None


def fit(weights: Tensor, importance: Tensor, grid: Grid) -> Scaled:
    """Blocks (B, n) of float32 -> codes, scales and minima; `importance` (B, n) is positive.

    On a CPU the kernel searches, some forty times as fast.
    """
    if weights.device.type == "cpu":
        try:
            return fit_by_kernel(weights, importance, grid)
        except cpu.CompilerMissing as error:
            warnings.warn(f"{error}; scales are searched in PyTorch instead", stacklevel=2)
    return fit_by_definition(weights, importance, grid)


def fit_by_kernel(
    weights: Tensor, importance: Tensor, grid: Grid, instructions: str | None = None
) -> Scaled:
    """As the definition, except for the order of additions. Raises: CompilerMissing."""
    least, most = grid.units or (0, 0)
    table, starts = grid.table or (), _starts(grid)
    search = cpu.Search(
        n=grid.n, low=grid.low, high=grid.high, has_min=grid.has_min, free_min=grid.free_min,
        n_groups=weights.shape[1] // grid.n if grid.units else 0, least=least, most=most,
        n_values=len(table), n_starts=len(starts), n_alternations=N_ALTERNATIONS,
        values=(ctypes.c_float * 16)(*table), starts=(ctypes.c_float * 16)(*starts),
    )  # fmt: skip
    codes, unit, min_unit, units, min_units = cpu.fit(weights, importance, search, instructions)
    return Scaled(
        codes, unit.half(), min_unit.half() if grid.has_min else None,
        units if grid.units else None, min_units if grid.units and grid.has_min else None,
    )  # fmt: skip


def fit_by_definition(weights: Tensor, importance: Tensor, grid: Grid) -> Scaled:
    """`fit` in PyTorch, on any device."""
    n_blocks = len(weights)
    x, w = (t.reshape(-1, grid.n).T.contiguous() for t in (weights, importance))
    scale, low = _search(x, w, grid)
    if grid.units is None:
        unit, min_unit, units, min_units = _half(scale), _half(-low), None, None
        scale, low = unit.float(), -min_unit.float()
        values = _values(x, scale, low, grid)
    else:
        unit, min_unit, units, min_units, values = _in_units(x, w, scale, low, n_blocks, grid)
    codes = grid.codes(values).T.reshape(n_blocks, -1)
    if not grid.has_min:
        return Scaled(codes, unit, None, units, None)
    return Scaled(codes, unit, min_unit, units, min_units)


def _half(x: Tensor) -> Tensor:
    return x.clamp(-65504, 65504).half()


def _values(x: Tensor, scale: Tensor, low: Tensor, grid: Grid) -> Tensor:
    """The nearest values (n, M) where groups have these scales, and `low` is added to them."""
    inverse = torch.where(scale == 0, 0, 1 / scale)
    return grid.nearest((x - low if grid.has_min else x) * inverse)


def _search(x: Tensor, w: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Groups (n, M) -> scales (M,), and the number that code 0 stands for, (M,)."""
    wx = w * x
    total, first = w.sum(0), wx.sum(0)
    zero = torch.zeros_like(first)
    if grid.has_min:
        low, high = x.amin(0), x.amax(0)
        low = low if grid.free_min else low.clamp(max=0)
        widest = (high - low) / grid.high
    else:
        extreme = x.gather(0, x.abs().argmax(0, keepdim=True))[0]
        low, widest = zero, extreme / grid.low
    best_gain = torch.full_like(first, -1)
    best_scale, best_low = zero, zero

    def improve(scale: Tensor, low: Tensor) -> None:
        nonlocal best_gain, best_scale, best_low
        values = _values(x, scale, low, grid)
        wv = w * values
        xv, vv = (wx * values).sum(0), (wv * values).sum(0)
        if grid.has_min:
            scale, low = _line(total, wv.sum(0), vv, first, xv)
            if not grid.free_min:
                above = low > 0
                scale = torch.where(above, xv / vv.clamp(min=TINY), scale)
                low = torch.where(above, 0, low)
            gain = scale * xv + low * first
        else:
            scale, low = xv / vv.clamp(min=TINY), zero
            gain = scale * xv
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best_scale = torch.where(better, scale, best_scale)
        best_low = torch.where(better, low, best_low)

    for start in _starts(grid):
        improve(widest * start, low)
    for _ in range(N_ALTERNATIONS):
        improve(best_scale, best_low)
    return best_scale, best_low


def _starts(grid: Grid) -> Sequence[float]:
    if grid.table is not None:
        return STARTS + MIRRORED
    return STARTS if grid.high - grid.low < 128 else (1.0,)  # eight bits leave nothing to find


def _line(w: Tensor, wv: Tensor, wvv: Tensor, wx: Tensor, wvx: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares: slope and intercept of x over v from sums with weights w."""
    determinant = w * wvv - wv * wv
    flat = determinant <= 1e-6 * w * wvv
    slope = torch.where(flat, 0, (w * wvx - wv * wx) / torch.where(flat, 1, determinant))
    return slope, (wx - slope * wv) / w


def _in_units(
    x: Tensor, w: Tensor, scale: Tensor, low: Tensor, n_blocks: int, grid: Grid
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Scales (M,) of groups as whole numbers of a unit that the block's groups share."""
    assert grid.units is not None
    least, most = grid.units
    scale, low = scale.view(n_blocks, -1), low.view(n_blocks, -1)
    n_groups = scale.shape[1]

    def rounded(values: Tensor, unit: Tensor) -> Tensor:
        inverse = torch.where(unit == 0, 0, 1 / unit.float())
        return (values * inverse[:, None]).round().clamp_(least, most)

    if least < 0:
        extreme = scale.gather(1, scale.abs().argmax(1, keepdim=True))[:, 0]
        unit = _half(extreme / least)
    else:
        unit = _half(scale.amax(1) / most)
    min_unit = _half((-low).amax(1) / most)
    units, min_units = rounded(scale, unit), rounded(-low, min_unit)

    def of_groups(per_block: Tensor, per_group: Tensor) -> Tensor:
        return (per_block.float()[:, None] * per_group).flatten()

    total, wx = w.sum(0), (w * x).sum(0)
    best: tuple[Tensor, ...] | None = None
    best_loss = torch.empty(0)
    for _ in range(1 + N_ALTERNATIONS):
        scale, low = of_groups(unit, units), -of_groups(min_unit, min_units)
        values = _values(x, scale, low, grid)
        loss = (w * (x - scale * values - low) ** 2).sum(0).view(n_blocks, -1).sum(1)
        now = (unit, min_unit, units, min_units, values.view(-1, n_blocks, n_groups))
        if best is None:
            best, best_loss = now, loss
        else:
            better = loss < best_loss
            shapes = [better, better, better[:, None], better[:, None], better[:, None]]
            best = tuple(
                torch.where(b, new, old) for b, new, old in zip(shapes, now, best, strict=True)
            )
            best_loss = torch.minimum(loss, best_loss)
        # The whole numbers that are best for these values, then the units.
        if grid.has_min:
            lows = (wx - scale * (w * values).sum(0)) / total
            min_units = rounded(-lows.view(n_blocks, -1), min_unit)
            low = -of_groups(min_unit, min_units)
        wvv = (w * values * values).sum(0)
        scales = ((w * values) * (x - low)).sum(0) / wvv.clamp(min=TINY)
        units = rounded(scales.view(n_blocks, -1), unit)
        u, v = units.flatten() * values, -min_units.flatten()
        sums = [w * u * u, w * u * v, w * v * v, w * u * x, w * v * x]
        uu, uv, vv, ux, vx = (s.sum(0).view(n_blocks, -1).sum(1) for s in sums)
        if grid.has_min:
            determinant = uu * vv - uv * uv
            flat = determinant <= 1e-6 * uu * vv
            safe = torch.where(flat, 1, determinant)
            both = (ux * vv - uv * vx) / safe, (vx * uu - uv * ux) / safe
            unit = _half(torch.where(flat, ux / uu.clamp(min=TINY), both[0]))
            min_unit = _half(torch.where(flat, 0, both[1]).clamp(min=0))
        else:
            unit = _half(ux / uu.clamp(min=TINY))
    assert best is not None
    *scales, values = best
    return (*scales, values.reshape(len(values), -1))  # pyright: ignore[reportReturnType]
