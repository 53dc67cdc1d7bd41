"""Turns a step's chunks into one flat forward pass, and the wanted rows of it into logits.

The runner owns what lives on the device: the model, compiled for it, and the pages of the KV
cache. It does not know what becomes of requests, only where tokens are and which rows are wanted.
Rows that use an adapter take PyTorch's path through the same pages, beside the compiled one.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from opennemo.engine.sequence import Chunk
from opennemo.engine.sizes import CacheSize
from opennemo.model.attention import Paged
from opennemo.model.cpu_step import NativeStep, use_kernel_
from opennemo.model.lora import Adapter, adapted
from opennemo.model.pages import Pages
from opennemo.model.step import Step, compile_step
from opennemo.model.torch_step import TorchStep
from opennemo.model.transformer import Transformer


class Stretch(NamedTuple):
    """Consecutive tokens of one sequence, to be computed."""

    start: int  # the place of the first
    tokens: list[int]
    n_rows: int  # for how many, at the end, logits are wanted
    pages: list[int]  # of the sequence


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Chunks laid end to end, in plain numbers, as other ranks get them."""

    tokens: list[int]
    positions: list[int]
    slots: list[int]
    rows: list[int]  # of which logits are wanted
    lengths: list[int]  # of each chunk
    context_lens: list[int]
    page_table: list[list[int]]


class Peers(Protocol):
    """The other ranks, which compute what a runner computes: see ranks.py."""

    failure: str | None

    def together(self, verb: str, *args: Any) -> AbstractContextManager[None]: ...


class Runner:
    """A model and the pages of its KV cache.

    A CPU model's matrices are handed over to the kernel, which keeps its own, packed copy; PyTorch
    cannot run the model afterwards, unless it is to `keep` its matrices. With `adapters` PyTorch
    asks the kernel for products with its copies. Without `kernels` PyTorch runs the model as it is.
    """

    def __init__(
        self,
        model: Transformer,
        size: CacheSize,
        adapters: bool = False,
        ranks: Peers | None = None,
        keep: bool = False,
        kernels: bool = True,
    ):
        self.model, self._size, self._ranks = model.eval(), size, ranks
        self._step: Step | None = TorchStep(model)
        if kernels:
            self._step = compile_step(model, release=not keep, kv_format=size.format)
        self._adapted_step = TorchStep(model) if adapters else None
        if adapters and isinstance(self._step, NativeStep):
            use_kernel_(model, self._step)
        self.device = model.norm.weight.device
        self.pages = size.make(model)
        self.page_size = size.page_size

    @property
    def is_broken(self) -> bool:
        """Whether nothing will be computed any more, since another rank has ended."""
        return self._ranks is not None and self._ranks.failure is not None

    def sleep(self) -> None:
        """Give back the pages' memory, on a GPU the weights' too; nothing runs until `wake`."""
        with self._together("sleep"):
            self._sleep()

    def _sleep(self) -> None:
        self.pages = Pages(torch.empty(0), self.pages.format)
        if self.device.type != "cpu":
            self._step = None  # it holds the weights too, side by side
            self.model.to("cpu")
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """The opposite of `sleep`; the pages are empty."""
        with self._together("wake"):
            if self._step is None:
                self._step = compile_step(self.model.to(self.device), kv_format=self._size.format)
            self.pages = self._size.make(self.model)

    def copy_page(self, source: int, target: int) -> None:
        """Copy the keys and values of a page, all layers', into another."""
        with self._together("copy_page", source, target):
            for part, copied in zip(self.pages.of(target), self.pages.of(source), strict=True):
                part.copy_(copied)

    @torch.inference_mode()
    def run(self, chunks: list[Chunk]) -> Tensor:
        """Compute the chunks -> logits (rows, V) in float32, `Chunk.n_rows` each, in order."""
        for chunk in chunks:
            if chunk.copy is not None:
                self.copy_page(*chunk.copy)
        plain = [chunk for chunk in chunks if chunk.sequence.adapter is None]
        if len(plain) == len(chunks):
            return self.compute(self.lay_out(map(_stretch, chunks)))
        if self._adapted_step is None:
            raise RuntimeError("this engine was not made for adapters")
        others = [chunk for chunk in chunks if chunk.sequence.adapter is not None]
        logits = []
        if plain:
            logits += self.compute(self.lay_out(map(_stretch, plain))).split(
                [c.n_rows for c in plain]
            )
        with adapted(self.model, self._rows_by_adapter(others)):
            inputs = self._place(self.lay_out(map(_stretch, others)))
            logits += self._adapted_step(*inputs).split([c.n_rows for c in others])
        of_chunk = dict(zip(map(id, (*plain, *others)), logits, strict=True))
        return torch.cat([of_chunk[id(chunk)] for chunk in chunks])

    @torch.inference_mode()
    def compute(self, layout: Layout) -> Tensor:
        """The step itself, on all ranks -> logits (R, V) in float32."""
        assert self._step is not None, "the runner sleeps"
        with self._together("compute", layout):
            return self._step(*self._place(layout))

    def _together(self, verb: str, *args: Any) -> AbstractContextManager[None]:
        return nullcontext() if self._ranks is None else self._ranks.together(verb, *args)

    def lay_out(self, stretches: Iterable[Stretch]) -> Layout:
        """Stretches of different sequences, end to end."""
        tokens, positions, slots, rows, lengths, context_lens, tables = ([] for _ in range(7))
        for start, new, n_rows, pages in stretches:
            end = start + len(new)
            tokens += new
            positions += range(start, end)
            slots += [
                pages[p // self.page_size] * self.page_size + p % self.page_size
                for p in range(start, end)
            ]
            rows += range(len(tokens) - n_rows, len(tokens))
            lengths.append(len(new))
            context_lens.append(end)
            tables.append(pages)
        width = max(-(-n // self.page_size) for n in context_lens)
        return Layout(
            tokens=tokens, positions=positions, slots=slots, rows=rows, lengths=lengths,
            context_lens=context_lens,
            page_table=[pages[:width] + [0] * (width - len(pages)) for pages in tables],
        )  # fmt: skip

    def _place(self, layout: Layout) -> tuple[Tensor, Paged, Tensor]:
        """A layout on the device: tokens (T,), their places, rows wanted (R,)."""
        attend = Paged(
            pages=self.pages,
            positions=self._tensor(layout.positions),
            slots=self._tensor(layout.slots, torch.int64),
            cu_seqlens=self._tensor([0, *accumulate(layout.lengths)]),
            max_seqlen=max(layout.lengths),
            context_lens=self._tensor(layout.context_lens),
            page_table=self._tensor(layout.page_table),
            window=self.model.config.sliding_window,
        )
        return self._tensor(layout.tokens), attend, self._tensor(layout.rows, torch.int64)

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


def _stretch(chunk: Chunk) -> Stretch:
    sequence = chunk.sequence
    return Stretch(sequence.n_computed, chunk.tokens, chunk.n_rows, sequence.pages)
