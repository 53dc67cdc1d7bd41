"""PyTorch's fused attention on a GPU, as the installed version offers it.

Its FlashAttention-2 needs Ampere or newer. Before 2.12 it supports neither pages nor key heads that
several query heads share.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FUSED_PAGE_SIZE = 256  # it takes pages of multiples of this


@cache
def fused_kernel() -> tuple[Callable[..., Any], bool]:
    """PyTorch's kernel, and whether it supports pages and shared key heads, as from 2.12 on."""
    from torch.nn.attention.varlen import varlen_attn  # imports sympy: 2 s that a CPU saves

    return varlen_attn, "block_table" in inspect.signature(varlen_attn).parameters


def fuses_pages(page_size: int) -> bool:
    """Whether PyTorch's kernel reads keys and values from pages of this many tokens."""
    return page_size % FUSED_PAGE_SIZE == 0 and fused_kernel()[1]


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor | None, max_seqlen: int,
    context_lens: Tensor | None, page_table: Tensor | None, window: int | None,
) -> Tensor:  # fmt: skip
    """Causal attention by PyTorch's kernel: what `attention.varlen_attention` says."""
    (attend, is_new), max_k = fused_kernel(), max_seqlen
    window_size = (-1 if window is None else window - 1, 0)
    if not is_new:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return attend(q, k, v, cu_q, cu_k, max_seqlen, max_k, window_size=window_size)
    if page_table is not None:
        assert context_lens is not None
        max_k = page_table.shape[1] * k.shape[1]
        cu_k = F.pad(context_lens.cumsum(0, dtype=torch.int32), (1, 0))
    return attend(
        q, k, v, cu_q, cu_k, max_seqlen, max_k, window_size=window_size, enable_gqa=True,
        seqused_k=context_lens, block_table=page_table,
        # With more, FlashAttention-2 leaves rows of all sequences but the first unwritten
        # (pytorch/pytorch#194167); with one, a row does not depend on the batch either.
        num_splits=1,
    )  # fmt: skip
