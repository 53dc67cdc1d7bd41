"""Quantised models on disk: what a folder says of its number format, and how its codes are kept.

Hugging Face's layout holds them as `compressed-tensors` does, which vLLM, SGLang and transformers
read: `weight` in codes, `weight_scale`, for static inputs `input_scale`, and in config.json what
they mean. Mistral's own folders of that kind say `qscale_weight` and `qscale_act`, one number each.
Either may bring scales for keys and values, which a cache in FP8 needs.

Sources: the compressed-tensors package 0.20 and vLLM's loaders for Mistral's layout.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opennemo.errors import CheckpointError
from opennemo.model.layouts import FolderLayout, Layout, short
from opennemo.model.quantization import FORMATS, Format, QuantizedLinear

Parts = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # suffix of a tensor's name -> what it is

_FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
_ROW = {"strategy": "channel", "dynamic": False}
_TENSOR = {"strategy": "tensor", "dynamic": False}
_GROUPS = {"strategy": "group", "group_size": 32}
# Name in FORMATS -> (name in compressed-tensors, how weights are rounded, how inputs are).
SCHEMES: dict[str, tuple[str, dict, dict | None]] = {
    "fp8": ("float-quantized", _FLOAT8 | _ROW, _FLOAT8 | {"strategy": "token", "dynamic": True}),
    "fp8-static": ("float-quantized", _FLOAT8 | _TENSOR, _FLOAT8 | _TENSOR),
    "int8": ("int-quantized", _INT8 | _ROW, _INT8 | _GROUPS | {"dynamic": True}),
    "int4": ("pack-quantized", _INT8 | _GROUPS | {"num_bits": 4, "dynamic": False}, None),
}
_KV = {"kv_cache_scheme": _FLOAT8 | _TENSOR}
# What the scales of keys and of values are called: as written here, and as others do.
KV_SCALES: dict[Layout, tuple[tuple[str, str], ...]] = {
    "hf": (
        ("self_attn.k_scale", "self_attn.v_scale"),
        ("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"),  # ModelOpt
        ("self_attn.kv_scale", "self_attn.kv_scale"),  # AutoFP8
    ),
    "mistral": (
        ("attention.k_fake_quantizer.qscale_act", "attention.v_fake_quantizer.qscale_act"),
        ("attention.kv_fake_quantizer.qscale_act", "attention.kv_fake_quantizer.qscale_act"),
    ),
    "gguf": (),
}
_MISTRAL = {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}


def describe(name: str, layout: Layout, kv: bool = False) -> dict[str, Any]:
    """What settings say of a format, and with `kv` of scales for a cache in FP8.

    An entry of config.json or of params.json.

    Raises:
        ValueError: the layout has no way to say it.
    """
    if layout == "mistral":
        if name != "fp8-static":
            raise ValueError(f"Mistral's layout holds fp8-static only, not {name}; write hf")
        return {"quantization": _MISTRAL}
    kind, weights, inputs = SCHEMES[name]
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": kind,
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": group},
            **(_KV if kv else {}),
        }
    }


def recognise(settings: Mapping[str, Any], where: Path) -> str | None:
    """The name in FORMATS of what the settings describe; None if nothing is quantised.

    Besides what `describe` writes this knows AutoFP8's static scheme, that of the first FP8
    folders of Mistral NeMo.

    Raises:
        CheckpointError: it is a scheme that is not supported.
    """
    if native := settings.get("quantization"):
        if native != _MISTRAL:
            raise CheckpointError(
                f"{where}: quantization {short(native)} is not supported, only {_MISTRAL}"
            )
        return "fp8-static"
    config = settings.get("quantization_config")
    if not config:
        return None
    if not isinstance(config, dict):
        raise CheckpointError(f"{where}: quantization_config is {short(config)}, not an object")
    if config.get("quant_method") == "fp8" and config.get("activation_scheme") == "static":
        return "fp8-static"
    groups = config.get("config_groups")
    group = next(iter(groups.values()), None) if isinstance(groups, dict) else None
    if isinstance(group, dict) and config.get("ignore") == ["lm_head"]:
        for name, (_, weights, inputs) in SCHEMES.items():
            if _says(group.get("weights"), weights) and _says(
                group.get("input_activations"), inputs
            ):
                return name
    known = ", ".join(SCHEMES)
    raise CheckpointError(
        f"{where}: this quantization_config ({short(config.get('quant_method'))}, "
        f"{short(config.get('format'))}) is not supported; supported are {known}"
    )


def _says(found: Any, wanted: dict | None) -> bool:
    """Whether an entry means what is wanted, whatever else it mentions."""
    if wanted is None or not isinstance(found, dict):
        return found == wanted
    return all(found.get(key) == value for key, value in wanted.items())


def is_stored_in_codes(name: str) -> bool:
    """Whether a weight is quantised at all: the matrices of blocks are."""
    return name.startswith("layers.") and "norm" not in name


def parts(name: str, layout: Layout, shape: tuple[int, ...]) -> Parts:
    """The tensors that stand for a weight (O, D) in a format, in the order they are written."""
    rows, columns = shape
    one = () if layout == "mistral" else (1,)
    weight, weight_scale, input_scale = suffixes(name, layout)
    if name == "int4":
        return {
            weight: (torch.int32, (rows, columns // 8)),
            weight_scale: (torch.float32, (rows, -(-columns // 32))),
            "weight_shape": (torch.int64, (2,)),
        }
    sizes: Parts = {
        weight: (FORMATS[name].weights.dtype, shape),
        weight_scale: (torch.float32, one if name == "fp8-static" else (rows, 1)),
    }
    return sizes | ({input_scale: (torch.float32, one)} if FORMATS[name].static else {})


def kv_scale_names(layer: int, layout: FolderLayout) -> tuple[str, str]:
    """What the scales of a layer's keys and values are called in a file that is written."""
    prefix = "layers" if layout == "mistral" else "model.layers"
    keys, values = KV_SCALES[layout][0]
    return f"{prefix}.{layer}.{keys}", f"{prefix}.{layer}.{values}"


