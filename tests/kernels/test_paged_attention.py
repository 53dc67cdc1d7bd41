"""Decode attention equals its definition: on a GPU if there is one, else in Triton's interpreter.

The interpreter knows no products in bf16 and cuts numbers off where a card rounds them, so on a CPU
queries are in float32 and float16.
"""

import importlib.util

import pytest
import torch

from opennemo.model.attention import varlen_attention
from opennemo.model.pages import Pages
from opennemo.model.transformer import ModelConfig

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton: pip install triton", allow_module_level=True)

from opennemo.kernels import paged_attention as kernel
from opennemo.kernels.paged_attention import paged_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]


def check(
    heads: tuple[int, int, int], lengths: list[int], page_size: int, kv: str,
    dtype: torch.dtype = torch.float32, window: int | None = None,
) -> None:  # fmt: skip
    """Random pages in random order, of which the second layer's are attended to."""
    torch.manual_seed(0)
    n_heads, n_kv_heads, head_dim = heads
    config = ModelConfig(n_layers=2, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim)
    width, n = -(-max(lengths) // page_size), len(lengths)
    scale = torch.rand(2, 2) / 100 + 0.005
    pages = Pages.empty(config, width * n + 2, page_size, kv, DEVICE, scale)
    if pages.codes.is_floating_point():  # what lies in slots that nobody wrote must not matter
        pages.codes.fill_(float("nan"))
    table = torch.randperm(width * n + 2)[: width * n].view(n, width).int()
    for row, length in zip(table, lengths, strict=True):
        place = torch.arange(length)
        slots = (row[place // page_size] * page_size + place % page_size).long().to(DEVICE)
        keys, values = torch.randn(2, length, n_kv_heads, head_dim, device=DEVICE)
        pages.write(1, slots, keys, values)
    every = torch.arange(width * n + 2, device=DEVICE)
    k, v = (pages.read(1, part, every, torch.float32) for part in (0, 1))
    q = torch.randn(n, n_heads, head_dim, device=DEVICE, dtype=dtype)
    table, lens = table.to(DEVICE), torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    bounds = torch.arange(n + 1, dtype=torch.int32)
    k_scale, v_scale = (None, None) if pages.scale is None else pages.scale[1]
    k_codes, v_codes = pages.codes[1]
    found = paged_attention(q, k_codes, v_codes, table, lens, k_scale, v_scale, window)
    expected = varlen_attention(q.float(), k, v, bounds, None, 1, lens, table, window)
    assert found.dtype == dtype
    assert (found.float() - expected).abs().max() < TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize("kv", ["fp32", "bf16", "fp16", "fp8", "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_definition_in_every_cache_format(kv: str, dtype: torch.dtype):
    check((8, 2, 128), [1, 300, 129], 16, kv, dtype)


@pytest.mark.parametrize("kv", ["fp8", "int8", "bf16"])
@pytest.mark.parametrize(
    ("heads", "page_size", "window"),
    [((6, 2, 48), 7, None), ((4, 4, 16), 256, 20), ((17, 1, 64), 1, 130), ((2, 2, 80), 16, 1)],
)
def test_heads_pages_and_windows_of_any_size(
    heads: tuple[int, int, int], page_size: int, window: int | None, kv: str
):
    check(heads, [140, 1, 20], page_size, kv, window=window)


@pytest.mark.parametrize("window", [None, 4500])
def test_longer_than_the_shortest_splits(window: int | None):
    longest = kernel.SPLITS * kernel.SHORTEST.value
    check((2, 1, 16), [longest + 900, longest + 1, 700], 256, "int8", window=window)


def test_a_row_has_the_same_bits_alone_and_in_a_batch():
    torch.manual_seed(0)
    n, page_size = 5, 16
    q = torch.randn(n, 4, 32, device=DEVICE)
    k, v = torch.randn(2, 10 * n, page_size, 2, 32, device=DEVICE)
    table = torch.randperm(10 * n).view(n, 10).int().to(DEVICE)
    lens = torch.tensor([160, 3, 77, 129, 16], dtype=torch.int32, device=DEVICE)
    together = paged_attention(q, k, v, table, lens)
    for i in range(n):
        one = slice(i, i + 1)
        alone = paged_attention(q[one], k, v, table[one], lens[one])
        assert torch.equal(alone, together[one])
