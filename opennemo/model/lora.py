"""Low-rank adapters: one base model, many small corrections.

An adapter adds `s * B @ A` to some linear layers (LoRA, arXiv:2106.09685). To learn one,
`add_lora_` puts it over weights as they are, over stored codes that stay frozen (as QLoRA,
arXiv:2305.14314), or inside the rounding of a model that learns in a number format: there
`W + s * B @ A` is rounded as one, so that what is merged and quantised is what was trained. While
serving, rows of the same flat pass may follow different adapters: `adapted` adds each one's part to
the outputs of its own rows. Either way the model and number formats know of no adapters. Files are
those of PEFT: `adapter_config.json` and `adapter_model.safetensors`; mistral-finetune's are read.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opennemo.errors import CheckpointError, InvalidRequest
from opennemo.files import write_json
from opennemo.model.adapter_files import ADAPTER, LAYERS, read_adapter
from opennemo.model.checkpoint import weight_shapes
from opennemo.model.formats import Format
from opennemo.model.layouts import pairs_to_halves, spell
from opennemo.model.quantization import (
    QATLinear,
    QuantizedLinear,
    link_fused_,
    prepare_qat_,
    replace_module,
)
from opennemo.model.tensor_files import write_safetensors
from opennemo.model.transformer import Transformer

LINEAR = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
_numbers = itertools.count(1)


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter in memory; `weights` maps a module's path to A (r, D) and s * B (O, r)."""

    name: str
    weights: dict[str, tuple[Tensor, Tensor]]
    # Distinguishes two adapters of one name, loaded one after the other, in the prefix cache.
    number: int = field(default_factory=lambda: next(_numbers))


def load_adapter(folder: Path, model: Transformer) -> Adapter:
    """Read an adapter that PEFT or mistral-finetune saved, to be served beside its model.

    Raises:
        CheckpointError: as `read_adapter`.
    """
    device, dtype = model.norm.weight.device, model.norm.weight.dtype
    ready = {
        module: (a.to(device, dtype), (b * scale).to(device, dtype))
        for module, (scale, a, b) in read_adapter(folder, model.config).items()
    }
    return Adapter(folder.name, ready)


@contextmanager
def adapted(model: nn.Module, rows: Sequence[tuple[Adapter, Tensor]]) -> Iterator[None]:
    """Within this context, let rows of the flat pass follow adapters.

    `rows` pairs each adapter with the indices (T',) of its tokens; other tokens are untouched.
    """
    handles = []
    for path in {path for adapter, _ in rows for path in adapter.weights}:
        parts = [(a.weights[path], index) for a, index in rows if path in a.weights]

        def add(
            module: nn.Module, inputs: tuple[Tensor], output: Tensor, parts: list = parts
        ) -> None:
            for (a, b), index in parts:
                x = inputs[0][index]
                part = F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))
                output.index_add_(0, index, part)

        handles.append(model.get_submodule(path).register_forward_hook(add))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class LowRank(nn.Module):
    """A and B of one layer in float32, whatever the model is in; `forward` folds them into W."""

    def __init__(self, shape: tuple[int, ...], rank: int, scale: float, generator: torch.Generator):
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, shape[1]))  # (r, D)
        self.b = nn.Parameter(torch.zeros(shape[0], rank))  # (O, r)
        nn.init.kaiming_uniform_(self.a, math.sqrt(5), generator=generator)  # as PEFT
        self.scale, self.enabled = scale, True
        self.first_a: Tensor | None
        self.first_b: Tensor | None
        for name in ("first_a", "first_b"):
            self.register_buffer(name, None, persistent=False)

    @property
    def factors(self) -> tuple[Tensor, Tensor] | None:
        """A and B; where they are disabled, those that a run began with, or None."""
        if self.enabled:
            return self.a, self.b
        return (
            None if self.first_a is None or self.first_b is None else (self.first_a, self.first_b)
        )

    def forward(self, weight: Tensor) -> Tensor:
        """W (O, D) -> W + s * B @ A, in the type of W."""
        factors = self.factors
        return weight if factors is None else fold(weight, self.scale, *factors)


