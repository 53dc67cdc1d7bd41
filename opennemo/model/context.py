"""One window of tokens over several ranks: attention for contexts that are too long for one.

Of W ranks each computes 1/W of the window's queries, and everything else of the model for those
tokens alone. Keys and values are gathered, which is exact, knows documents, and is cheap where
heads share them: at 131,072 tokens half a gigabyte a layer for NeMo. Under a causal mask late
tokens have more to do, so each rank holds one piece from the front and its mirror image from the
back.

Source: Llama 3 (arXiv:2407.21783, 3.3.2), which gathers for the same reasons.
"""

import itertools
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor

from opennemo.model.attention import varlen_attention
from opennemo.model.positions import Window, window_in

# Before 2.13 PyTorch called it all_gather_tensor_autograd.
_gather = getattr(funcol, "all_gather_single_autograd", None) or funcol.all_gather_tensor_autograd


@dataclass
class _Piece:
    """A run of queries: the keys that any of them sees, and where its documents start in both."""

    keys: slice
    cu_q: Tensor  # (S' + 1,) int32
    cu_k: Tensor  # (S' + 1,) int32, up to the piece's end: the last query sees the last key
    max_seqlen: int


@dataclass
class ContextParallel:
    """Sequences laid end to end, as `Packed`, of which this rank computes the tokens `rows`."""

    cu_seqlens: Tensor  # (S + 1,) int32, of the whole window
    group: dist.ProcessGroup  # the ranks that share the window
    window: Window = None  # ModelConfig.sliding_window
    rows: Tensor = field(init=False)  # (T / W,) places in the window
    positions: Tensor = field(init=False)  # (T / W,) places in their sequences
    _pieces: list[_Piece] = field(init=False)

    def __post_init__(self) -> None:
        """Raises ValueError unless the window divides into two pieces a rank."""
        rank, world, bounds = self.group.rank(), self.group.size(), self.cu_seqlens.tolist()
        if bounds[-1] % (2 * world):
            raise ValueError(
                f"a window of {bounds[-1]:,} tokens does not divide into {2 * world} pieces, two "
                f"for each of the {world} ranks that share it"
            )
        length = bounds[-1] // (2 * world)
        device = self.cu_seqlens.device
        starts = (rank * length, (2 * world - 1 - rank) * length)
        self.rows = torch.cat([torch.arange(s, s + length, device=device) for s in starts])
        sequence = torch.searchsorted(self.cu_seqlens, self.rows, right=True) - 1
        self.positions = self.rows - self.cu_seqlens[sequence]
        self._pieces = [_piece(bounds, start, start + length, device) for start in starts]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (T / W, N, H), k and v (T / W, K, H) -> (T / W, N, H)."""
        world = self.group.size()
        kv = _gather(torch.stack((k, v), 1), 0, self.group)
        front, back = kv.unflatten(0, (world, 2, -1)).unbind(1)
        keys, values = torch.cat((front, back.flip(0))).flatten(0, 1).unbind(1)
        parts = [
            varlen_attention(
                part, keys[piece.keys], values[piece.keys], piece.cu_q, piece.cu_k,
                piece.max_seqlen, window=window_in(self.window, layer),
            )
            for part, piece in zip(q.chunk(2), self._pieces, strict=True)
        ]  # fmt: skip
        return torch.cat(parts)


def _piece(bounds: list[int], start: int, end: int, device: torch.device) -> _Piece:
    """The queries from `start` to `end` of a window whose sequences have these bounds."""
    firsts = [
        first
        for first, last in itertools.pairwise(bounds)
        if first < last and first < end and start < last
    ]
    cu_q = [max(first, start) - start for first in firsts] + [end - start]
    cu_k = [first - firsts[0] for first in firsts] + [end - firsts[0]]
    return _Piece(
        slice(firsts[0], end),
        torch.tensor(cu_q, dtype=torch.int32, device=device),
        torch.tensor(cu_k, dtype=torch.int32, device=device),
        max(b - a for a, b in itertools.pairwise(cu_k)),
    )