def read_kv_scale(files: Any, n_layers: int, layout: Layout) -> Tensor | None:
    """The scales (L, 2) of keys and values, if an open model brings them for every layer.

    Raises:
        CheckpointError: one of them is not a positive number.
    """
    prefix = "layers" if layout == "mistral" else "model.layers"
    for pair in KV_SCALES[layout]:
        names = [f"{prefix}.{i}.{name}" for i in range(n_layers) for name in pair]
        if all(name in files.shapes for name in names):
            found = {name: files.read(name).float().flatten() for name in names}
            for name, scale in found.items():
                if scale.numel() != 1 or not 0 < float(scale) < math.inf:
                    numbers = short(scale.tolist())
                    raise CheckpointError(f"{name} is {numbers}; a scale is one positive number")
            return torch.cat([*found.values()]).view(n_layers, 2)
    return None


def suffixes(name: str, layout: Layout) -> tuple[str, str, str]:
    """What codes, their scale and the inputs' scale are called."""
    if layout == "mistral":
        return "weight", "qscale_weight", "qscale_act"
    return "weight_packed" if name == "int4" else "weight", "weight_scale", "input_scale"


def pack(name: str, layout: Layout, linear: QuantizedLinear, shape: Parts) -> dict[str, Tensor]:
    """A stored linear layer as the tensors of `parts`."""
    weight, weight_scale, input_scale = suffixes(name, layout)
    tensors = {weight: linear.weight, weight_scale: linear.scale}
    if linear.input_scale is not None:
        tensors[input_scale] = linear.input_scale
    if name == "int4":
        # Two codes a byte, the even column low, is what eight in a little-endian int32 are, too.
        tensors[weight] = linear.weight.view(torch.int32)
        rows, columns = linear.weight.shape
        tensors["weight_shape"] = torch.tensor([rows, 2 * columns])
    return {suffix: tensors[suffix].reshape(size) for suffix, (_, size) in shape.items()}


def unpack(name: str, layout: Layout, tensors: Mapping[str, Tensor]) -> QuantizedLinear:
    """The opposite of `pack`."""
    format: Format = FORMATS[name]
    weight, weight_scale, input_scale = suffixes(name, layout)
    codes, scale = tensors[weight], tensors[weight_scale].float()
    scale = scale.reshape(1, 1) if scale.numel() == 1 and format.static else scale
    given = tensors[input_scale].float().reshape(1, 1) if format.static else None
    return QuantizedLinear(
        format, codes.view(torch.uint8) if name == "int4" else codes, scale, given
    )
