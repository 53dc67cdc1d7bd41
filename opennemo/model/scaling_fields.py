"""How each layout describes positions: RoPE's scaling, that of queries, windows by layer.

As in layouts.py, to which this belongs, a setting that is not understood is refused by name, and a
setting that a layout has no name for is not written. Sources: `modeling_rope_utils.py` and the
configs of transformers, vLLM's reader of params.json, `convert_hf_to_gguf.py` and
`llama-context.cpp` of llama.cpp.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from opennemo.model.field_values import (
    Layout,
    no_name,
    numbers_of,
    read_number,
    read_table,
    refuse,
)
from opennemo.model.positions import (
    QueryScaling,
    RopeScaling,
    Window,
    frequencies,
    window_in,
    yarn_gain,
)
from opennemo.model.transformer import ModelConfig

Scalings = tuple[RopeScaling | None, QueryScaling | None]
# What config.json may say about each kind of RoPE.
ROPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    ),
    "yarn": (
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate",
        "attention_factor", "mscale", "mscale_all_dim",
    ),
}  # fmt: skip
ANY_ROPE = (
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "max_position_embeddings",
    "original_max_position_embeddings", "llama_4_scaling_beta", "finetuned",
)  # fmt: skip
YARN = ("factor", "original_max_position_embeddings", "beta", "alpha", "apply_scale")
FAR = ("beta", "original_max_position_embeddings")


def read_scalings(
    raw: Mapping[str, Any], config: ModelConfig, layout: Layout, where: Path
) -> Scalings:
    """How RoPE and queries are scaled. Raises: CheckpointError, it is not understood."""
    read = {"mistral": _params_rope, "hf": _config_rope, "gguf": _gguf_rope}[layout]
    return read(raw, config, where)


def read_window(raw: Mapping[str, Any], n_layers: int, layout: Layout, where: Path) -> Window:
    """The windows of a model's layers. Raises: CheckpointError, they are not understood."""
    read = {"mistral": _params_window, "hf": _config_window, "gguf": _gguf_window}[layout]
    return _shortest(read(raw, n_layers, where))


def write_scalings(config: ModelConfig, layout: Layout) -> dict[str, Any]:
    """The settings for positions. Raises: CheckpointError, the layout has no name for one."""
    return {"mistral": _write_params, "hf": _write_config, "gguf": _write_gguf}[layout](config)


def rope_factors(config: ModelConfig) -> Tensor | None:
    """The divisors of angles (H/2,) in float32, for a GGUF file that has them as a tensor."""
    if config.rope_scaling is None or config.rope_scaling.kind != "llama3":
        return None
    plain, scaled = (
        frequencies(config.head_dim, config.rope_theta, scaling)
        for scaling in (None, config.rope_scaling)
    )
    return (plain / scaled).float()


def _params_rope(raw: Mapping[str, Any], config: ModelConfig, where: Path) -> Scalings:
    scaling = far = None
    if raw.get("yarn"):
        yarn = read_table(raw["yarn"], "yarn", YARN, where)
        number = numbers_of(yarn, "yarn", where)
        if type(yarn.get("apply_scale")) is not bool:
            refuse(where, "yarn.apply_scale", yarn.get("apply_scale"), [True, False])
        factor = number("factor", 2**16)
        scaling = RopeScaling(
            kind="yarn", factor=factor, gain=yarn_gain(factor) if yarn["apply_scale"] else 1.0,
            original=number("original_max_position_embeddings", 2**27, kind=int),
            low=number("alpha", 2**16), high=number("beta", 2**16),
        )  # fmt: skip
    if raw.get("llama_4_scaling"):
        number = numbers_of(
            read_table(raw["llama_4_scaling"], "llama_4_scaling", FAR, where),
            "llama_4_scaling",
            where,
        )
        original = number("original_max_position_embeddings", 2**27, kind=int)
        far = QueryScaling(beta=number("beta", 2**10), original=original)
    return scaling, far