def fold(weight: Tensor, scale: float, a: Tensor, b: Tensor) -> Tensor:
    """W (O, D) + s * B (O, r) @ A (r, D), added in float32; the only place that does it."""
    return (weight.float() + scale * (b @ a)).to(weight.dtype)


class LoRALinear(nn.Module):
    """A frozen linear layer and, beside it, a low-rank one that learns."""

    def __init__(self, base: nn.Linear | QuantizedLinear, low_rank: LowRank, dropout: float):
        super().__init__()
        self.base, self.low_rank, self.dropout = base, low_rank, dropout

    def forward(self, x: Tensor) -> Tensor:
        quantized = isinstance(self.base, QuantizedLinear)
        y = _ThroughCodes.apply(x, self.base) if quantized else self.base(x)
        lora = self.low_rank
        if (factors := lora.factors) is not None:
            if self.dropout and lora.enabled:
                x = F.dropout(x, self.dropout, self.training)
            a, b = factors
            down = F.linear(x, a.to(x.dtype))
            # In place, since y is not needed without it, and a second one would be (T, O) again.
            y.addmm_(down, b.to(down.dtype).T, alpha=lora.scale)
        return y


class RoundedLoRA(QATLinear):
    """A layer that learns in a number format; its weight is a frozen one's and an adapter's sum."""

    def __init__(self, layer: QATLinear, low_rank: LowRank):
        nn.Module.__init__(self)  # not a Linear's, which would have a parameter of its own
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, None
        self.format, self.observe, self.rounds = layer.format, layer.observe, layer.rounds
        self.register_buffer("largest", layer.largest)
        self.base, self.low_rank = layer.weight, low_rank
        self.train(layer.training)

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.low_rank(self.base)


