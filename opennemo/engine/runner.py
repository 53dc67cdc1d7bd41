"""Turns a step's chunks into one flat forward pass, and the wanted rows of it into logits.

The runner owns what lives on the device: the model, compiled for it, and the pages of the KV
cache. It knows nothing of requests' fates, only which tokens stand where and which rows are wanted.
Rows that follow an adapter take PyTorch's path through the same pages, beside the compiled one.
"""

from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

from opennemo.engine.sequence import Chunk
from opennemo.model.attention import Paged
from opennemo.model.lora import Adapter, adapted
from opennemo.model.pages import Pages
from opennemo.model.step import Step, TorchStep, compile_step
from opennemo.model.transformer import Transformer


class Runner:
    """A model and the pages of its KV cache.

    Unless `adapters` are to be served, a CPU model's matrices are handed over to the kernel, which
    keeps its own, packed copy; PyTorch cannot run the model afterwards.
    """

    def __init__(self, model: Transformer, make_pages: Callable[[], Pages], adapters: bool = False):
        self.model, self._make_pages = model.eval(), make_pages
        self._step: Step | None = compile_step(model, release=not adapters)
        self._adapted_step = TorchStep(model) if adapters else None
        self.device = model.tok_embeddings.weight.device
        self.pages = make_pages()
        self.page_size = self.pages.codes.shape[3]

    def sleep(self) -> None:
        """Give back the pages' memory, on a GPU the weights' too; nothing runs until `wake`."""
        self.pages = Pages(torch.empty(0))
        if self.device.type != "cpu":
            self._step = None  # it holds the weights too, side by side
            self.model.to("cpu")
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """The opposite of `sleep`; the pages are empty."""
        if self._step is None:
            self._step = compile_step(self.model.to(self.device))
        self.pages = self._make_pages()

    def copy_page(self, source: int, target: int) -> None:
        """Copy the keys and values of a page, all layers', into another."""
        pages = self.pages
        pages.codes[:, :, target] = pages.codes[:, :, source]
        if pages.scale is not None and pages.scale.dim() > 2:
            pages.scale[:, :, target] = pages.scale[:, :, source]

    @torch.inference_mode()
    def run(self, chunks: list[Chunk]) -> Tensor:
        """Compute the chunks -> logits (rows, V) in float32, `Chunk.n_rows` each, in order."""
        assert self._step is not None, "the runner sleeps"
        plain = [chunk for chunk in chunks if chunk.sequence.adapter is None]
        if len(plain) == len(chunks):
            return self._step(*self._inputs(chunks))
        if self._adapted_step is None:
            raise RuntimeError("this engine was not made for adapters")
        others = [chunk for chunk in chunks if chunk.sequence.adapter is not None]
        logits = []
        if plain:
            logits += self._step(*self._inputs(plain)).split([c.n_rows for c in plain])
        with adapted(self.model, self._rows_by_adapter(others)):
            inputs = self._inputs(others)
            logits += self._adapted_step(*inputs).split([c.n_rows for c in others])
        of_chunk = dict(zip(map(id, (*plain, *others)), logits, strict=True))
        return torch.cat([of_chunk[id(chunk)] for chunk in chunks])

    def _inputs(self, chunks: list[Chunk]) -> tuple[Tensor, Paged, Tensor]:
        """The chunks laid end to end: tokens (T,), where they stand, rows wanted (R,)."""
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
        attend = Paged(
            pages=self.pages,
            positions=self._tensor(positions),
            slots=self._tensor(slots, torch.int64),
            cu_seqlens=self._tensor([0, *accumulate(lengths)]),
            max_seqlen=max(lengths),
            context_lens=self._tensor(context_lens),
            page_table=self._tensor(page_table),
            window=self.model.config.sliding_window,
        )
        return self._tensor(tokens), attend, self._tensor(rows, torch.int64)

    def _rows_by_adapter(self, chunks: list[Chunk]) -> list[tuple[Adapter, Tensor]]:
        rows: dict[Adapter, list[int]] = {}
        start = 0
        for chunk in chunks:
            assert chunk.sequence.adapter is not None
            end = start + len(chunk.tokens)
            rows.setdefault(chunk.sequence.adapter, []).extend(range(start, end))
            start = end
        return [(adapter, self._tensor(index, torch.int64)) for adapter, index in rows.items()]

    def _tensor(self, values: list, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(self.device, non_blocking=True)
