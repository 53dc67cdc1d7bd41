"""Folders that other tools quantised: their codes, read as the weights that they stand for.

Every scheme is one family: a weight is `scale * (code - zero)`, where a block of rows and columns
shares scale and zero, or it is an entry of a table times a scale. They differ in how codes lie in
the file. `schemes` says how each matrix is stored, and refuses by name what it does not know;
`Decoded` presents such files as if they held the weights. A scheme's rounding of the inputs of
layers is not applied, and a warning says so.

Sources: compressed-tensors 0.20; AutoAWQ's `gemm`; AutoGPTQ and GPTQModel, formats `gptq` and
`gptq_v2`; bitsandbytes' `QuantState`; AutoFP8, transformers' FineGrainedFP8Config; ModelOpt's
`hf_quant_config.json`.
"""

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from opennemo.errors import CheckpointError
from opennemo.files import read_json
from opennemo.model.foreign_codes import (
    BNB4,
    CT,
    CT_PACKED,
    FP8,
    Share,
    awq,
    bnb4,
    bnb8,
    fp8,
    gptq,
    plain,
    unpacked,
)
from opennemo.model.layouts import short
from opennemo.model.tensor_files import SafetensorFiles

MODULE = re.compile(r"(lm_head|.+?\.(?:[qkvo]_proj|gate_proj|up_proj|down_proj))\.(.+)")
KV_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
PACKED, CODES = "pack-quantized", ("float-quantized", "int-quantized", "naive-quantized")
# Entries of quantization_config by method: the values that are understood; None is any value. An
# empty value (null, false, {}) counts as none. `CHECKED` entries are read below.
CHECKED: tuple[Any, ...] = ("read below",)
UNDERSTOOD: dict[str, dict[str, tuple[Any, ...] | None]] = {
    "compressed-tensors": {
        "format": (PACKED, *CODES, "mixed-precision", "dense"), "ignore": None,
        "quantization_status": ("compressed", "frozen"), "config_groups": CHECKED,
        "kv_cache_scheme": CHECKED, "sparsity_config": ({"format": "dense"},), "version": None,
        "transform_config": ({"config_groups": {}},), "global_compression_ratio": None,
    },
    "fp8": {
        "activation_scheme": ("static", "dynamic"), "ignored_layers": None, "fmt": ("e4m3",),
        "modules_to_not_convert": None, "weight_block_size": CHECKED, "kv_cache_scheme": CHECKED,
        "dequantize": None,
    },
    "modelopt": {
        "quant_algo": ("FP8",), "kv_cache_quant_algo": ("FP8",), "ignore": None, "producer": None,
        "exclude_modules": None, "kv_cache_scheme": CHECKED, "config_groups": CHECKED,
    },
    "awq": {
        "bits": (4,), "group_size": CHECKED, "zero_point": (True,), "version": ("gemm", "GEMM"),
        "modules_to_not_convert": None, "do_fuse": None, "fuse_max_seq_len": None,
        "modules_to_fuse": None, "exllama_config": None, "backend": None,
    },
    "gptq": {
        "bits": (2, 4, 8), "group_size": CHECKED, "checkpoint_format": ("gptq", "gptq_v2"),
        "pack_dtype": ("int32",), **dict.fromkeys((
            "desc_act", "sym", "lm_head", "true_sequential", "damp_percent", "static_groups",
            "model_name_or_path", "model_file_base_name", "meta", "tokenizer", "dataset",
            "use_exllama", "disable_exllama", "exllama_config", "backend", "batch_size",
            "cache_block_outputs", "modules_in_block_to_quantize", "block_name_to_quantize",
            "module_name_preceding_first_block", "pad_token_id", "max_input_length",
            "use_cuda_fp16", "model_seqlen", "damp_auto_increment",
        )),
    },
    "bitsandbytes": {
        "bnb_4bit_quant_type": ("nf4", "fp4"), **dict.fromkeys((
            "load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit",
            "bnb_4bit_compute_dtype", "bnb_4bit_use_double_quant", "bnb_4bit_quant_storage",
            "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight",
            "llm_int8_skip_modules", "llm_int8_threshold",
        )),
    },
}  # fmt: skip
# The same for a group's `weights` and `input_activations`.
ARGUMENTS: dict[str, tuple[Any, ...] | None] = {
    "num_bits": (2, 4, 8), "type": ("int", "float"), "symmetric": None, "group_size": None,
    "strategy": ("tensor", "channel", "group", "block", "token"), "block_structure": None,
    "dynamic": None, "actorder": ("static", "weight", "group", True), "observer": None,
    "observer_kwargs": None, "scale_dtype": None, "zp_dtype": None,
}  # fmt: skip
GROUP = {"targets", "weights", "input_activations", "format"}


