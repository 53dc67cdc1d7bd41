"""How large an engine is, by its settings, its model and the available memory.

`fit` decides before a model is loaded: the form that its weights run in, and the context beside
them. `cache_size` lays that out.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from opennemo.errors import InvalidRequest
from opennemo.model.checkpoint import Checkpoint, Form
from opennemo.model.formats import SCALED_KV, plain
from opennemo.model.fused_attention import FUSED_PAGE_SIZE
from opennemo.model.memory import (
    STORED,
    USABLE,
    Needs,
    activations,
    automatic,
    available_memory,
    forms,
    kv_bytes,
)
from opennemo.model.pages import Pages
from opennemo.model.transformer import ModelConfig, Transformer
from opennemo.progress import size

PAGE_SIZE = 16  # tokens, on a CPU
# Beside training: answers to evaluation.prompts under way, and the tokens of one at most.
SAMPLES, SAMPLE_CONTEXT = 8, 2048
# Tokens of a step: on a GPU a prompt's products are bound by arithmetic from some hundreds on.
STEP_TOKENS = {"cpu": 512, "cuda": 2048}
# No slower than float32 or bf16, and faster with many sequences (docs/results/cpu.md).
CPU_KV = "int8"
MORE_PAGES = 64  # than one sequence of the longest context takes
# A form that leaves less context than this is passed over where another leaves more ...
COMFORTABLE = 4096
SMALLEST = 512  # ... and none that leaves less than this is chosen.


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Sizes of the engine."""

    max_context: int | None = None  # tokens of one sequence; None: what the model was trained for
    n_pages: int | None = None  # None: one sequence of `max_context` and some more, if they fit
    page_size: int | None = None  # tokens; None: the size for fused attention on a GPU, else 16
    # Of FORMATS; None: fp8 if the model brings scales, else int8 on a CPU, and the embedding's type
    # on a GPU, or where an engine is made around a model that was loaded before.
    kv_format: str | None = None
    kv_scale: float | None = None  # for fp8 where the model brings none
    max_batched_tokens: int | None = None  # computed in one step; None: 512 on a CPU, else 2,048
    max_sequences: int = 64  # that run at the same time
    max_queued: int = 1024  # that wait; one more is refused
    prefix_caching: bool = True
    # Guessed for a sequence and checked in one step; 0: off; None: as many as are worth it, and on
    # a GPU without `draft` none.
    n_draft_tokens: int | None = None
    draft: str | None = None  # a small model of the same vocabulary, which guesses
    cache_dir: Path | None = None  # keys and values of prefixes are kept here
    max_cache_size: int = 10 * 2**30  # bytes, there
    adapters: bool = False  # whether requests may name one
    # Whether the model that an engine is made around is also used elsewhere: on a CPU its weights
    # are then in memory twice.
    keep_model: bool = False
    # Whether steps are computed by kernels, which on a CPU need a packed copy of the weights; or by
    # PyTorch, with the model's own.
    kernels: bool = True
    tensor_parallel_size: int = 1  # ranks that share every layer

    def step_tokens(self, device: str) -> int:
        """Tokens that are computed in one step, at most, on "cpu" or "cuda"."""
        return self.max_batched_tokens or STEP_TOKENS[device]


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
    if config.kv_scale is not None and config.kv_format not in (None, SCALED_KV):
        raise InvalidRequest(f"kv_scale is for a cache in {SCALED_KV}, not in {config.kv_format}")
    own = own.name if scale is None and config.kv_scale is None else SCALED_KV
    if scale is None and config.kv_scale is not None:
        scale = torch.full((model.config.n_layers, 2), config.kv_scale)
    page_size = config.page_size or (FUSED_PAGE_SIZE if weight.is_cuda else PAGE_SIZE)
    rest = {"page_size": page_size, "format": config.kv_format or own, "scale": scale}
    n_pages = config.n_pages
    if n_pages is None:  # one sequence of `max_context` and 64 more, or what memory has room for
        page = CacheSize(n_pages=1, n_spare=0, **rest).make(model).nbytes
        device = f"cuda:{weight.device.index or 0}" if weight.is_cuda else "cpu"
        weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        share = 1 if weight.is_cuda else config.tensor_parallel_size  # CPU ranks share its memory
        room = int(USABLE * available_memory()[device]) // share - weights
        n_pages = max(1, min(-(-max_context // page_size) + MORE_PAGES, room // page))
    return CacheSize(n_pages=n_pages, n_spare=int(weight.is_cuda), **rest)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How a model runs in the memory there is, in bytes."""

    name: str  # of the form
    form: Form
    needs: Needs
    kv_format: str
    per_page: int  # of the cache, of `page_size` tokens
    page_size: int
    n_pages: int  # that fit, at most what one sequence of the longest context and some more take
    context: int  # tokens of one sequence that fit, at most what the model was trained for
    fixed: int  # needed besides the cache
    room: int  # available

    def shortage(self, n_pages: int, n_tokens: int) -> str:
        """Why so many pages do not fit, in numbers."""
        rest, cache = self.fixed - self.needs.weights, n_pages * self.per_page
        return (
            f"{size(self.fixed + cache)} are needed ({size(self.needs.weights)} of weights in "
            f"{self.name}, {size(cache)} of KV cache in {self.kv_format} for {n_tokens:,} tokens, "
            f"{size(rest)} to load, compute and guess), and {size(self.room)} may be taken"
        )


def fits(
    checkpoint: Checkpoint,
    device: str,
    config: EngineConfig,
    dtype: torch.dtype | None = None,
    draft: Fit | None = None,
) -> dict[str, Fit]:
    """For each form that a model can run in, by name, what fits; with `dtype`, only that type.

    `draft` is how the small model runs that has a page beside each of this one's.
    """
    model, memory, place = checkpoint.config, available_memory(), torch.device(device)
    device, on_cpu = place.type, place.type == "cpu"
    ranks = config.tensor_parallel_size > 1
    made = forms(checkpoint, device, ranks=ranks)
    if dtype is not None:
        name = STORED if checkpoint.format else str(dtype).removeprefix("torch.")
        made = {name: Form(dtype=dtype, head=made[STORED].head if STORED in made else None)}
    index = place.index if on_cpu or place.index is not None else torch.cuda.current_device()
    room = int(USABLE * memory["cpu" if on_cpu else f"cuda:{index}"])
    share = 1 if on_cpu else config.tensor_parallel_size  # CPU ranks share its memory
    step = 0
    if on_cpu:
        step = activations(model, config.step_tokens(device), config.max_sequences)
    page_size = config.page_size or (PAGE_SIZE if on_cpu else FUSED_PAGE_SIZE)
    longest = _longest(model, config)
    wanted = config.n_pages or -(-longest // page_size) + MORE_PAGES
    scaled = config.kv_scale is not None or checkpoint.read_kv_scale() is not None
    result = {}
    for name, form in made.items():
        needs = Needs.of(checkpoint, form, device)
        fixed = needs.weights // share + max(needs.loading, step)
        fixed += draft.needs.weights if draft else 0
        kv = _kv_format(config, form, scaled, on_cpu)
        per_page = -(-page_size * kv_bytes(model, kv) // share) + (draft.per_page if draft else 0)
        n_pages = max(0, min((room - fixed) // per_page, wanted))
        result[name] = Fit(
            name=name, form=form, needs=needs, kv_format=kv, per_page=per_page,
            page_size=page_size, n_pages=n_pages, context=min(longest, n_pages * page_size),
            fixed=fixed, room=room,
        )  # fmt: skip
    return result


def fit(
    checkpoint: Checkpoint,
    device: str,
    config: EngineConfig,
    format: str = "auto",
    dtype: torch.dtype | None = None,
    draft: Fit | None = None,
) -> Fit:
    """The form to load a model in and the context beside it, before anything is loaded.

    "auto" takes the first of `automatic` that leaves room for the context that is asked for, or
    for a comfortable one; a format that is named, or a `dtype`, is taken if it fits.

    Raises:
        InvalidRequest: there is no such form; or nothing fits, with the numbers and what would.
    """
    most = checkpoint.config.max_position_embeddings
    if (asked := config.max_context or 0) > most:
        raise InvalidRequest(f"a context of {asked:,} tokens: the model has {most:,}")
    found = fits(checkpoint, device, config, dtype, draft)
    if dtype is None and format not in ("auto", *found):
        stored = f", and the model is stored in {checkpoint.format}" if checkpoint.format else ""
        raise InvalidRequest(f"format {format!r}: allowed are auto, {', '.join(found)}{stored}")
    if dtype is not None:
        tried = [*found.values()]
    elif format == "auto":
        tried = [found[name] for name in automatic(found, torch.device(device).type)]
    else:
        tried = [found[format]]
    asked, longest = config.max_context or config.n_pages, _longest(checkpoint.config, config)
    wanted = longest if asked else min(longest, COMFORTABLE)
    pages = {one.name: config.n_pages or -(-wanted // one.page_size) for one in tried}
    best = next((one for one in tried if one.n_pages >= pages[one.name]), None)
    if best is None and not asked:
        best = max(tried, key=lambda one: one.context)
        best = best if best.context >= min(longest, SMALLEST) else None
    if best is not None:
        return best
    last = min(tried, key=lambda one: one.fixed)
    less = replace(config, max_context=None, n_pages=None)
    others = [
        f"--format {one.name} with {one.context:,} tokens"
        for one in fits(checkpoint, device, less, draft=draft).values()
        if one.context >= SMALLEST
    ]
    raise InvalidRequest(
        f"the model does not fit: {last.shortage(pages[last.name], wanted)}; "
        + ("what fits: " + "; ".join(others) if others else "no format of it fits")
    )


def announcement(checkpoint: Checkpoint, config: EngineConfig, chosen: Fit, format: str) -> str:
    """One line about what was reduced to fit; empty where nothing was."""
    longest, said = _longest(checkpoint.config, config), []
    if format == "auto" and chosen.form.format is not None:
        said.append(f"weights are rounded to {chosen.name} as they are read")
    if chosen.context < longest and config.n_pages is None:
        said.append(f"the context is {chosen.context:,} tokens instead of {longest:,}")
    room = f"to fit into {size(chosen.room)}: "
    return room + ", ".join(said) if said else ""


def _longest(model: ModelConfig, config: EngineConfig) -> int:
    longest = model.max_position_embeddings
    return min(config.max_context or longest, longest)


def _kv_format(config: EngineConfig, form: Form, scaled: bool, on_cpu: bool) -> str:
    """The cache's format: as configured, else fp8 if the model has scales, else by device."""
    if config.kv_format or scaled:
        return config.kv_format or SCALED_KV
    own = plain(form.dtype or torch.float32)
    assert own is not None, form.dtype
    return CPU_KV if on_cpu else own.name
