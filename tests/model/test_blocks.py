"""Weights rounded to GGUF's blocks: read alike by `gguf`, and with less loss than the nearest."""

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from opennemo.kernels import cpu
from opennemo.model import blocks
from opennemo.model.block_scales import fit_by_definition, fit_by_kernel
from opennemo.model.blocks import TYPES
from tests.blocks import random_blocks

WIDTH = 512


@pytest.fixture
def weights() -> Tensor:
    """Rows of very different sizes, with outliers, and some that are odd."""
    torch.manual_seed(0)
    x = torch.distributions.StudentT(5.0).sample((40, WIDTH)) * torch.logspace(-3, 1, 40)[:, None]
    x[0], x[1], x[2, :300], x[3] = 0, 0.25, 0, x[3].abs()
    return x


@pytest.fixture
def importance() -> Tensor:
    torch.manual_seed(1)
    return torch.rand(WIDTH) ** 4


def loss(type: str, rows: Tensor, weights: Tensor, importance: Tensor | float = 1.0) -> Tensor:
    return ((blocks.dequantize(type, rows) - weights) ** 2 * importance).sum(1)


def nearest(type: str, weights: Tensor) -> Tensor:
    """Each number to the nearest on the grid that just reaches the extremes of its group."""
    grid = TYPES[type].grid
    x = weights.unflatten(-1, (-1, grid.n))
    if grid.has_min:
        low = x.amin(-1, keepdim=True)
        low = low if grid.free_min else low.clamp(max=0)
        scale = (x.amax(-1, keepdim=True) - low) / grid.high
    else:
        extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True))
        low, scale = torch.zeros(()), extreme / grid.low
    table = torch.tensor(grid.table or range(grid.low, grid.high + 1))
    scale = torch.where(scale == 0, 1, scale)
    codes = (((x - low) / scale)[..., None] - table).abs().argmin(-1)
    return (table[codes] * scale + low).flatten(-2)


@pytest.mark.parametrize("type", TYPES)
def test_gguf_reads_what_is_written(type: str, weights: Tensor):
    rows = blocks.quantize(type, weights)
    assert rows.dtype == torch.uint8 and rows.shape == (40, TYPES[type].row_bytes(WIDTH))
    theirs = gguf.dequantize(rows.numpy(), gguf.GGMLQuantizationType[type.upper()])
    assert np.array_equal(theirs, blocks.dequantize(type, rows).numpy())
    assert torch.equal(rows[0], blocks.quantize(type, torch.zeros(1, WIDTH))[0])
    assert not blocks.dequantize(type, rows)[0].any()


@pytest.mark.parametrize("type", TYPES)
def test_the_loss_is_not_above_that_of_the_nearest(type: str, weights: Tensor):
    ours = loss(type, blocks.quantize(type, weights), weights)
    peer = ((nearest(type, weights) - weights) ** 2).sum(1)
    # Scales are float16 here, and whole numbers of a unit in the larger blocks.
    assert (ours <= 1.05 * peer + 1e-6 * (weights**2).sum(1)).all()
    assert ours.sum() < (0.98 if type == "q8_0" else 0.95) * peer.sum()