@dataclass(frozen=True)
class Scheme:
    """How a matrix is stored.

    Attributes:
        parts: the suffixes of its tensors, those that may be absent among them.
        needed: those that may not.
        decode: makes the weights (O, D) of them, in float32.
        weights, inputs: the roundings as compressed-tensors describes them, if it does.
    """

    parts: tuple[str, ...]
    needed: tuple[str, ...]
    decode: Callable[[Mapping[str, Tensor]], Tensor]
    weights: Mapping[str, Any] | None = None
    inputs: Mapping[str, Any] | None = None


class Decoded:
    """Open files whose codes are read as the weights that they stand for."""

    bytes_to_decode = 16  # of a weight: codes as integers and as numbers, a scale and a zero

    def __init__(
        self, files: SafetensorFiles, stored: Mapping[str, Scheme], shapes: Mapping[str, Any]
    ):
        """Args: `shapes` of the weights of what is `stored`, by module.

        Raises:
            CheckpointError: tensors are missing.
        """
        self._files, self._stored = files, stored
        needed = [f"{module}.{part}" for module, s in stored.items() for part in s.needed]
        if missing := [name for name in needed if name not in files.shapes]:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise CheckpointError(f"tensors missing: {', '.join(missing[:5])}{more}")
        parts = {f"{module}.{part}" for module, scheme in stored.items() for part in scheme.parts}
        others = [name for name in files.shapes if name not in parts]
        self.shapes = {name: files.shapes[name] for name in others}
        self.dtypes = {name: files.dtypes[name] for name in others}
        dtype = files.dtypes.get("model.embed_tokens.weight", torch.float32)
        for module in stored:
            self.shapes[f"{module}.weight"], self.dtypes[f"{module}.weight"] = shapes[module], dtype

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor, decoded if it is stored in codes.

        Raises:
            CheckpointError: its codes, scales and zeros do not fit each other.
        """
        module = name.removesuffix(".weight")
        if module not in self._stored or not name.endswith(".weight"):
            return self._files.read(name, dtype)
        scheme = self._stored[module]
        names = {part: f"{module}.{part}" for part in scheme.parts}
        tensors = {p: self._files.read(n) for p, n in names.items() if n in self._files.shapes}
        try:
            if (bias := tensors.get("bias")) is not None and bias.any():
                raise ValueError("there is a bias, and these models have none")
            weight = scheme.decode(tensors)
            if tuple(weight.shape) != self.shapes[name]:
                raise ValueError(f"they make {tuple(weight.shape)}, not {self.shapes[name]}")
        except (KeyError, ValueError, IndexError, RuntimeError, TypeError) as error:
            sizes = ", ".join(f"{part} {tuple(t.shape)}" for part, t in tensors.items())
            raise CheckpointError(f"{module}: {sizes} do not fit each other: {error}") from None
        return weight.to(dtype or self.dtypes[name])


def quantization_of(settings: Mapping[str, Any], where: Path) -> tuple[Any, Path]:
    """A folder's entry about its quantisation, under any of its names so far, and where it is."""
    for key in ("quantization_config", "compression_config"):
        if settings.get(key):
            return settings[key], where
    beside = where.with_name("hf_quant_config.json")
    if beside.exists():
        quantization = read_json(beside).get("quantization")
        return {"quant_method": "modelopt", **(quantization or {})}, beside
    return None, where


