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
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from opennemo.errors import CheckpointError, InvalidRequest
from opennemo.files import read_json, write_json
from opennemo.model.checkpoint import weight_shapes
from opennemo.model.formats import Format
from opennemo.model.layouts import COLUMN, WEIGHTS, halves_to_pairs, pairs_to_halves, short, spell
from opennemo.model.quantization import (
    QATLinear,
    QuantizedLinear,
    link_fused_,
    prepare_qat_,
    replace_module,
)
from opennemo.model.tensor_files import write_safetensors
from opennemo.model.transformer import ModelConfig, Transformer

# Linear layers of a block, from Hugging Face's names to ours.
LAYERS = {names[COLUMN["hf"]]: ours for ours, names in WEIGHTS.items() if ".w" in ours}
LINEAR = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
# Files of PEFT's, and of mistral-finetune's, whose settings are in params.json.
ADAPTER, FINETUNED = "adapter_model.safetensors", "lora.safetensors"
# PEFT's settings that are read here, or change nothing once there are tensors: those say which
# layers have an adapter, and dropout is for training.
KNOWN_SETTINGS = {
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern",
    "init_lora_weights", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path",
    "revision", "inference_mode", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "lora_dropout", "fan_in_fan_out", "megatron_core", "eva_config",
    "qalora_group_size", "runtime_config", "ensure_weight_tying",
}  # fmt: skip
HARMLESS = [("bias", "none")]
# How A and B begin: without a trace in the base weights, or by taking their product off them.
ONLY_BEGINS = ("true", "gaussian", "orthogonal", "eva", "mica")
CHANGES_BASE = ("olora", "corda", "loftq", "lora_ga")
_numbers = itertools.count(1)


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter in memory; `weights` maps a module's path to A (r, D) and s * B (O, r)."""

    name: str
    weights: dict[str, tuple[Tensor, Tensor]]
    # Tells apart two adapters of one name, loaded one after the other, in the prefix cache.
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


def read_adapter(folder: Path, config: ModelConfig) -> dict[str, tuple[float, Tensor, Tensor]]:
    """An adapter that PEFT or mistral-finetune saved: by module s, A (r, D), B (O, r) in float32.

    Raises:
        CheckpointError: files are missing or damaged, a setting would change the result in a way
            that is not computed here, or shapes do not match; the first five are named.
    """
    is_mistral = not (folder / "adapter_config.json").exists() and (folder / FINETUNED).exists()
    if is_mistral:
        path, settings = folder / FINETUNED, _read_params(folder / "params.json")
    else:
        path, settings = folder / ADAPTER, _read_config(folder / "adapter_config.json")
    halves: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  a safetensors file is no mapping
                module, half = _module_of(key, path)
                halves.setdefault(module, {})[half] = file.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    shapes, weights, wrong = weight_shapes(config), {}, []
    for module, pair in halves.items():
        a, b = pair.get("A"), pair.get("B")
        if (shape := shapes.get(f"{module}.weight")) is None:
            wrong.append(f"{module}: the model has no such layer")
            continue
        rank, scale = settings.of(spell(f"{module}.weight", "hf").removesuffix(".weight"))
        expected = ((rank, shape[1]), (shape[0], rank))
        shapes_read = tuple(None if t is None else tuple(t.shape) for t in (a, b))
        if shapes_read != expected or a is None or b is None:
            wrong.append(f"{module}: A and B are {shapes_read}, expected {expected}")
            continue
        if module.endswith(("wq", "wk")) and not is_mistral:
            b = halves_to_pairs(b, config.head_dim)
        weights[module] = (scale, a.float(), b.float())
    if wrong or not weights:
        raise CheckpointError(f"{path}: " + ("; ".join(wrong[:5]) or "there are no weights in it"))
    return weights


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
                output.index_add_(0, index, F.linear(F.linear(inputs[0][index], a), b))

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

    def forward(self, weight: Tensor) -> Tensor:
        """W (O, D) -> W + s * B @ A, in the type of W."""
        if not self.enabled:
            return weight
        return fold(weight, self.scale, self.a, self.b)


def fold(weight: Tensor, scale: float, a: Tensor, b: Tensor) -> Tensor:
    """W (O, D) + s * B (O, r) @ A (r, D), added up in float32; the one place where it is."""
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
        if lora.enabled:
            if self.dropout:
                x = F.dropout(x, self.dropout, self.training)
            down = F.linear(x, lora.a.to(x.dtype))
            # In place, for nobody needs y without it, and a second one would be (T, O) again.
            y.addmm_(down, lora.b.to(down.dtype).T, alpha=lora.scale)
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

    Nothing is kept for the way back but the codes, which are there anyway. Rounding the input
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

    At first it changes nothing, for B is zero. With `format`, or in a model from `prepare_qat_`,
    the sum of weights and adapter is what is rounded.

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