def _config_rope(raw: Mapping[str, Any], config: ModelConfig, where: Path) -> Scalings:
    rope, name = (
        dict(raw["rope"]),
        "rope_parameters" if raw.get("rope_parameters") else "rope_scaling",
    )
    kind = rope["rope_type"]
    if kind not in ROPES:
        refuse(where, "rope_type", kind, [*ROPES])
    if raw.get("model_type") == "ministral3" and len(rope) == 1:
        refuse(where, "rope_parameters", None, ["those of Ministral 3"])
    read_table(rope, name, (*ANY_ROPE, *ROPES[kind]), where)
    # A value outside of the table takes precedence, as in transformers; by default the context.
    original = raw.get("original_max_position_embeddings")
    original = original or rope.get("original_max_position_embeddings")
    rope["original_max_position_embeddings"] = original or config.max_position_embeddings
    number, scaling, far = numbers_of(rope, name, where), None, None
    context = number("original_max_position_embeddings", 2**27, kind=int)
    if kind == "yarn":
        factor = number("factor", 2**16, config.max_position_embeddings / context)
        gain = yarn_gain(factor)
        if rope.get("attention_factor"):
            gain = number("attention_factor", 2**10)
        elif rope.get("mscale") and rope.get("mscale_all_dim"):
            of_both = (number(key, 2**10) for key in ("mscale", "mscale_all_dim"))
            above, below = (yarn_gain(factor, mscale) for mscale in of_both)
            gain = above / below
        if rope.get("truncate", True) not in (True, False):
            refuse(where, f"{name}.truncate", rope["truncate"], [True, False])
        scaling = RopeScaling(
            kind=kind, factor=factor, original=context, gain=gain,
            low=number("beta_slow", 2**16, 1), high=number("beta_fast", 2**16, 32),
            truncate=bool(rope.get("truncate", True)),
        )  # fmt: skip
    elif kind != "default":
        scaling = RopeScaling(kind=kind, factor=number("factor", 2**16))
    if kind == "llama3":
        low, high = number("low_freq_factor", 2**16), number("high_freq_factor", 2**16)
        if not low < high:
            refuse(where, f"{name}.high_freq_factor", high, [f"above {low}"])
        scaling = RopeScaling(
            kind=kind, factor=number("factor", 2**16), original=context, low=low, high=high
        )
    if rope.get("llama_4_scaling_beta"):
        far = QueryScaling(beta=number("llama_4_scaling_beta", 2**10), original=context)
        if original is None:
            refuse(where, f"{name}.original_max_position_embeddings", None, ["a whole number"])
    return scaling, far


