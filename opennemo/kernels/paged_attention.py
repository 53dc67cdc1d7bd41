"""Decode attention on a GPU: one new token a sequence, over keys and values that lie in pages.

A sequence's keys are split among `SPLITS` programs, so that one long sequence alone keeps the whole
card busy; each keeps a running softmax over its part, and a second kernel combines the parts. How a
sequence is split depends on its own length alone: its bits do not depend on the rest of the batch.
Scales of codes factor out of both products, so codes are multiplied as they are, exactly.

What it must compute is defined by attention.Paged. It knows nothing of models. In Triton; its
interpreter runs it on a CPU. Sources: FlashAttention-2 (arXiv:2307.08691), Flash-Decoding.
"""

# pyright: reportIndexIssue=false
# (kernel[grid] is Triton's syntax for launching a kernel.)

import math

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

# With NeMo's 8 key heads, one sequence makes 256 programs: two for each multiprocessor of an H100.
SPLITS = 32
BLOCK = 64  # keys at a time
# Keys in a split: with fewer, combining the parts costs more than it gains.
SHORTEST = tl.constexpr(128)


def paged_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, context_lens: Tensor,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None, window: int | None = None,
) -> Tensor:  # fmt: skip
    """Attention of each sequence's last token, q (S, N, H), to the whole of it -> (S, N, H).

    Keys and values are pools of pages (P, page_size, K, H) of any page size, in 16 or 32 bits, or
    as codes in 8 bits: then with one scale each, of one element, or one for each head of each slot,
    (P, page_size, K). `page_table` (S, pages) and `context_lens` (S,), at least 1, are int32. With
    a window only the last `window` keys are seen.
    """
    n_sequences, n_heads, head_dim = q.shape
    _, page_size, n_kv_heads, _ = k_pages.shape
    group = n_heads // n_kv_heads
    assert all(x.is_contiguous() for x in (q, k_pages, v_pages, context_lens))
    assert page_table.stride(1) == 1
    parts = torch.empty(n_sequences, n_heads, SPLITS, head_dim, device=q.device)
    weights = torch.empty(n_sequences, n_heads, SPLITS, device=q.device)  # logarithms, base 2
    shape = {
        "HEAD_DIM": head_dim, "WIDTH": triton.next_power_of_2(head_dim), "SPLITS": SPLITS,
    }  # fmt: skip
    per_slot = k_scale is not None and k_scale.numel() > 1
    _attend[(n_sequences, n_kv_heads, SPLITS)](
        q, k_pages, v_pages, k_scale, v_scale, page_table, context_lens, parts, weights,
        page_table.stride(0), math.log2(math.e) / math.sqrt(head_dim),
        WINDOW=window or 0, PAGE_SIZE=page_size, KV_HEADS=n_kv_heads, GROUP=group,
        # The tensor cores' products have at least 16 rows.
        ROWS=max(16, triton.next_power_of_2(group)), BLOCK=BLOCK,
        SCALES=0 if k_scale is None else 2 if per_slot else 1, **shape,
    )  # fmt: skip
    out = torch.empty_like(q)
    _combine[(n_sequences, n_heads)](
        parts, weights, context_lens, out, WINDOW=window or 0, HEADS=n_heads, **shape
    )
    return out


@triton.jit
def _split(length, WINDOW: tl.constexpr, SPLITS: tl.constexpr):
    """-> the first key that is seen, and how many keys a split has."""
    first = tl.maximum(length - WINDOW, 0) if WINDOW else 0
    return first, tl.maximum(tl.cdiv(length - first, SPLITS), SHORTEST)