def schemes(
    config: Mapping[str, Any], files: SafetensorFiles, where: Path
) -> dict[str, Scheme | None]:
    """How each matrix is stored: module -> scheme, None for what is left as it was.

    Raises:
        CheckpointError: a key or a value that is not understood, with what is understood.
    """
    method = "compressed-tensors" if "config_groups" in config else None
    method = config.get("quant_method", method)
    if not isinstance(method, str) or method not in UNDERSTOOD:
        refuse(where, "quant_method", method, tuple(UNDERSTOOD))
    for key, value in config.items():
        if key != "quant_method":
            _check(where, key, value, UNDERSTOOD[method])
    _check_kv(config.get("kv_cache_scheme"), where)
    parts: dict[str, set[str]] = {}
    for name in files.shapes:
        if match := MODULE.fullmatch(name):
            parts.setdefault(match[1], set()).add(match[2])
    if method == "compressed-tensors":
        return _compressed_tensors(config, parts, where)
    if method == "bitsandbytes":
        coded = "weight.absmax", "SCB"
        four = Scheme(BNB4, BNB4[:3], bnb4)
        eight = Scheme(("weight", "SCB", "weight_format"), ("weight", "SCB"), bnb8)
        of = lambda module: four if coded[0] in parts[module] else eight  # noqa: E731
    elif method in ("awq", "gptq"):
        coded, size = ("qweight",), config.get("group_size")
        if type(size) is not int or size < -1 or size == 0:
            refuse(where, "group_size", size, ("-1 or a number of weights",))
        version2 = config.get("checkpoint_format") == "gptq_v2"
        decode = partial(awq, size=size)
        if method == "gptq":
            decode = partial(gptq, size=size, bits=config.get("bits", 4), first=not version2)
        needed = ("qweight", "qzeros", "scales")
        scheme = Scheme((*needed, "g_idx", "bias"), needed, decode)
        of = lambda module: scheme  # noqa: E731
    else:
        block = config.get("weight_block_size")
        if block and not (isinstance(block, list) and [type(n) for n in block] == [int, int]):
            refuse(where, "weight_block_size", block, ("two numbers",))
        for name, group in _groups(config, where).items():
            weights = group.get("weights")
            if not isinstance(weights, dict) or weights.get("num_bits") != 8 or (
                weights.get("type") != "float"
            ):  # fmt: skip
                refuse(where, f"config_groups.{name}.weights", weights, ("FP8",))
        coded = "weight_scale", "weight_scale_inv"
        scheme = Scheme(FP8, FP8[:1], partial(fp8, block=block))
        of = lambda module: scheme  # noqa: E731
    found = {m: of(m) if parts[m].intersection(coded) else None for m in parts}
    lists = ("ignored_layers", "ignore", "exclude_modules")
    ignored = [name for key in lists for name in _names(config.get(key), key, where)]
    for module, scheme in found.items():
        if scheme and any(_is_named(module, name) for name in ignored):
            raise CheckpointError(f"{where}: {module} is left out by name, and stored in codes")
    if not any(found.values()):
        raise CheckpointError(
            f"{where}: quantization_config says {method}, and no weight is stored in such codes"
        )
    return found


def refuse(where: Path, key: str, value: Any, understood: tuple[Any, ...]) -> NoReturn:
    """Raise an error that says what is not supported and what is."""
    able = f"not supported, only {' or '.join(map(str, understood))}"
    raise CheckpointError(
        f"{where}: quantization_config: {key} is {short(value)}, "
        + (able if understood else "a key that is not understood")
    )


def warn_of_inputs(where: Path, stored: Mapping[str, Scheme], config: Mapping[str, Any]) -> None:
    """Warn about a folder whose codes are not multiplied as they are."""
    inputs = any(s.inputs for s in stored.values()) or config.get("activation_scheme")
    message = f"{where}: weights are decoded as they are read" + (
        ", and inputs of layers are not rounded" if inputs else ""
    )
    warnings.warn(message, stacklevel=4)


def _check(
    where: Path, key: str, value: Any, understood: Mapping[str, tuple[Any, ...] | None]
) -> None:
    if not value:
        return
    if key not in understood:
        refuse(where, key, value, ())
    allowed = understood[key]
    if allowed is None or allowed is CHECKED or value in allowed:
        return
    # An object may say more, all of it empty.
    if isinstance(value, dict) and any({k: v for k, v in value.items() if v} == a for a in allowed):
        return
    refuse(where, key, value, allowed)


def _check_kv(scheme: Any, where: Path) -> None:
    if scheme and (
        not isinstance(scheme, dict)
        or any(scheme.get(key, wanted) != wanted for key, wanted in KV_CACHE.items())
        or scheme.get("symmetric") is False
    ):
        refuse(where, "kv_cache_scheme", scheme, (KV_CACHE,))


