"""Turns a step's chunks into one flat forward pass, and its hidden states into logits.

The runner owns what lives on the device: the model and the pages of the KV cache. It knows nothing
of requests' fates, only which tokens stand where and which rows are wanted.
"""

from itertools import accumulate

import torch
from torch import Tensor

from opennemo.engine.sequence import Chunk
from opennemo.model.attention import Paged
from opennemo.model.lora import Adapter, adapted
from opennemo.model.transformer import Transformer


class Runner:
    """A model with `n_pages` pages of KV cache in its own dtype, (L, 2, P, page_size, K, H)."""

    def __init__(self, model: Transformer, n_pages: int, page_size: int):
        config, weight = model.config, model.tok_embeddings.weight
        self.model, self.page_size = model.eval(), page_size
        # Untouched pages cost no memory on a CPU: the system hands them out on first use.
        self.kv_cache = torch.zeros(
            (config.n_layers, 2, n_pages, page_size, config.n_kv_heads, config.head_dim),
            dtype=weight.dtype,
            device=weight.device,
        )

    @torch.inference_mode()
    def run(self, chunks: list[Chunk]) -> Tensor:
        """Compute the chunks -> logits (rows, V) in float32, `Chunk.n_rows` each, in order."""
        device = self.kv_cache.device
        tokens, positions, slots, rows, context_lens = [], [], [], [], []
        for chunk in chunks:
            start, new = chunk.sequence.n_computed, chunk.tokens
            end, pages = start + len(new), chunk.sequence.pages
            tokens += new
            positions += range(start, end)
            slots += [
                pages[p // self.page_size] * self.page_size + p % self.page_size
                for p in range(start, end)
            ]
            rows += range(len(tokens) - chunk.n_rows, len(tokens))
            context_lens.append(end)
        lengths = [len(chunk.tokens) for chunk in chunks]
        width = max(-(-n // self.page_size) for n in context_lens)
        page_table = [c.sequence.pages[:width] for c in chunks]
        page_table = [pages + [0] * (width - len(pages)) for pages in page_table]

        def tensor(values: list, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

        attend = Paged(
            kv_cache=self.kv_cache,
            positions=tensor(positions),
            slots=tensor(slots, torch.int64),
            cu_seqlens=tensor([0, *accumulate(lengths)]),
            max_seqlen=max(lengths),
            context_lens=tensor(context_lens),
            page_table=tensor(page_table),
            window=self.model.config.sliding_window,
        )
        rows_of: dict[Adapter, list[int]] = {}
        for chunk, start, length in zip(
            chunks, accumulate(lengths, initial=0), lengths, strict=False
        ):
            if chunk.sequence.adapter is not None:
                rows_of.setdefault(chunk.sequence.adapter, []).extend(range(start, start + length))
        with adapted(self.model, [(a, tensor(r, torch.int64)) for a, r in rows_of.items()]):
            hidden = self.model(tensor(tokens), attend)
        return self.model.output(hidden[tensor(rows, torch.int64)]).float()