@triton.jit
def take_in(
    query, places, seen, loaded, real, table, kv_head, k_pages, v_pages, k_scale, v_scale,
    log2_scale, largest, total, sums,
    PAGE_SIZE: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """A block of keys at their places in a sequence, added to a softmax that is under way.

    Of the keys those `loaded` are read, of which a row has `seen` some (rows or 1, keys); of the
    channels those that are `real`. `table` is the sequence's row of pages. -> the `largest` score
    of each row, the `total` of its weights, and the weighted `sums` of values.
    """
    page = tl.load(table + places // PAGE_SIZE)
    # 64 bits: a pool of 12B's size has more numbers than 32 bits can count.
    slot = (page.to(tl.int64) * PAGE_SIZE + places % PAGE_SIZE) * KV_HEADS + kv_head
    at = slot[:, None] * HEAD_DIM + tl.arange(0, sums.shape[1])[None, :]
    mask = loaded[:, None] & real[None, :]
    k = tl.load(k_pages + at, mask=mask, other=0.0).to(query.dtype)
    scores = tl.dot(query, tl.trans(k), input_precision="ieee") * log2_scale
    if SCALES == 2:
        scores *= tl.load(k_scale + slot)[None, :]
    scores = tl.where(seen, scores, float("-inf"))
    peak = tl.maximum(largest, tl.max(scores, 1))
    # A row that has seen no key yet, before its window, stays at zero.
    level = tl.where(peak == float("-inf"), 0.0, peak)
    shrink = tl.exp2(largest - level)
    p = tl.exp2(scores - level[:, None])
    total = total * shrink + tl.sum(p, 1)
    if SCALES == 2:
        p *= tl.load(v_scale + slot)[None, :]
    v = tl.load(v_pages + at, mask=mask, other=0.0).to(query.dtype)
    sums *= shrink[:, None]
    sums += tl.dot(p.to(query.dtype), v, input_precision="ieee")
    return peak, total, sums


@triton.jit
def _attend(
    q, k_pages, v_pages, k_scale, v_scale, page_table, context_lens, parts, weights,
    table_stride, log2_scale,
    WINDOW: tl.constexpr, PAGE_SIZE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SCALES: tl.constexpr,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One sequence, one key head and the query heads that share it, one split of the keys."""
    sequence, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(context_lens + sequence)
    first, size = _split(length, WINDOW, SPLITS)
    start = first + split * size
    end = tl.minimum(start + size, length)
    if start < end:
        rows, columns, keys = tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, BLOCK)
        heads = (sequence * KV_HEADS + kv_head) * GROUP + rows
        real = columns < HEAD_DIM
        inside = (rows < GROUP)[:, None] & real[None, :]
        query = tl.load(q + heads[:, None] * HEAD_DIM + columns[None, :], mask=inside, other=0.0)
        if SCALES == 1:
            log2_scale *= tl.load(k_scale)
        largest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        sums = tl.zeros([ROWS, WIDTH], tl.float32)
        table = page_table + sequence * table_stride
        for block in range(start, end, BLOCK):
            seen = block + keys < end
            largest, total, sums = take_in(
                query, tl.where(seen, block + keys, start), seen[None, :], seen, real, table,
                kv_head, k_pages, v_pages, k_scale, v_scale, log2_scale, largest, total, sums,
                PAGE_SIZE, KV_HEADS, HEAD_DIM, SCALES,
            )  # fmt: skip
        sums /= total[:, None]
        if SCALES == 1:
            sums *= tl.load(v_scale)
        part = heads * SPLITS + split
        tl.store(parts + part[:, None] * HEAD_DIM + columns[None, :], sums, mask=inside)
        tl.store(weights + part, largest + tl.log2(total), mask=rows < GROUP)


@triton.jit
def _combine(
    parts, weights, context_lens, out,
    WINDOW: tl.constexpr, HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Combine the parts of one head of one sequence."""
    sequence = tl.program_id(0)
    head = sequence * HEADS + tl.program_id(1)
    length = tl.load(context_lens + sequence)
    first, size = _split(length, WINDOW, SPLITS)
    splits, columns = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    used = first + splits * size < length
    part = head * SPLITS + splits
    weight = tl.load(weights + part, mask=used, other=float("-inf"))
    weight = tl.exp2(weight - tl.max(weight, 0))
    at = part[:, None] * HEAD_DIM + columns[None, :]
    mask = used[:, None] & (columns < HEAD_DIM)[None, :]
    sums = tl.sum(tl.load(parts + at, mask=mask, other=0.0) * weight[:, None], 0)
    result = (sums / tl.sum(weight, 0)).to(out.dtype.element_ty)
    tl.store(out + head * HEAD_DIM + columns, result, mask=columns < HEAD_DIM)
