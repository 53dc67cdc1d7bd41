"""Prefill over pages equals its definition: on a GPU if there is one, else in the interpreter.

The interpreter knows no products in bf16, so on a CPU queries are in float32 and float16.
"""

import importlib.util
import itertools

import pytest
import torch
from torch import Tensor

from opennemo.model.attention import varlen_attention
from opennemo.model.pages import Pages
from opennemo.model.transformer import ModelConfig

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton: pip install triton", allow_module_level=True)

from opennemo.kernels.paged_prefill import paged_prefill

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]


class Pool:
    """Sequences of random keys and values in random pages, of which the second layer's count."""

    def __init__(self, heads: tuple[int, int, int], lengths: list[int], page_size: int, kv: str):
        torch.manual_seed(0)
        self.n_heads, n_kv_heads, self.head_dim = heads
        config = ModelConfig(
            n_layers=2, n_heads=self.n_heads, n_kv_heads=n_kv_heads, head_dim=self.head_dim
        )
        width, n = -(-max(lengths) // page_size), len(lengths)
        scale = torch.rand(2, 2) / 100 + 0.005
        self.pages = Pages.empty(config, width * n + 2, page_size, kv, DEVICE, scale)
        if self.pages.codes.is_floating_point():  # what nobody wrote must not matter
            self.pages.codes.fill_(float("nan"))
        table = torch.randperm(width * n + 2)[: width * n].view(n, width).int()
        for row, length in zip(table, lengths, strict=True):
            place = torch.arange(length)
            slots = (row[place // page_size] * page_size + place % page_size).long().to(DEVICE)
            self.pages.write(1, slots, *torch.randn(2, length, *heads[1:], device=DEVICE))
        every = torch.arange(width * n + 2, device=DEVICE)
        self.read = [self.pages.read(1, part, every, torch.float32) for part in (0, 1)]
        self.table = table.to(DEVICE)

    def queries(self, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(n, self.n_heads, self.head_dim, device=DEVICE, dtype=dtype)

    def attend(
        self, q: Tensor, new: list[int], lengths: list[int], window: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Of the last `new` tokens: what is found, and what is expected."""
        bounds = torch.tensor([0, *itertools.accumulate(new)], dtype=torch.int32, device=DEVICE)
        lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        k_scale, v_scale = (None, None) if self.pages.scale is None else self.pages.scale[1]
        keys, values = self.pages.codes[1]
        found = paged_prefill(
            q, keys, values, self.table, lens, bounds, max(new), k_scale, v_scale, window
        )
        expected = varlen_attention(
            q.float(), self.read[0], self.read[1], bounds, None, max(new), lens, self.table, window
        )
        return found, expected


def check(
    heads: tuple[int, int, int], new: list[int], lengths: list[int], page_size: int, kv: str,
    dtype: torch.dtype = torch.float32, window: int | None = None,
) -> None:  # fmt: skip
    pool = Pool(heads, lengths, page_size, kv)
    found, expected = pool.attend(pool.queries(sum(new), dtype), new, lengths, window)
    assert found.dtype == dtype
    assert (found.float() - expected).abs().max() < TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize("kv", ["fp32", "bf16", "fp16", "fp8", "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prompts_parts_of_them_and_single_tokens_in_one_step(kv: str, dtype: torch.dtype):
    check((8, 2, 64), [70, 1, 33], [70, 130, 100], 16, kv, dtype)


@pytest.mark.parametrize("kv", ["fp8", "int8", "bf16"])
@pytest.mark.parametrize(
    ("heads", "page_size", "window"),
    [((6, 2, 48), 7, None), ((4, 4, 16), 256, 20), ((17, 1, 64), 1, 65), ((3, 1, 8), 16, 1)],
)
def test_heads_pages_and_windows_of_any_size(
    heads: tuple[int, int, int], page_size: int, window: int | None, kv: str
):
    check(heads, [40, 1, 20], [140, 1, 20], page_size, kv, window=window)


@pytest.mark.parametrize("window", [None, 50])
def test_a_row_has_the_same_bits_however_its_prompt_is_divided(window: int | None):
    pool = Pool((4, 2, 32), [150, 90], 16, "fp32")
    q = pool.queries(240)
    whole, _ = pool.attend(q, [150, 90], [150, 90], window)
    for end in (1, 37, 64, 149):
        rest = q[end:150]
        part, _ = pool.attend(torch.cat((rest, q[-1:])), [150 - end, 1], [150, 90], window)
        same = torch.cat((whole[end:150], whole[-1:]))
        if DEVICE == "cuda":
            assert torch.equal(part, same)
        else:  # the interpreter multiplies in BLAS, where a row's place in a matrix matters
            torch.testing.assert_close(part, same, rtol=1e-6, atol=1e-6)