def _gguf_rope(raw: Mapping[str, Any], config: ModelConfig, where: Path) -> Scalings:
    prefix, scaling, far = "llama.rope.scaling", None, None
    fields = {name: value for name, value in raw.items() if value}
    fields.setdefault(f"{prefix}.factor", fields.get("llama.rope.scale_linear", 1.0))
    fields.setdefault(f"{prefix}.original_context_length", config.max_position_embeddings)
    number = numbers_of(fields, "", where)
    factor, original = number(f"{prefix}.factor", 2**16), f"{prefix}.original_context_length"
    # llama.cpp's default: a factor alone is a linear one.
    kind = fields.get(f"{prefix}.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        refuse(where, f"{prefix}.type", kind, ["none", "linear", "yarn"])
    if kind == "yarn":
        multiplier = number(f"{prefix}.yarn_log_multiplier", 2**10, 0.0, zero=True)
        gain = yarn_gain(factor)
        gain = gain / yarn_gain(factor, multiplier) if multiplier else gain
        scaling = RopeScaling(
            kind=kind, factor=factor, original=number(original, 2**27, kind=int),
            gain=gain * number(f"{prefix}.attn_factor", 2**10, 1.0),
            low=number(f"{prefix}.yarn_beta_slow", 2**16, 1),
            high=number(f"{prefix}.yarn_beta_fast", 2**16, 32),
        )  # fmt: skip
    elif kind == "linear" and factor != 1:
        scaling = RopeScaling(kind=kind, factor=factor)
    if factors := raw.get("llama.rope.factors"):
        if scaling:
            refuse(where, f"{prefix}.type", kind, ["none, as there is rope_freqs.weight"])
        scaling = _llama3_of(factors, config, where)
    if fields.get("llama.attention.temperature_scale"):
        fields.setdefault("llama.attention.temperature_length", fields[original])
        length = number("llama.attention.temperature_length", 2**27, kind=int)
        far = QueryScaling(beta=number("llama.attention.temperature_scale", 2**10), original=length)
    return scaling, far


def _llama3_of(factors: Sequence[float], config: ModelConfig, where: Path) -> RopeScaling | None:
    """Llama 3's RoPE from its divisors of angles, if its numbers are those of Llama 3.1 on."""
    if all(factor == 1 for factor in factors):
        return None
    originals = (8192, config.max_position_embeddings) if max(factors) < 2**16 else ()
    for original in originals:
        scaling = RopeScaling(kind="llama3", factor=max(1.0, *factors), original=original)
        expected = rope_factors(replace(config, rope_scaling=scaling))
        assert expected is not None
        if len(factors) == len(expected) and all(
            math.isclose(a, b, rel_tol=1e-4)
            for a, b in zip(factors, expected.tolist(), strict=True)
        ):
            return scaling
    understood = "those of Llama 3: low_freq_factor 1, high_freq_factor 4 over 8,192 tokens"
    return refuse(where, "rope_freqs.weight", factors, [understood])


# -- windows by layer


def _params_window(raw: Mapping[str, Any], n_layers: int, where: Path) -> Window:
    window = raw.get("sliding_window")
    if not isinstance(window, list) or n_layers % (len(window) or 1):
        return read_number(window, 2**27, where, "sliding_window") if window else None
    widths = [read_number(w, 2**27, where, "sliding_window") if w else None for w in window]
    # Layers that see everything may be given the whole context.
    return tuple(w if w and w < raw["max_position_embeddings"] else None for w in widths)


def _config_window(raw: Mapping[str, Any], n_layers: int, where: Path) -> Window:
    window, types = raw.get("sliding_window"), raw.get("layer_types")
    window = read_number(window, 2**27, where, "sliding_window") if window else None
    if not types:
        return window
    names = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != n_layers or set(types) - {*names}:
        refuse(where, "layer_types", types, [f"{n_layers} of {' and '.join(names)}"])
    if window is None and names[1] in types:
        refuse(where, "sliding_window", None, ["a whole number, as layer_types names it"])
    return tuple(window if type == names[1] else None for type in types)


def _gguf_window(raw: Mapping[str, Any], n_layers: int, where: Path) -> Window:
    name = "llama.attention.sliding_window"
    window, pattern = raw.get(name), raw.get(f"{name}_pattern")
    window = read_number(window, 2**27, where, name) if window else None
    if window is None or not pattern:
        return window
    if isinstance(pattern, int):  # of so many layers the last sees all
        pattern = [(i + 1) % pattern > 0 for i in range(n_layers)]
    if len(pattern) != n_layers:
        refuse(where, f"{name}_pattern", pattern, [f"{n_layers} layers"])
    return tuple(window if windowed else None for windowed in pattern)


def _shortest(window: Window) -> Window:
    """The same windows in their shortest form."""
    if not isinstance(window, tuple):
        return window
    n = next(n for n in range(1, len(window) + 1)
             if len(window) % n == 0 and window[:n] * (len(window) // n) == window)  # fmt: skip
    return window[0] if n == 1 else window[:n]


def _one_window(config: ModelConfig, layout: str) -> tuple[int, list[bool]]:
    """The width that windows have, and which layers have it."""
    windows = [window_in(config.sliding_window, i) for i in range(config.n_layers)]
    widths = {window for window in windows if window}
    if len(widths) != 1:
        no_name(layout, config.sliding_window, "windows of one width")
    return widths.pop(), [window is not None for window in windows]


def _write_params(config: ModelConfig) -> dict[str, Any]:
    scaling, far = config.rope_scaling, config.query_scaling
    values: dict[str, Any] = {}
    if isinstance(config.sliding_window, tuple):
        values["sliding_window"] = [*config.sliding_window]
    if scaling:
        gains = {yarn_gain(scaling.factor): True, 1.0: False}
        if scaling.kind != "yarn" or scaling.gain not in gains or not scaling.truncate:
            no_name("params.json", scaling, "YaRN with its usual attention factor or none")
        values["yarn"] = {
            "factor": scaling.factor, "original_max_position_embeddings": scaling.original,
            "beta": scaling.high, "alpha": scaling.low, "apply_scale": gains[scaling.gain],
        }  # fmt: skip
    if far:
        values["llama_4_scaling"] = {
            "beta": far.beta,
            "original_max_position_embeddings": far.original,
        }
    return values


def _write_config(config: ModelConfig) -> dict[str, Any]:
    # Without a window Mistral's architecture is Llama's; RoPE is written for old and new readers.
    values: dict[str, Any] = {}
    scaling, far, kind = config.rope_scaling, config.query_scaling, "mistral"
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if scaling:
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
        values["rope_scaling"] = rope
    if scaling and scaling.kind != "linear":
        rope["original_max_position_embeddings"] = scaling.original
        names = {
            "llama3": ("low_freq_factor", "high_freq_factor"),
            "yarn": ("beta_slow", "beta_fast"),
        }
        rope |= zip(names[scaling.kind], (scaling.low, scaling.high), strict=True)
        if not scaling.truncate:
            rope["truncate"] = False
    if scaling and scaling.kind == "yarn":
        if scaling.gain == 1:
            rope |= {"mscale": 1.0, "mscale_all_dim": 1.0}
        elif scaling.gain != yarn_gain(scaling.factor):
            rope["attention_factor"] = scaling.gain
    if far:
        kind = "ministral3"
        if rope.setdefault("original_max_position_embeddings", far.original) != far.original:
            no_name("config.json", far, f"the original context of RoPE, {scaling}")
        rope["llama_4_scaling_beta"] = far.beta
    if isinstance(config.sliding_window, tuple):
        window, windowed = _one_window(config, "config.json")
        if far:
            no_name("config.json", config.sliding_window, "windows by layer without query scaling")
        names = ("full_attention", "sliding_attention")
        kind = "ministral"
        values |= {"sliding_window": window, "layer_types": [names[w] for w in windowed]}
    return values | {"model_type": kind, "rope_parameters": rope}


def _write_gguf(config: ModelConfig) -> dict[str, Any]:
    scaling, far, attention = config.rope_scaling, config.query_scaling, "llama.attention"
    values: dict[str, Any] = {}
    if scaling and scaling.kind != "llama3":  # which is a tensor, `rope_factors`
        said: dict[str, Any] = {"type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "yarn":
            if not scaling.truncate:
                no_name("a GGUF file", scaling, "YaRN with whole channels")
            said |= {
                "original_context_length": scaling.original, "yarn_beta_fast": scaling.high,
                "yarn_beta_slow": scaling.low,
            }  # fmt: skip
            if scaling.gain == 1:
                said["yarn_log_multiplier"] = 1.0
            elif scaling.gain != yarn_gain(scaling.factor):
                said["attn_factor"] = scaling.gain / yarn_gain(scaling.factor)
        values |= {f"llama.rope.scaling.{name}": value for name, value in said.items()}
    if far:
        values |= {f"{attention}.temperature_scale": far.beta}
        values |= {f"{attention}.temperature_length": far.original}
    if isinstance(config.sliding_window, tuple):
        window, windowed = _one_window(config, "a GGUF file")
        values |= {f"{attention}.sliding_window": window}
        values |= {f"{attention}.sliding_window_pattern": windowed}
    if far or (scaling and scaling.kind == "yarn"):
        values["general.architecture"] = "mistral3"
    return values