def _groups(config: Mapping[str, Any], where: Path) -> dict[str, dict[str, Any]]:
    groups = config.get("config_groups") or {}
    if not isinstance(groups, dict) or not all(isinstance(g, dict) for g in groups.values()):
        refuse(where, "config_groups", groups, ("an object of groups",))
    return groups


def _names(value: Any, key: str, where: Path) -> list[str]:
    """A list of names of modules, patterns of them, and regular expressions behind `re:`."""
    names = value or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        refuse(where, key, value, ("a list of names",))
    for name in names:
        try:
            re.compile(name.removeprefix("re:") if name.startswith("re:") else "")
        except re.error as error:
            refuse(where, key, name, (f"a regular expression ({error})",))
    return names


def _is_named(module: str, name: str) -> bool:
    """Whether an entry of such a list means this module."""
    if name.startswith("re:"):
        return re.match(name[3:], module) is not None
    return name == module or fnmatchcase(module, name)


def _compressed_tensors(
    config: Mapping[str, Any], parts: Mapping[str, set[str]], where: Path
) -> dict[str, Scheme | None]:
    groups, ignore = _groups(config, where), _names(config.get("ignore"), "ignore", where)
    targets = {
        name: _names(group.get("targets"), f"config_groups.{name}.targets", where)
        for name, group in groups.items()
    }
    made: dict[str, Scheme | None] = {}
    for name, group in groups.items():
        at = f"config_groups.{name}"
        for key in group.keys() - GROUP:
            _check(where, f"{at}.{key}", group[key], {})
        made[name] = _group(group, at, str(group.get("format") or config.get("format")), where)

    def of(module: str) -> Scheme | None:
        if any(_is_named(module, name) or name == "Linear" for name in ignore):
            return None
        # In compressed-tensors' order: exact names, then patterns, then the class.
        by_pattern = partial(_is_named, module)
        for means in (module.__eq__, by_pattern, "Linear".__eq__):
            for name in groups:
                if any(map(means, targets[name])):
                    return made[name]
        return None

    # Heads are often left as they were, and no entry says so.
    plain_head = parts.get("lm_head", set()) == {"weight"}
    return {m: None if m == "lm_head" and plain_head else of(m) for m in parts}


def _group(group: Mapping[str, Any], at: str, format: str, where: Path) -> Scheme | None:
    weights, inputs = group.get("weights"), group.get("input_activations")
    for kind, arguments in (("weights", weights), ("input_activations", inputs)):
        if not isinstance(arguments, dict | None):
            refuse(where, f"{at}.{kind}", arguments, ("an object",))
        for key, value in (arguments or {}).items():
            name = f"{at}.{kind}.{key}"
            known = {name: ARGUMENTS[key]} if key in ARGUMENTS else {}
            _check(where, name, value, known)
    if weights is None:
        if inputs is not None:
            refuse(where, f"{at}.input_activations", inputs, ("null without weights",))
        return None
    if weights.get("dynamic"):
        refuse(where, f"{at}.weights.dynamic", weights["dynamic"], ("false",))
    if format not in (PACKED, *CODES):
        refuse(where, f"{at}.format", format, (PACKED, *CODES))
    strategy, bits = weights.get("strategy"), weights.get("num_bits", 8)
    sizes = {"tensor": (None, None), "channel": (1, None)}
    if strategy == "group":
        sizes["group"] = (1, weights.get("group_size") or 0)
    elif strategy == "block":
        block = weights.get("block_structure")
        block = [int(n) for n in re.findall(r"\d+", str(block))]
        sizes["block"] = (block[0], block[1]) if len(block) == 2 else (0, 0)
    share: Share | None = sizes.get(str(strategy))
    if share is None or any(n is not None and (type(n) is not int or n < 1) for n in share):
        refuse(where, f"{at}.weights", weights, ("tensor, channel, group or block, with sizes",))
    decode = partial(unpacked if format == PACKED else plain, bits=bits, share=share)
    parts, n_needed = (CT_PACKED, 3) if format == PACKED else (CT, 2)
    defaults = {"dynamic": False, "symmetric": True}
    weights, inputs = (
        arguments and defaults | {k: v for k, v in arguments.items() if v is not None}
        for arguments in (weights, inputs)
    )
    return Scheme(parts, parts[:n_needed], decode, weights, inputs)
