"""Ways to attend: over packed sequences (training), which may fork, or a paged KV cache (serving).

All call one primitive, `varlen_attention`: on a GPU PyTorch's fused kernel, elsewhere the plain
definition that the kernel is tested against, or, while a model learns, the same as one operation.
None knows where pages come from (the engine's allocator) or how documents were packed (the
training loader).
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opennemo.model.fused_attention import fused_attention, fuses_pages
from opennemo.model.pages import Pages
from opennemo.model.positions import Window, window_in

MASK = 1 << 24  # numbers of a mask at once, where attention on a CPU needs one


@dataclass
class Packed:
    """Sequences laid end to end; each attends causally to itself and to no other."""

    cu_seqlens: Tensor  # (S + 1,) int32, where each sequence starts, and the end of the last
    max_seqlen: int
    window: Window = None  # ModelConfig.sliding_window
    positions: Tensor = field(init=False)  # (T,)

    def __post_init__(self) -> None:
        starts, lengths = self.cu_seqlens[:-1], self.cu_seqlens.diff()
        total = torch.arange(int(self.cu_seqlens[-1]), device=self.cu_seqlens.device)
        self.positions = total - starts.repeat_interleave(lengths)

    @classmethod
    def of(cls, *lengths: int, window: Window = None, device: str = "cpu") -> "Packed":
        """Sequences of these lengths."""
        cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device, torch.int32)
        return cls(cu_seqlens, max(lengths), window)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cu, longest = self.cu_seqlens, self.max_seqlen
        return varlen_attention(q, k, v, cu, cu, longest, window=window_in(self.window, layer))


@dataclass
class Forked:
    """Sequences laid end to end, some of which continue where an earlier one ends.

    A branch sees its trunk and itself, with positions that count on from the fork, so it computes
    what trunk and branch would as one sequence, while the trunk is computed once for all branches.
    """

    cu_seqlens: Tensor  # (S + 1,) int32, as of `Packed`
    parents: Sequence[int]  # (S,) the place of the sequence that each continues, or -1
    window: Window = None  # ModelConfig.sliding_window
    positions: Tensor = field(init=False)  # (T,)
    keys: Tensor = field(init=False)  # (T',) the tokens that each sequence sees, one after another
    cu_keys: Tensor = field(init=False)  # (S + 1,) int32, their bounds
    max_seqlen: int = field(init=False)

    def __post_init__(self) -> None:
        device, paths, positions = self.cu_seqlens.device, [], []
        for (start, end), parent in zip(
            itertools.pairwise(self.cu_seqlens.tolist()), self.parents, strict=True
        ):
            assert parent < len(paths), "a trunk comes before its branches"
            own, trunk = torch.arange(start, end), paths[parent] if parent >= 0 else None
            paths.append(own if trunk is None else torch.cat((trunk, own)))
            positions.append(torch.arange(len(paths[-1]) - len(own), len(paths[-1])))
        lengths = torch.tensor([len(path) for path in paths])
        self.positions, self.keys = (torch.cat(x).to(device) for x in (positions, paths))
        self.cu_keys = F.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32)
        self.max_seqlen = int(lengths.max())

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.index_select(0, self.keys), v.index_select(0, self.keys)
        cu_q, cu_k, window = self.cu_seqlens, self.cu_keys, window_in(self.window, layer)
        return varlen_attention(q, k, v, cu_q, cu_k, self.max_seqlen, window=window)


@dataclass
class Paged:
    """New tokens of several sequences, each behind a past that lies in pages of the KV cache."""

    pages: Pages
    positions: Tensor  # (T,)
    slots: Tensor  # (T,) where each new key and value goes: page * page_size + offset
    cu_seqlens: Tensor  # (S + 1,) int32, bounds of the new tokens of each sequence
    max_seqlen: int  # most new tokens of any sequence: 1 when decoding
    context_lens: Tensor  # (S,) int32, past and new tokens of each sequence
    page_table: Tensor  # (S, most pages of any sequence) int32
    window: Window = None  # ModelConfig.sliding_window

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.pages.write(layer, self.slots, k, v)
        return self.attention(layer, q)

    def attention(self, layer: int, q: Tensor) -> Tensor:
        """Attention of the new tokens' queries (T, N, H) to the keys and values in the pages."""
        k_pages, v_pages = self.pages.codes[layer]
        table = self.page_table
        if k_pages.dtype != q.dtype:  # the definition for codes: dequantise the pages in use
            used, table = table.unique(return_inverse=True)
            k_pages, v_pages = (self.pages.read(layer, part, used, q.dtype) for part in (0, 1))
            table = table.to(self.page_table.dtype)
        return varlen_attention(
            q, k_pages, v_pages, self.cu_seqlens, None, self.max_seqlen,
            self.context_lens, table, window_in(self.window, layer),
        )  # fmt: skip


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor | None, max_seqlen: int,
    context_lens: Tensor | None = None, page_table: Tensor | None = None, window: int | None = None,
) -> Tensor:  # fmt: skip
    """Causal attention of q (T, N, H) within each sequence; its last query sees its last key.

    Without a page table k and v are (T, K, H), else pools of pages (P, page_size, K, H).
    With a window each query sees only the last `window` keys, its own included.
    """
    fits = page_table is None or fuses_pages(k.shape[1])
    if q.is_cuda and q.dtype != torch.float32 and fits:
        return fused_attention(q, k, v, cu_q, cu_k, max_seqlen, context_lens, page_table, window)
    if q.is_cpu and page_table is None and (q.requires_grad or torch.compiler.is_compiling()):
        return traced_attention(q, k, v, cu_q, cu_q if cu_k is None else cu_k, window)[0]
    out = torch.empty_like(q)
    bounds = cu_q.tolist()
    key_bounds = bounds if cu_k is None or cu_k is cu_q else cu_k.tolist()
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        if page_table is None or context_lens is None:
            keys, values = (x[key_bounds[i] : key_bounds[i + 1]] for x in (k, v))
        else:
            length, page_size = int(context_lens[i]), k.shape[1]
            pages = page_table[i, : -(-length // page_size)]
            keys, values = (pool[pages].flatten(0, 1)[:length] for pool in (k, v))
        new, length = end - start, keys.shape[0]
        heads = (x.transpose(0, 1)[None] for x in (q[start:end], keys, values))
        # The commonest cases need no mask, which lets PyTorch take its fused CPU kernel.
        causal = window is None and new == length
        mask = None if causal or (window is None and new == 1) else visible(new, length, window, q)
        seq = F.scaled_dot_product_attention(
            *heads, attn_mask=mask, is_causal=causal, enable_gqa=True
        )
        out[start:end] = seq[0].transpose(0, 1)
    return out


def visible(new: int, length: int, window: int | None, like: Tensor) -> Tensor:
    """(new, length) booleans: which of `length` keys the last `new` queries may see."""
    mask = torch.ones(new, length, dtype=torch.bool, device=like.device).tril(length - new)
    return mask if window is None else mask.triu(length - new - window + 1)


@torch.library.custom_op("opennemo::attention", mutates_args=(), device_types="cpu")
def traced_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, window: int | None
) -> tuple[Tensor, Tensor]:
    """`varlen_attention` on a CPU without pages, as one operation; (T, N, H), and (N, T) besides.

    Compiled code need not break on it: else each block would be compiled in pieces, for its own
    layer's number, and gradients that cross from piece to piece under tensor parallelism come back
    wrong (PyTorch 2.13). And it passes back a short document's gradient without touching the rest:
    rows of 64 documents of 16 tokens take a fifth of the time. The second result are logarithms of
    sums of exponentials, for the backward pass.
    """
    out, sums = torch.empty_like(q), _sums(q)
    for queries, keys, causal, mask in _sequences(q, cu_q, cu_k, window):
        part, sums[None, :, queries] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            _heads(q, queries), _heads(k, keys), _heads(v, keys), 0.0, causal, attn_mask=mask
        )
        out[queries] = part[0].transpose(0, 1)
    return out, sums