class _ThroughCodes(torch.autograd.Function):
    """A stored layer whose input has a gradient: that of the weights which the codes stand for.

    Only the codes are kept for the backward pass, and they are there anyway. Rounding the input
    passes the gradient straight through, unless a fixed scale clipped it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: QuantizedLinear) -> Tensor:
        inputs = linear.format.inputs
        ctx.linear, ctx.clipped = linear, None
        scale = linear.tensors.get("input_scale")
        if scale is not None and inputs is not None:
            ctx.clipped = x.abs() > scale * inputs.limit
        return linear(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0] @ ctx.linear.dequantize(grads[0].dtype)
        return (grad if ctx.clipped is None else grad.masked_fill(ctx.clipped, 0)), None


def add_lora_(
    model: Transformer,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    layers: Sequence[str] = LINEAR,
    generator: torch.Generator,
    format: Format | None = None,
) -> None:
    """Freeze the model and give linear layers of its blocks an adapter each that learns.

    At first it changes nothing, since B is zero. With `format`, or in a model from `prepare_qat_`,
    the sum of weights and adapter is rounded.

    Args:
        layers: names of `LINEAR`; s is `alpha / rank`.
        dropout: of the adapters' inputs, drawn from PyTorch's own generator.
        generator: on the CPU; draws A.

    Raises:
        InvalidRequest: a layer that blocks do not have, none at all, or dropout inside rounding.
    """
    if not layers or (unknown := set(layers) - set(LINEAR)):
        wrong = ", ".join(sorted(unknown)) if layers else "none"
        raise InvalidRequest(f"lora.layers: {wrong}; allowed are some of {', '.join(LINEAR)}")
    if format is not None:
        prepare_qat_(model, format)
    model.requires_grad_(False)
    for name, shape in weight_shapes(model.config).items():
        path = name.removesuffix(".weight")
        if path.rpartition(".")[2] not in layers:
            continue
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear | QuantizedLinear), f"{path} has an adapter already"
        low_rank = LowRank(shape, rank, alpha / rank, generator)
        low_rank.to(model.tok_embeddings.weight.device)
        if not isinstance(linear, QATLinear):
            replace_module(model, path, LoRALinear(linear, low_rank, dropout))
        elif dropout:
            raise InvalidRequest("lora.dropout: must be 0 where weights and adapter are rounded")
        else:
            replace_module(model, path, RoundedLoRA(linear, low_rank))
    link_fused_(model)


def start_from_(
    model: nn.Module, weights: Mapping[str, tuple[float, Tensor, Tensor]], *, keep: bool = False
) -> None:
    """Start adapters that are to learn from the values of one that was read (`read_adapter`).

    With `keep` they store these values, too, and compute with them while they are disabled.

    Raises:
        InvalidRequest: it adapts other layers, or its rank is another.
    """
    parts = dict(_low_ranks(model))
    if differing := sorted(parts.keys() ^ weights.keys()):
        raise InvalidRequest(f"lora.start: only one of the two adapters adapts {differing[0]}")
    for path, part in parts.items():
        scale, a, b = weights[path]
        if a.shape != part.a.shape:
            raise InvalidRequest(f"lora.start: its rank is {len(a)}, and lora.rank {len(part.a)}")
        with torch.no_grad():
            part.a.copy_(a)
            part.b.copy_(b * (scale / part.scale))
            if keep:
                part.first_a, part.first_b = part.a.detach().clone(), part.b.detach().clone()


def merge_lora_(model: Transformer) -> None:
    """Fold every adapter into the weights below it, and remove it.

    Codes become plain weights again, since codes cannot hold the sum. A model that learned in a
    number format computes the same as before, bit for bit.
    """
    dtype = model.norm.weight.dtype
    with torch.no_grad():
        for path, module in list(model.named_modules()):
            if isinstance(module, RoundedLoRA):
                weight = nn.Parameter(module.weight, requires_grad=False)
                merged = QATLinear(weight, module.format, module.largest)
                merged.observe, merged.rounds = module.observe, module.rounds
                replace_module(model, path, merged.train(module.training))
            elif isinstance(module, LoRALinear):
                base, low_rank = module.base, module.low_rank
                columns, rows = low_rank.a.shape[1], low_rank.b.shape[0]
                weight = base.weight
                if isinstance(base, QuantizedLinear):
                    weight = base.dequantize(dtype)
                merged = nn.Linear(columns, rows, bias=False, device="meta")
                merged.weight = nn.Parameter(low_rank(weight), requires_grad=False)
                replace_module(model, path, merged)
    link_fused_(model)


def _low_ranks(model: nn.Module) -> Iterator[tuple[str, LowRank]]:
    """The adapter's part of each layer, by the layer's path."""
    for path, module in model.named_modules():
        if isinstance(module, LowRank):
            yield path.removesuffix(".low_rank"), module


@contextmanager
def lora_disabled(model: nn.Module) -> Iterator[None]:
    """Within this context the model is what it was before it learned."""
    parts = [module for _, module in _low_ranks(model)]
    try:
        for module in parts:
            module.enabled = False
        yield
    finally:
        for module in parts:
            module.enabled = True


def save_adapter(model: Transformer, folder: Path, *, base_model_name: str) -> None:
    """Write what was learned as PEFT does, into a folder that has no adapter yet.

    Raises:
        CheckpointError: it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    last = None
    for path, last in _low_ranks(model):
        b = last.b.detach()
        if path.endswith(("wq", "wk")):
            b = pairs_to_halves(b, model.config.head_dim)
        name = spell(f"{path}.lora", "hf")
        for half, tensor in (("A", last.a.detach()), ("B", b)):
            tensors[f"base_model.model.{name}_{half}.weight"] = tensor.float().cpu()
    assert last is not None, "there is no adapter in this model"
    ours = {path.rpartition(".")[2] for path, _ in _low_ranks(model)}
    rank = last.a.shape[0]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "r": rank,
        "lora_alpha": last.scale * rank,
        "target_modules": [
            theirs.rpartition(".")[2]
            for theirs, name in LAYERS.items()
            if name.rpartition(".")[2] in ours
        ],
        "bias": "none",
        "inference_mode": True,
    }
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(folder / ADAPTER, shapes, tensors.__getitem__)
        write_json(folder / "adapter_config.json", config)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {error}") from error
