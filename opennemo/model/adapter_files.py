"""Files of adapters: what PEFT and mistral-finetune write, read with every setting accounted for.

A setting that changes the result is computed or refused by name, and so is one that is unknown.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from opennemo.errors import CheckpointError
from opennemo.files import read_json
from opennemo.model.checkpoint import weight_shapes
from opennemo.model.layouts import COLUMN, WEIGHTS, halves_to_pairs, short, spell
from opennemo.model.transformer import ModelConfig

# Linear layers of a block, from Hugging Face's names to ours.
LAYERS = {names[COLUMN["hf"]]: ours for ours, names in WEIGHTS.items() if ".w" in ours}
# Files of PEFT's, and of mistral-finetune's, whose settings are in params.json.
ADAPTER, FINETUNED = "adapter_model.safetensors", "lora.safetensors"
# PEFT's settings that are read here, or have no effect once there are tensors.
KNOWN_SETTINGS = {
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern",
    "init_lora_weights", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path",
    "revision", "inference_mode", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "lora_dropout", "fan_in_fan_out", "megatron_core", "eva_config",
    "qalora_group_size", "runtime_config", "ensure_weight_tying",
}  # fmt: skip
HARMLESS = [("bias", "none")]
# How A and B begin: without changing the base weights, or by subtracting their product from them.
ONLY_BEGINS = ("true", "gaussian", "orthogonal", "eva", "mica")
CHANGES_BASE = ("olora", "corda", "loftq", "lora_ga")


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
        name = spell(f"{module}.weight", "hf").removesuffix(".weight")
        if setting := settings.left_out(name):
            wrong.append(f"{module}: {setting} of its settings leaves this layer out")
            continue
        rank, scale = settings.of(name)
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


@dataclass(frozen=True)
class _Scales:
    """Rank and s of every layer, some by a pattern of its name, and which layers are adapted."""

    rank: int
    alpha: float
    rslora: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    targets: Any = None  # names, or a regular expression; None and "all-linear": all
    excluded: Any = None
    layers: Any = None  # a number, or several

    def of(self, module: str) -> tuple[int, float]:
        """r and s of a layer by its name in Hugging Face's layout."""

        def first(patterns: Mapping[str, Any], default: Any) -> Any:
            # As PEFT matches them: a whole name, or its end behind a dot.
            fits = (p for p in patterns if re.match(rf"(.*\.)?({p})$", module))
            return patterns[p] if (p := next(fits, None)) is not None else default

        rank = first(self.ranks, self.rank)
        return rank, first(self.alphas, self.alpha) / (rank**0.5 if self.rslora else rank)

    def left_out(self, module: str) -> str | None:
        """The setting by which PEFT would ignore the weights of this layer, if there is one."""

        def named(names: Any) -> bool:
            if isinstance(names, str):
                return re.fullmatch(names, module) is not None
            return any(module == name or module.endswith(f".{name}") for name in names)

        layers = self.layers if isinstance(self.layers, list) else [self.layers]
        if self.layers is not None and int(module.split(".")[2]) not in layers:
            return "layers_to_transform"
        if self.excluded and named(self.excluded):
            return "exclude_modules"
        if self.targets and self.targets != "all-linear" and not named(self.targets):
            return "target_modules"
        return None


def _read_config(path: Path) -> _Scales:
    """PEFT's settings; unknown settings that are not empty are refused, since they may matter."""
    config = read_json(path)
    if (kind := config.get("peft_type")) != "LORA":
        raise CheckpointError(f"{path}: peft_type is {short(kind)}; only LORA is supported")
    if str(init := config.get("init_lora_weights")).lower() in CHANGES_BASE or str(init).startswith(
        "pissa"
    ):
        raise CheckpointError(
            f"{path}: init_lora_weights is {short(init)}, which also changes the base weights when "
            "training begins; save the adapter as plain LoRA (PEFT: save_pretrained with "
            "path_initial_model_for_weight_conversion), or, for use with those base weights, "
            "save them, too, and set init_lora_weights to true"
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
    names = [config.get(f"{name}_modules") for name in ("target", "exclude")]
    for name, value in zip(("target_modules", "exclude_modules"), names, strict=True):
        if not isinstance(value, str | list | None):
            raise CheckpointError(f"{path}: {name} is {short(value)}, not names or a pattern")
        try:
            re.compile(value if isinstance(value, str) else "")
        except re.error as error:
            raise CheckpointError(f"{path}: {name} {short(value)}: {error}") from None
    return _Scales(
        rank, alpha, bool(config.get("use_rslora")),
        {p: _rank(path, f"rank_pattern[{short(p)}]", value) for p, value in ranks.items()},
        {p: _alpha(path, f"alpha_pattern[{short(p)}]", value) for p, value in alphas.items()},
        names[0], names[1], config.get("layers_to_transform"),
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