@torch.library.custom_op("opennemo::attention_backward", mutates_args=(), device_types="cpu")
def _traced_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor,
    cu_q: Tensor, cu_k: Tensor, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grads = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for queries, keys, causal, mask in _sequences(q, cu_q, cu_k, window):
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _heads(grad, queries), _heads(q, queries), _heads(k, keys), _heads(v, keys),
            _heads(out, queries), sums[None, :, queries], 0.0, causal, attn_mask=mask,
        )  # fmt: skip
        for whole, place, part in zip(grads, (queries, keys, keys), parts, strict=True):
            whole[place] += part[0].transpose(0, 1)
    return grads


@traced_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, window: int | None) -> Any:
    return torch.empty_like(q), _sums(q)


@_traced_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_q, cu_k, ctx.window = inputs
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k)


def _pass_back(ctx: Any, grad: Tensor, _: Tensor) -> tuple:
    return *_traced_backward(grad, *ctx.saved_tensors, ctx.window), None, None, None


traced_attention.register_autograd(_pass_back, setup_context=_keep)


def _sequences(
    q: Tensor, cu_q: Tensor, cu_k: Tensor, window: int | None
) -> Iterator[tuple[slice, slice, bool, Tensor | None]]:
    """Queries and keys of each sequence, and its mask: causal, one to add, or none.

    Where a mask is needed queries come a few at a time, so that it stays small.
    """
    pairs = [list(itertools.pairwise(bounds.tolist())) for bounds in (cu_q, cu_k)]
    for (q_start, q_end), (k_start, k_end) in zip(*pairs, strict=True):
        new, length = q_end - q_start, k_end - k_start
        if window is None and new == length:
            if new:
                yield slice(q_start, q_end), slice(k_start, k_end), True, None
            continue
        few = max(1, MASK // max(1, length))
        for start in range(q_start, q_end, few):
            end = min(start + few, q_end)
            keys = slice(k_start, k_end - (q_end - end))  # the last query sees the last key
            length, mask = keys.stop - k_start, None
            if window is not None or end - start > 1:
                seen = visible(end - start, length, window, q)
                mask = torch.zeros(end - start, length, dtype=q.dtype)
                mask.masked_fill_(~seen, -torch.inf)
            yield slice(start, end), keys, False, mask


def _sums(q: Tensor) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((q.shape[1], q.shape[0]), dtype=dtype)


def _heads(x: Tensor, rows: slice) -> Tensor:
    """(T, heads, H) -> (1, heads, rows, H)."""
    return x[rows].transpose(0, 1)[None]
