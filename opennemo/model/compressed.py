"""Quantised models on disk: what a folder says about its number format, and how codes are stored.

Hugging Face's layout holds them as `compressed-tensors` does, which vLLM, SGLang and transformers
read: `weight` in codes, `weight_scale`, for static inputs `input_scale`, and in config.json what
they mean; foreign.py reads what others write. Mistral's own folders of that kind have
`qscale_weight` and `qscale_act`, one number each. Either may bring scales for keys and values,
which a cache in FP8 needs.

Sources: the compressed-tensors package 0.20 and vLLM's loaders for Mistral's layout.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opennemo.errors import CheckpointError
from opennemo.model.foreign import Decoded, Scheme, quantization_of, schemes, warn_of_inputs
from opennemo.model.formats import FORMATS, SCALED_KV, Format, Rounding, Shapes, names
from opennemo.model.layouts import FolderLayout, Layout, short
from opennemo.model.quantization import QuantizedLinear

Shape = tuple[int, ...]

# Names of the scales of keys and of values: as written here, and as others do.
KV_SCALES: dict[Layout, tuple[tuple[str, str], ...]] = {
    "hf": (
        ("self_attn.k_scale", "self_attn.v_scale"),
        ("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"),  # ModelOpt
        ("self_attn.k_proj.output_scale", "self_attn.v_proj.output_scale"),  # vLLM in 2024
        ("self_attn.kv_scale", "self_attn.kv_scale"),  # AutoFP8
    ),
    "mistral": (
        ("attention.k_fake_quantizer.qscale_act", "attention.v_fake_quantizer.qscale_act"),
        ("attention.kv_fake_quantizer.qscale_act", "attention.kv_fake_quantizer.qscale_act"),
    ),
    "gguf": (),
}


def describe(format: Format, layout: Layout, kv: bool = False) -> dict[str, Any]:
    """The settings for a format, and with `kv` for scales of a cache in FP8.

    An entry of config.json or of params.json.

    Raises:
        ValueError: the layout cannot express it.
    """
    if layout == "mistral":
        if format.mistral is None:
            able = ", ".join(name for name in names("store") if FORMATS[name].mistral)
            raise ValueError(f"Mistral's layout holds {able} only, not {format.name}; write hf")
        return {"quantization": dict(format.mistral)}
    kind, weights, inputs = _scheme(format)
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    cache = FORMATS[SCALED_KV].kv
    assert cache is not None
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": kind,
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": group},
            **({"kv_cache_scheme": _arguments(cache)} if kv else {}),
        }
    }


def recognise(
    settings: Mapping[str, Any], where: Path, files: Any, shapes: Mapping[str, Shape]
) -> tuple[str | None, Any]:
    """The name in FORMATS of what settings describe, None if weights are plain, and the files.

    A model that is quantised in another way, or in part, is decoded as it is read.

    Args:
        shapes: of all matrices, by the names of their modules in Hugging Face's layout.

    Raises:
        CheckpointError: it is a scheme that is not supported; names the key and its value.
    """
    formats = [FORMATS[name] for name in names("store")]
    if native := settings.get("quantization"):
        for format in formats:
            if native == format.mistral:
                return format.name, files
        able = " or ".join(str(format.mistral) for format in formats if format.mistral)
        raise CheckpointError(
            f"{where}: quantization {short(native)} is not supported, only {able}"
        )
    config, where = quantization_of(settings, where)
    if not config:
        return None, files
    if not isinstance(config, dict):
        raise CheckpointError(f"{where}: quantization_config is {short(config)}, not an object")
    found = schemes(config, files, where)
    found = {module: scheme for module, scheme in found.items() if module in shapes}
    stored = {module: scheme for module, scheme in found.items() if scheme is not None}
    for format in formats:
        if stored.keys() == found.keys() - {"lm_head"} and all(
            _is_stored_as(format, config, scheme, module, files, shapes)
            for module, scheme in stored.items()
        ):
            return format.name, files
    if not stored:
        return None, files
    warn_of_inputs(where, stored, config)
    try:
        return None, Decoded(files, stored, shapes)
    except CheckpointError as error:
        raise CheckpointError(f"{where.parent}: {error}") from None


def _is_stored_as(
    format: Format,
    config: Any,
    scheme: Scheme,
    module: str,
    files: Any,
    shapes: Mapping[str, Shape],
) -> bool:
    """Whether a matrix is stored as the format says, tensor by tensor."""
    if scheme.weights is None:
        if not any(_includes(config, other) for other in format.others):
            return False
    else:
        _, weights, inputs = _scheme(format)
        if not _includes(scheme.weights, weights) or not _includes(scheme.inputs, inputs):
            return False
    sizes = parts(format, "hf", shapes[module])
    if f"{module}.weight_zero_point" in files.shapes:
        return False
    if not all(f"{module}.{suffix}" in files.shapes for suffix in sizes):
        return False
    # Such a folder does not say how inputs find their scales. Ours have powers of two for both.
    dynamic = format.inputs is not None and format.inputs.power_of_two and not format.static
    return not dynamic or _are_powers_of_two(files.read(f"{module}.weight_scale"))


def _are_powers_of_two(scale: Tensor) -> bool:
    return bool((torch.frexp(scale.float()).mantissa == 0.5).all())


def _scheme(format: Format) -> tuple[str, dict[str, Any], dict[str, Any] | None]:
    """compressed-tensors' name of a format, and its description of the roundings."""
    weights, inputs = format.weights, format.inputs
    kind = "float" if weights.dtype.is_floating_point else "pack" if _packed(format) else "int"
    of_inputs = None if inputs is None else _arguments(inputs, dynamic=not format.static)
    return f"{kind}-quantized", _arguments(weights), of_inputs


