"""Attention on a GPU of any number of new tokens a sequence, over keys and values in pages.

A program takes some tokens of one sequence and the query heads that share a key head: all of them
read the same keys once. Keys come in blocks whose borders do not depend on where a step's tokens
begin, and a block that a row does not see does not change that row. So a row's bits depend neither
on the batch nor on how a prompt was divided into steps. Prompts, parts of them, drafts and single
tokens may stand in one step.

What it must compute is defined by attention.Paged. It knows nothing of models. In Triton; its
interpreter runs it on a CPU. Source: FlashAttention-2 (arXiv:2307.08691).
"""

# pyright: reportIndexIssue=false
# (kernel[grid] is Triton's syntax for launching a kernel.)

import math

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from opennemo.kernels.paged_attention import take_in

ROWS = 64  # tokens times query heads in a program
BLOCK = 64  # keys at a time, of 16 bits or less


def paged_prefill(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, context_lens: Tensor,
    cu_seqlens: Tensor, max_seqlen: int,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None, window: int | None = None,
) -> Tensor:  # fmt: skip
    """Causal attention of each sequence's last tokens, q (T, N, H), to the whole of it.

    Keys, values, their scales, `page_table` and `context_lens` are as in `paged_attention`.
    `cu_seqlens` (S + 1,) int32 are the bounds of the sequences in q, of which the longest has
    `max_seqlen` new tokens. With a window each token sees only the last `window` keys, its own
    included. Returns (T, N, H).
    """
    n_heads, head_dim = q.shape[1:]
    _, page_size, n_kv_heads, _ = k_pages.shape
    group = n_heads // n_kv_heads
    assert all(x.is_contiguous() for x in (q, k_pages, v_pages, context_lens, cu_seqlens))
    assert page_table.stride(1) == 1
    rows = max(ROWS, triton.next_power_of_2(group))
    per_slot = k_scale is not None and k_scale.numel() > 1
    out = torch.empty_like(q)
    _prefill[(triton.cdiv(max_seqlen, rows // group), len(context_lens), n_kv_heads)](
        q, k_pages, v_pages, k_scale, v_scale, page_table, context_lens, cu_seqlens, out,
        page_table.stride(0), math.log2(math.e) / math.sqrt(head_dim),
        WINDOW=window or 0, PAGE_SIZE=page_size, KV_HEADS=n_kv_heads, GROUP=group, ROWS=rows,
        BLOCK=BLOCK // 2 if q.dtype == torch.float32 else BLOCK,
        SCALES=0 if k_scale is None else 2 if per_slot else 1,
        HEAD_DIM=head_dim, WIDTH=max(16, triton.next_power_of_2(head_dim)),
        num_warps=4, num_stages=2,  # with more, a consumer card's shared memory is too small
    )  # fmt: skip
    return out


@triton.jit
def _prefill(
    q, k_pages, v_pages, k_scale, v_scale, page_table, context_lens, cu_seqlens, out,
    table_stride, log2_scale,
    WINDOW: tl.constexpr, PAGE_SIZE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SCALES: tl.constexpr,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Some tokens of one sequence, one key head and the query heads that share it."""
    sequence, kv_head = tl.program_id(1), tl.program_id(2)
    start = tl.load(cu_seqlens + sequence)
    n_new = tl.load(cu_seqlens + sequence + 1) - start
    TOKENS: tl.constexpr = ROWS // GROUP
    # The last tokens see the most keys: they come first, so that no long program runs alone.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * TOKENS
    if first < n_new:
        length = tl.load(context_lens + sequence)
        rows, columns, keys = tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, BLOCK)
        token, real = first + rows // GROUP, columns < HEAD_DIM
        inside = ((rows < TOKENS * GROUP) & (token < n_new))[:, None] & real[None, :]
        head = (start + token).to(tl.int64) * (KV_HEADS * GROUP) + kv_head * GROUP + rows % GROUP
        at = head[:, None] * HEAD_DIM + columns[None, :]
        query = tl.load(q + at, mask=inside, other=0.0)
        if SCALES == 1:
            log2_scale *= tl.load(k_scale)
        own = length - n_new + token  # the position of a row's token, the last that it sees
        begin = tl.maximum(length - n_new + first - WINDOW + 1, 0) // BLOCK * BLOCK if WINDOW else 0
        end = tl.minimum(length - n_new + first + TOKENS, length)
        largest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        sums = tl.zeros([ROWS, WIDTH], tl.float32)
        table = page_table + sequence * table_stride
        for block in range(begin, end, BLOCK):
            key = block + keys
            seen = key[None, :] <= own[:, None]
            if WINDOW:
                seen &= key[None, :] > own[:, None] - WINDOW
            largest, total, sums = take_in(
                query, tl.where(key < end, key, begin), seen, key < end, real, table,
                kv_head, k_pages, v_pages, k_scale, v_scale, log2_scale, largest, total, sums,
                PAGE_SIZE, KV_HEADS, HEAD_DIM, SCALES,
            )  # fmt: skip
        sums /= tl.where(total > 0, total, 1.0)[:, None]  # rows that are not stored see nothing
        if SCALES == 1:
            sums *= tl.load(v_scale)
        tl.store(out + at, sums.to(out.dtype.element_ty), mask=inside)