@pytest.mark.parametrize(
    "type", [t for t in TYPES if t in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")]
)
def test_the_loss_is_below_that_of_gguf_s_own_rounding(type: str, weights: Tensor):
    kind = gguf.GGMLQuantizationType[type.upper()]
    theirs = gguf.dequantize(gguf.quantize(weights.numpy(), kind), kind)
    peer = ((torch.from_numpy(theirs) - weights) ** 2).sum()
    assert (
        loss(type, blocks.quantize(type, weights), weights).sum()
        < (0.98 if type == "q8_0" else 0.95) * peer
    )


@pytest.mark.parametrize("type", TYPES)
def test_importance_lowers_the_loss_that_it_weighs(type: str, weights: Tensor, importance: Tensor):
    without, with_it = (blocks.quantize(type, weights, i) for i in (None, importance))
    importance = importance / importance.mean()
    lower, higher = (loss(type, rows, weights, importance) for rows in (with_it, without))
    assert lower.sum() < 0.95 * higher.sum()
    assert loss(type, with_it, weights).sum() > loss(type, without, weights).sum()
    uniform = blocks.quantize(type, weights, torch.full((WIDTH,), 7.0))
    assert torch.equal(uniform, without)
    assert torch.equal(blocks.quantize(type, weights, torch.zeros(WIDTH)), without)


@pytest.mark.parametrize("type", TYPES)
def test_what_is_on_the_grid_stays_there(type: str):
    rows = random_blocks(type, 8, WIDTH, exact=True)
    if type == "q8_0":
        rows[rows == 128] = 129  # -128 is never written
    weights = blocks.dequantize(type, rows)
    found = blocks.dequantize(type, blocks.quantize(type, weights))
    n_bits = 8 * TYPES[type].n_bytes / TYPES[type].n_weights
    share = 1.2 if type == "q8_0" else 0.3  # one of 255 codes has the next one very near
    assert ((found - weights) ** 2).sum() < share * 4**-n_bits * (weights**2).sum()


@pytest.mark.parametrize("type", TYPES)
def test_rows_do_not_depend_on_their_company(type: str, weights: Tensor, importance: Tensor):
    together = blocks.quantize(type, weights.repeat(7, 1), importance)  # more than one chunk
    assert torch.equal(together, blocks.quantize(type, weights, importance).repeat(7, 1))
    assert torch.equal(blocks.quantize(type, weights.bfloat16()), blocks.quantize(
        type, weights.bfloat16().float()))  # fmt: skip


@pytest.mark.parametrize("type", TYPES)
def test_the_kernel_finds_what_the_definition_finds(
    type: str, weights: Tensor, importance: Tensor, instructions: str
):
    kind = TYPES[type]
    x, w = (t.reshape(-1, kind.n_weights) for t in (weights, importance.expand_as(weights) + 1e-3))
    x, w = x[:-1], w[:-1]  # not as many as lie side by side
    ours, defined = fit_by_kernel(x, w, kind.grid, instructions), fit_by_definition(x, w, kind.grid)
    # Of the row of one number many candidates are equally good, and chance takes one of them.
    constant = torch.arange(len(x)) * kind.n_weights // WIDTH == 1
    assert (ours.codes == defined.codes)[~constant].float().mean() > 0.98
    losses = []
    for found in (ours, defined):
        parts = [part.view(torch.uint8) for part in kind.pack(found.codes, found)]
        back = blocks.dequantize(type, torch.cat(parts, -1))
        losses.append(((back - x) ** 2 * w).sum(1))
    assert torch.allclose(losses[0].sum(), losses[1].sum(), rtol=2e-3)
    # Its scale is exact until it becomes one of 31 (iq4_xs) or 63 (q4_k) steps of the block's unit:
    # a relative error whose mean square, over groups, is at most (1 / 31)^2 / 12 = 9e-5.
    slack = torch.where(constant, 9e-5, 1e-6) * (x**2 * w).sum(1)
    assert (losses[0] <= 1.3 * losses[1] + slack).all()


def test_without_a_compiler_the_definition_searches(
    weights: Tensor, monkeypatch: pytest.MonkeyPatch
):
    def missing(_: str) -> None:
        raise cpu.CompilerMissing("no C++ compiler found")

    found = blocks.quantize("q4_k", weights[4:6])
    monkeypatch.setattr(cpu, "load_library", missing)
    with pytest.warns(UserWarning, match="scales are searched in PyTorch instead"):
        defined = blocks.quantize("q4_k", weights[4:6])
    assert (found == defined).float().mean() > 0.95


@pytest.mark.parametrize("type", TYPES)
def test_numbers_of_any_size(type: str):
    for size in (1e-30, 1e-6, 1e4, 1e30):
        rows = blocks.quantize(type, torch.linspace(-size, size, 256)[None])
        assert torch.isfinite(blocks.dequantize(type, rows)).all(), size


@pytest.mark.parametrize(("type", "n"), [("q4_0", 32), ("q4_k", 256)])
def test_widths_are_whole_blocks(type: str, n: int):
    with pytest.raises(ValueError, match=f"{type} needs widths in multiples of {n}, not 272"):
        blocks.quantize(type, torch.zeros(2, 272))