def merge_lora_(model: Transformer) -> None:
    """Fold every adapter into the weights below it, and take it away.

    Codes become plain weights again, for the sum is nothing that codes could hold. A model that
    learned in a number format computes the same as before, bit for bit.
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
        write_safetensors(folder / "adapter_model.safetensors", shapes, tensors.__getitem__)
        write_json(folder / "adapter_config.json", config)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {error}") from error


@dataclass(frozen=True)
class _Scales:
    """Rank and s of every layer, some by a pattern of its name."""

    rank: int
    alpha: float
    rslora: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)

    def of(self, module: str) -> tuple[int, float]:
        """r and s of a layer by its name in Hugging Face's layout."""

        def first(patterns: Mapping[str, Any], default: Any) -> Any:
            # As PEFT matches them: a whole name, or its end behind a dot.
            fits = (p for p in patterns if re.match(rf"(.*\.)?({p})$", module))
            return patterns[p] if (p := next(fits, None)) is not None else default

        rank = first(self.ranks, self.rank)
        return rank, first(self.alphas, self.alpha) / (rank**0.5 if self.rslora else rank)


def _read_config(path: Path) -> _Scales:
    """PEFT's settings; what is not known and not empty is refused, for it may change the result."""
    config = read_json(path)
    if (kind := config.get("peft_type")) != "LORA":
        raise CheckpointError(f"{path}: peft_type is {short(kind)}; only LORA is supported")
    if str(init := config.get("init_lora_weights")).lower() in CHANGES_BASE or str(init).startswith(
        "pissa"
    ):
        raise CheckpointError(
            f"{path}: init_lora_weights is {short(init)}, which also changes the base weights when "
            "training begins; save the adapter as plain LoRA "
            "(PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for name, value in config.items():
        if value and name not in KNOWN_SETTINGS and (name, value) not in HARMLESS:
            raise CheckpointError(
                f"{path}: {name} is {short(value)}, which is not supported: only plain LoRA is, "
                "with use_rslora, rank_pattern and alpha_pattern"
            )
    if init is not None and type(init) is not bool and str(init).lower() not in ONLY_BEGINS:
        only = ", ".join(ONLY_BEGINS)
        raise CheckpointError(f"{path}: init_lora_weights is {short(init)}, not a bool or {only}")
    rank = _rank(path, "r", config.get("r"))
    alpha = _alpha(path, "lora_alpha", config.get("lora_alpha", rank))
    ranks, alphas = (config.get(f"{name}_pattern") or {} for name in ("rank", "alpha"))
    for name, patterns in (("rank", ranks), ("alpha", alphas)):
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{path}: {name}_pattern is {short(patterns)}, not an object")
        try:
            for pattern in patterns:
                re.compile(pattern)
        except re.error as error:
            raise CheckpointError(f"{path}: {name}_pattern {short(pattern)}: {error}") from None
    return _Scales(
        rank, alpha, bool(config.get("use_rslora")),
        {p: _rank(path, f"rank_pattern[{short(p)}]", value) for p, value in ranks.items()},
        {p: _alpha(path, f"alpha_pattern[{short(p)}]", value) for p, value in alphas.items()},
    )  # fmt: skip


def _read_params(path: Path) -> _Scales:
    """mistral-finetune's settings, whose `scaling` is s itself."""
    lora = read_json(path).get("lora")
    if not isinstance(lora, dict):
        raise CheckpointError(f"{path}: lora is {short(lora)}, not the settings of an adapter")
    rank = _rank(path, "lora.rank", lora.get("rank"))
    return _Scales(rank, _alpha(path, "lora.scaling", lora.get("scaling")) * rank)


def _rank(path: Path, name: str, value: Any) -> int:
    if type(value) is not int or not 0 < value <= 1024:
        raise CheckpointError(f"{path}: {name} is {short(value)}, allowed is 1 to 1024")
    return value


def _alpha(path: Path, name: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value <= 2**20:
        raise CheckpointError(
            f"{path}: {name} is {short(value)}, allowed is a number up to {2**20:,}"
        )
    return value


def _module_of(key: str, path: Path) -> tuple[str, str]:
    """base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight -> (our path, "A").

    Or layers.0.attention.wq.lora_A.weight, as mistral-finetune writes it.
    """
    module, _, kind = (
        key.removeprefix("base_model.model.").removeprefix("model.").rpartition(".lora_")
    )
    start, _, rest = module.partition("layers.")
    number, _, inner = rest.partition(".")
    names = dict.fromkeys(LAYERS.values()) if path.name == FINETUNED else LAYERS
    if start or kind not in ("A.weight", "B.weight") or inner not in names:
        raise CheckpointError(f"{path}: {short(key)} is not a part of an adapter for these models")
    return f"layers.{number}.{names[inner] or inner}", kind[0]
