"""Attention over pages and over packed sequences equals the definition."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from opennemo.model import attention, fused_attention
from opennemo.model.attention import Forked, Packed, traced_attention, varlen_attention


def inputs(n_queries: int, n_keys: int, dtype: torch.dtype, learn: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((n_queries, 4, 16), (n_keys, 2, 16), (n_keys, 2, 16))
    return [
        torch.randn(shape, generator=generator).to(dtype).requires_grad_(learn) for shape in shapes
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        ([0, 10, 11, 11, 30], [0, 10, 11, 11, 30]),  # a sequence of one token, and one of none
        ([0, 5, 6, 16], [0, 9, 20, 30]),  # the last queries of longer ones
    ],
)
@pytest.mark.parametrize("mask", [1 << 24, 45])  # of some queries at a time
def test_attention_as_one_operation_equals_its_definition(
    queries: list[int], keys: list[int], window: int | None, dtype: torch.dtype, mask: int,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr(attention, "MASK", mask)
    cu_q, cu_k = torch.tensor(queries).int(), torch.tensor(keys).int()
    learning = inputs(queries[-1], keys[-1], dtype, True)
    q, k, v = learning
    out = varlen_attention(q, k, v, cu_q, cu_k, 30, window=window)
    q, k, v = inputs(queries[-1], keys[-1], dtype, False)
    expected = varlen_attention(q, k, v, cu_q, cu_k, 30, window=window)
    if mask == 1 << 24:  # all queries at a time
        assert torch.equal(out, expected)
    # The definition's gradients, by plain matrices.
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = torch.autograd.grad(out, learning, grad)
    whole = [x.detach().double().requires_grad_() for x in learning]
    plain = torch.zeros(out.shape, dtype=torch.float64)
    pairs = zip(itertools.pairwise(queries), itertools.pairwise(keys), strict=True)
    for (q0, q1), (k0, k1) in pairs:
        q, k, v = whole[0][q0:q1], whole[1][k0:k1], whole[2][k0:k1]
        scores = torch.einsum("qnh,knh->nqk", q, k.repeat_interleave(2, 1)) / 4
        places = torch.arange(k1 - k0)
        behind = (places[-1:] - (q1 - q0) + 1 + torch.arange(q1 - q0))[:, None] - places
        seen = behind >= 0 if window is None else (behind >= 0) & (behind < window)
        mixed = scores.masked_fill(~seen, -torch.inf).softmax(-1) if q1 > q0 else scores
        plain[q0:q1] = torch.einsum("nqk,knh->qnh", mixed, v.repeat_interleave(2, 1))
    rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (0.05, 0.1)
    torch.testing.assert_close(out.double(), plain, rtol=rtol, atol=atol)
    for a, b in zip(found, torch.autograd.grad(plain, whole, grad.double()), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=atol)


def test_pytorch_finds_the_operation_sound():
    cu_seqlens = torch.tensor([0, 7, 12], dtype=torch.int32)
    arguments = (*inputs(12, 12, torch.float32, True), cu_seqlens, cu_seqlens, None)
    torch.library.opcheck(traced_attention, arguments)


@pytest.mark.parametrize("window", [None, 6])
def test_a_fork_is_the_sequences_that_it_stands_for(window: int | None):
    """Trunks with branches, one that branches again, and a sequence by itself."""
    lengths, parents = [9, 4, 1, 7, 3, 5], (-1, 0, 0, -1, 1, -1)
    bounds = [0, *itertools.accumulate(lengths)]
    forked = Forked(torch.tensor(bounds).int(), parents, window)
    paths: list[list[int]] = []
    for i, parent in enumerate(parents):
        paths.append((paths[parent] if parent >= 0 else []) + list(range(*bounds[i : i + 2])))
    learning = inputs(29, 29, torch.float32, True)
    out = forked(0, *learning)
    assert torch.equal(out, forked(0, *(x.detach() for x in learning)))
    expected = torch.empty_like(out)
    for i, path in enumerate(paths):
        packed = Packed.of(len(path), window=window)
        whole = packed(0, *(x[path] for x in learning))
        own = slice(bounds[i], bounds[i + 1])
        expected[own] = whole[-lengths[i] :]
        assert torch.equal(forked.positions[own], packed.positions[-lengths[i] :])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(out, learning, grad)
    for a, b in zip(found, torch.autograd.grad(expected, learning, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("knows_pages", [True, False])
def test_pytorchs_kernel_is_asked_as_its_version_wants_it(
    knows_pages: bool, window: int | None, monkeypatch: pytest.MonkeyPatch
):
    """What a card would compute, by a stand-in that takes what PyTorch takes, and no more."""

    def older(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
              *, window_size: tuple[int, int]) -> Tensor:  # fmt: skip
        assert q.shape[1] == k.shape[1] == v.shape[1] and window_size[1] == 0
        seen = None if window_size[0] < 0 else window_size[0] + 1
        return varlen_attention(q, k, v, cu_q, cu_k, max_q, window=seen)

    def newer(*inputs: Any, seqused_k: Any, block_table: Any, num_splits: int, enable_gqa: bool,
              window_size: tuple[int, int]) -> Tensor:  # fmt: skip
        q, k, v, cu_q, cu_k, max_q, _ = inputs
        assert enable_gqa and num_splits == 1 and window_size[1] == 0
        seen = None if window_size[0] < 0 else window_size[0] + 1
        return varlen_attention(q, k, v, cu_q, cu_k, max_q, seqused_k, block_table, seen)

    kernel = newer if knows_pages else older
    monkeypatch.setattr(fused_attention, "fused_kernel", lambda: (kernel, knows_pages))
    q, k, v = inputs(30, 30, torch.float32, False)
    cu = torch.tensor([0, 10, 11, 30], dtype=torch.int32)
    found = fused_attention.fused_attention(q, k, v, cu, cu, 19, None, None, window)
    expected = varlen_attention(q, k, v, cu, cu, 19, window=window)
    torch.testing.assert_close(found, expected)
    assert fused_attention.fuses_pages(256) is knows_pages and not fused_attention.fuses_pages(16)
    if knows_pages:
        keys, values = torch.randn(2, 3, 256, 2, 16)
        lengths = torch.tensor([300, 20], dtype=torch.int32)
        table, cu = torch.tensor([[2, 0], [1, 0]]).int(), torch.tensor([0, 10, 30]).int()
        found = fused_attention.fused_attention(
            q, keys, values, cu, None, 20, lengths, table, window
        )
        expected = varlen_attention(q, keys, values, cu, None, 20, lengths, table, window)
        torch.testing.assert_close(found, expected)
