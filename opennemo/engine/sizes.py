"""How large an engine is, by its settings, its model and the memory there is."""

from dataclasses import dataclass

import torch
from torch import Tensor

from opennemo.model.attention import FUSED_PAGE_SIZE
from opennemo.model.formats import SCALED_KV, plain
from opennemo.model.memory import USABLE, machine_memory
from opennemo.model.pages import Pages
from opennemo.model.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Sizes of the engine."""

    max_context: int | None = None  # tokens of one sequence; None: what the model was trained for
    n_pages: int | None = None  # None: one sequence of `max_context` and some more, if they fit
    page_size: int | None = None  # tokens; None: what fused attention takes on a GPU, else 16
    # Of FORMATS; None: fp8 if the model brings scales, else what its embedding is in.
    kv_format: str | None = None
    kv_scale: float | None = None  # for fp8 where the model brings none
    max_batched_tokens: int = 512  # computed in one step
    max_sequences: int = 64  # that run at the same time
    max_queued: int = 1024  # that wait; one more is refused
    prefix_caching: bool = True
    n_draft_tokens: int = 0  # guessed by prompt lookup and checked in one step; 0: off
    adapters: bool = False  # whether requests may name one; on a CPU this keeps weights twice
    tensor_parallel_size: int = 1  # ranks that share every layer


@dataclass(frozen=True, kw_only=True)
class CacheSize:
    """The KV cache of one model: how many pages, of how many tokens, in which number format."""

    n_pages: int
    page_size: int
    format: str
    scale: Tensor | None  # (L, 2), for fp8
    n_spare: int  # pages besides, that belong to no request: see model/gpu_step.py

    def make(self, model: Transformer) -> Pages:
        """Empty pages on the model's device.

        Raises:
            InvalidRequest: the format is unknown, or fp8 and without scales.
        """
        device = model.norm.weight.device
        n = self.n_pages + self.n_spare
        return Pages.empty(model.config, n, self.page_size, self.format, device, self.scale)


def cache_size(
    model: Transformer, config: EngineConfig, max_context: int, scale: Tensor | None
) -> CacheSize:
    """The cache that settings ask for; `scale` (L, 2) is what the model brings for fp8.

    Raises:
        InvalidRequest: the format is unknown, or fp8 and without scales.
    """
    weight = model.norm.weight
    own = plain(weight.dtype)
    assert own is not None, weight.dtype
    own = own.name if scale is None else SCALED_KV
    if scale is None and config.kv_scale is not None:
        scale = torch.full((model.config.n_layers, 2), config.kv_scale)
    page_size = config.page_size or (FUSED_PAGE_SIZE if weight.is_cuda else 16)
    rest = {"page_size": page_size, "format": config.kv_format or own, "scale": scale}
    n_pages = config.n_pages
    if n_pages is None:  # one sequence of `max_context` and 64 more, or what memory has room for
        page = CacheSize(n_pages=1, n_spare=0, **rest).make(model).nbytes
        device = f"cuda:{weight.device.index or 0}" if weight.is_cuda else "cpu"
        weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        share = 1 if weight.is_cuda else config.tensor_parallel_size  # CPU ranks share its memory
        room = int(USABLE * machine_memory()[device]) // share - weights
        n_pages = max(1, min(-(-max_context // page_size) + 64, room // page))
    return CacheSize(n_pages=n_pages, n_spare=int(weight.is_cuda), **rest)