def _arguments(rounding: Rounding, dynamic: bool = False) -> dict[str, Any]:
    """A rounding as compressed-tensors describes it."""
    groups = isinstance(rounding.share, int)
    strategy = {"row": "token" if dynamic else "channel", "tensor": "tensor"}
    return {
        "num_bits": rounding.bits,
        "type": "float" if rounding.dtype.is_floating_point else "int",
        "symmetric": True,
        "strategy": "group" if groups else strategy[str(rounding.share)],
        "dynamic": dynamic,
    } | ({"group_size": rounding.share} if groups else {})


def _packed(format: Format) -> bool:
    """Whether a byte holds several codes: then 32 bits of them are written as one int32."""
    return format.weights.bits < 8


def _includes(entry: Any, wanted: Mapping[str, Any] | None) -> bool:
    """Whether an entry has the wanted meaning, whatever else it contains."""
    if wanted is None or not isinstance(entry, dict):
        return entry == wanted
    return all(entry.get(key) == value for key, value in wanted.items())


def is_stored_in_codes(name: str) -> bool:
    """Whether a weight is quantised at all: the matrices of blocks are."""
    return name.startswith("layers.") and "norm" not in name


def misfit(format: Format, shapes: Mapping[str, Shape]) -> str | None:
    """Why a model of these weights cannot be written in a format; None if it can."""
    for name, shape in shapes.items():
        if not is_stored_in_codes(name):
            continue
        fitting = format.at_width(shape[1])
        share = getattr(fitting.weights, "width", fitting.weights.share)  # blocks have a width
        if isinstance(share, int) and shape[1] % share:
            return f"{fitting.name} needs widths in multiples of {share}, {name} is {shape}"
    return None


def parts(format: Format, layout: Layout, shape: tuple[int, ...]) -> Shapes:
    """The tensors that stand for a weight (O, D) in a format, in the order they are written."""
    (rows, columns), weights = shape, format.weights
    one = () if layout == "mistral" else (1,)
    own: Shapes = {
        "weight": (weights.dtype, shape),
        "scale": (torch.float32, (rows, weights.scales_in_row(columns))),
        "input_scale": (torch.float32, one),
    }
    if weights.share == "tensor":
        own["scale"] = torch.float32, one
    if _packed(format):
        own["weight"] = torch.int32, (rows, columns * weights.bits // 32)
    sizes = {suffix: own[name] for name, suffix in _suffixes(format, layout).items()}
    return sizes | ({"weight_shape": (torch.int64, (2,))} if _packed(format) else {})


def _suffixes(format: Format, layout: Layout) -> dict[str, str]:
    """A layout's names for the tensors of a format."""
    if layout == "mistral":
        suffixes = {"weight": "weight", "scale": "qscale_weight", "input_scale": "qscale_act"}
    else:
        weight = "weight_packed" if _packed(format) else "weight"
        suffixes = {"weight": weight, "scale": "weight_scale", "input_scale": "input_scale"}
    if not format.static:
        del suffixes["input_scale"]
    return suffixes


def pack(format: Format, layout: Layout, linear: QuantizedLinear) -> dict[str, Tensor]:
    """A stored linear layer as the tensors of `parts`."""
    own, shape = linear.tensors, (linear.out_features, linear.in_features)
    tensors = {suffix: own[name] for name, suffix in _suffixes(format, layout).items()}
    if _packed(format):
        # Two codes a byte, the even column low, is what eight in a little-endian int32 are, too.
        tensors["weight_packed"] = own["weight"].view(torch.int32)
        tensors["weight_shape"] = torch.tensor(shape)
    sizes = parts(format, layout, shape)
    return {suffix: tensors[suffix].reshape(size) for suffix, (_, size) in sizes.items()}


def unpack(
    format: Format, layout: Layout, shape: tuple[int, ...], tensors: Mapping[str, Tensor]
) -> QuantizedLinear:
    """The opposite of `pack`."""
    own = {name: tensors[suffix] for name, suffix in _suffixes(format, layout).items()}
    if _packed(format):
        own["weight"] = own["weight"].view(format.weights.dtype)
    for name in own.keys() - {"weight"}:
        scale = own[name].float()
        own[name] = scale.reshape(1, 1) if format.weights.share == "tensor" else scale
    return QuantizedLinear(format, shape, own)


def kv_scale_names(layer: int, layout: FolderLayout) -> tuple[str, str]:
    """The names of a layer's scales of keys and values in a file that is written."""
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
            scales = {name: files.read(name).float().flatten() for name in names}
            for name, scale in scales.items():
                if scale.numel() != 1 or not 0 < float(scale) < math.inf:
                    numbers = short(scale.tolist())
                    raise CheckpointError(f"{name} is {numbers}; a scale is one positive number")
            return torch.cat([*scales.values()]).view(n_layers, 2)
    return None
