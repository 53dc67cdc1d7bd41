"""Low-rank adapters: one base model, many small corrections, chosen token by token.

An adapter adds `s * B @ A` to some linear layers (LoRA, arXiv:2106.09685). While serving, rows of
the same flat pass may follow different adapters: `adapted` adds each one's part to the outputs of
its own rows, from outside, so neither the model nor number formats know of adapters. Files are
those of PEFT: `adapter_config.json` and `adapter_model.safetensors`.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from opennemo.errors import CheckpointError
from opennemo.model.layouts import COLUMN, WEIGHTS, halves_to_pairs
from opennemo.model.transformer import Transformer

# Linear layers of a block, from Hugging Face's names to ours.
LAYERS = {names[COLUMN["hf"]]: ours for ours, names in WEIGHTS.items() if ".w" in ours}
_numbers = itertools.count(1)


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter in memory; `weights` maps a module's path to A (r, D) and s * B (O, r)."""

    name: str
    weights: dict[str, tuple[Tensor, Tensor]]
    # Tells apart two adapters of one name, loaded one after the other, in the prefix cache.
    number: int = field(default_factory=lambda: next(_numbers))


def load_adapter(folder: Path, model: Transformer) -> Adapter:
    """Read an adapter that PEFT saved, checked against the model it is for.

    Raises:
        CheckpointError: files are missing or damaged, it uses a variant that is not supported
            (DoRA, biases, ranks by pattern), or its shapes do not match; the first five are named.
    """
    config = _read_config(folder / "adapter_config.json")
    rank, alpha = config["r"], config.get("lora_alpha", config["r"])
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    device, dtype = model.tok_embeddings.weight.device, model.tok_embeddings.weight.dtype
    halves: dict[str, dict[str, Tensor]] = {}
    path = folder / "adapter_model.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  a safetensors file is no mapping
                module, half = _module_of(key, path)
                halves.setdefault(module, {})[half] = file.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    weights, wrong = {}, []
    for module, pair in halves.items():
        a, b = pair.get("A"), pair.get("B")
        try:
            out_width, in_width = _linear_shape(model, module)
        except AttributeError:
            wrong.append(f"{module}: the model has no such layer")
            continue
        expected = ((rank, in_width), (out_width, rank))
        found = tuple(None if t is None else tuple(t.shape) for t in (a, b))
        if found != expected or a is None or b is None:
            wrong.append(f"{module}: A and B are {found}, expected {expected}")
            continue
        if module.endswith(("wq", "wk")):
            b = halves_to_pairs(b, model.config.head_dim)
        weights[module] = (a.to(device, dtype), (b.float() * scale).to(device, dtype))
    if wrong or not weights:
        raise CheckpointError(f"{path}: " + ("; ".join(wrong[:5]) or "there are no weights in it"))
    return Adapter(folder.name, weights)


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


def _read_config(path: Path) -> dict:
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    odd = [
        name
        for name in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias")
        if config.get(name)
    ]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or odd:
        found = odd or [config.get("peft_type"), f"bias {config.get('bias')}"]
        raise CheckpointError(f"{path}: only plain LoRA without biases is supported, not {found}")
    if not isinstance(config.get("r"), int) or not 0 < config["r"] <= 1024:
        raise CheckpointError(f"{path}: r is {config.get('r')}, allowed is 1 to 1024")
    return config


def _module_of(key: str, path: Path) -> tuple[str, str]:
    """base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight -> (our path, "A")."""
    module, _, kind = (
        key.removeprefix("base_model.model.").removeprefix("model.").rpartition(".lora_")
    )
    start, _, rest = module.partition("layers.")
    number, _, inner = rest.partition(".")
    if start or kind not in ("A.weight", "B.weight") or inner not in LAYERS:
        raise CheckpointError(f"{path}: {key} is not a part of an adapter for these models")
    return f"layers.{number}.{LAYERS[inner]}", kind[0]


def _linear_shape(model: Transformer, path: str) -> tuple[int, int]:
    """(O, D) of a linear layer, whatever number format it is kept in."""
    config, name = model.config, path.rsplit(".", 1)[-1]
    model.get_submodule(path)
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    return {
        "wq": (q, config.dim),
        "wk": (kv, config.dim),
        "wv": (kv, config.dim),
        "wo": (config.dim, q),
        "w1": (config.hidden_dim, config.dim),
        "w2": (config.dim, config.hidden_dim),
        "w3": (config.hidden_dim, config.dim),
    }[name]
