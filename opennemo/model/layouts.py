"""Three spellings of one model: Mistral's own, Hugging Face's and GGUF's.

Mistral's names of settings and weights are the package's own; the other two are the columns of the
tables below, with a few rules. A setting that would change what the model computes is refused by
name, never skipped. This file handles only dictionaries and names; it opens no file.

Sources: `mistral_inference/args.py` for params.json (vLLM reads some keys more), `MistralConfig`
and `LlamaConfig` of transformers for config.json, docs/gguf.md of ggml for GGUF.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from opennemo.errors import CheckpointError
from opennemo.model.field_values import FolderLayout, Layout, read_number, refuse, short
from opennemo.model.scaling_fields import read_scalings, read_window, rope_factors, write_scalings
from opennemo.model.transformer import ModelConfig

__all__ = [
    "FolderLayout", "Layout", "halves_to_pairs", "is_rotated", "key", "pairs_to_halves",
    "read_settings", "rope_factors", "short", "spell", "write_settings",
]  # fmt: skip
COLUMN = {"hf": 0, "gguf": 1}
SETTINGS = {
    "dim": ("hidden_size", "llama.embedding_length"),
    "n_layers": ("num_hidden_layers", "llama.block_count"),
    "n_heads": ("num_attention_heads", "llama.attention.head_count"),
    "n_kv_heads": ("num_key_value_heads", "llama.attention.head_count_kv"),
    "head_dim": ("head_dim", "llama.attention.key_length"),
    "hidden_dim": ("intermediate_size", "llama.feed_forward_length"),
    "vocab_size": ("vocab_size", "llama.vocab_size"),
    "rope_theta": ("rope_theta", "llama.rope.freq_base"),
    "norm_eps": ("rms_norm_eps", "llama.attention.layer_norm_rms_epsilon"),
    "max_position_embeddings": ("max_position_embeddings", "llama.context_length"),
    "sliding_window": ("sliding_window", "llama.attention.sliding_window"),
    "tied_embeddings": ("tie_word_embeddings", "tied_embeddings"),
}
WEIGHTS = {
    "tok_embeddings": ("model.embed_tokens", "token_embd"),
    "norm": ("model.norm", "output_norm"),
    "rope_freqs": ("", "rope_freqs"),  # of GGUF alone: what Llama 3's RoPE divides angles by
    "output": ("lm_head", "output"),
    "layers": ("model.layers", "blk"),
    "attention.wq": ("self_attn.q_proj", "attn_q"),
    "attention.wk": ("self_attn.k_proj", "attn_k"),
    "attention.wv": ("self_attn.v_proj", "attn_v"),
    "attention.wo": ("self_attn.o_proj", "attn_output"),
    "attention_norm": ("input_layernorm", "attn_norm"),
    "feed_forward.w1": ("mlp.gate_proj", "ffn_gate"),
    "feed_forward.w2": ("mlp.down_proj", "ffn_down"),
    "feed_forward.w3": ("mlp.up_proj", "ffn_up"),
    "ffn_norm": ("post_attention_layernorm", "ffn_norm"),
}
# Settings that change what a model computes, and their values that are understood here; an empty
# value (false, null, 0, {}) counts as none.
ONLY: dict[Layout, dict[str, list]] = {
    "mistral": {
        "model_type": ["transformer"], "activation": ["silu"], "moe": [], "rope_scaling": [],
        "vision_encoder": [], "multimodal": [], "qk_nope_head_dim": [], "qk_rope_head_dim": [],
        "q_lora_rank": [], "kv_lora_rank": [], "v_head_dim": [], "use_biases": [],
        "ada_rms_norm_t_cond": [], "bidirectional": [],
    },
    "hf": {
        "auto_map": [],  # code that comes with a model is never run
        "architectures": [
            ["MistralForCausalLM"], ["LlamaForCausalLM"], ["MinistralForCausalLM"],
            ["Ministral3ForCausalLM"],
        ],
        "model_type": ["mistral", "llama", "ministral", "ministral3"], "hidden_act": ["silu"],
        "partial_rotary_factor": [1], "attention_bias": [], "mlp_bias": [],
        "num_local_experts": [], "num_experts": [], "n_routed_experts": [], "kv_lora_rank": [],
        "no_rope_layers": [], "attn_logit_softcapping": [], "final_logit_softcapping": [],
        "clip_qkv": [], "use_qk_norm": [],
    },
    "gguf": {
        "general.architecture": ["llama", "mistral3"], "llama.expert_count": [],
        "split.count": [1], "llama.rope.scaling.yarn_ext_factor": [1, -1],
        "llama.rope.scaling.yarn_attn_factor": [1], "llama.rope.scaling.mscale": [1],
        "llama.attention.bidirectional": [],
    },
}  # fmt: skip
# What a GGUF file may say about a model's shape beside SETTINGS.
FIELDS = (
    "attention.value_length", "attention.sliding_window_pattern", "attention.temperature_scale",
    "attention.temperature_length", "expert_count", "expert_used_count", "rope.dimension_count",
    "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear", "rope.scaling.finetuned",
    "rope.scaling.original_context_length", "rope.scaling.attn_factor",
    "rope.scaling.yarn_log_multiplier", "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
    "rope.scaling.mscale", "rope.factors", "tensor_data_layout", "attention.causal",
    "attention.layer_norm_epsilon",
)  # fmt: skip


def spell(name: str, layout: Layout) -> str:
    """A weight's name in a layout, as `blk.3.attn_q.weight` in GGUF for `layers.3...wq.weight`."""
    if layout == "mistral":
        return name
    column, (module, kind) = COLUMN[layout], name.rsplit(".", 1)
    if not module.startswith("layers."):
        return f"{WEIGHTS[module][column]}.{kind}"
    _, index, part = module.split(".", 2)
    return f"{WEIGHTS['layers'][column]}.{index}.{WEIGHTS[part][column]}.{kind}"


def key(setting: str, layout: Layout) -> str:
    """The name of a setting in a layout."""
    return setting if layout == "mistral" else SETTINGS[setting][COLUMN[layout]]


def is_rotated(name: str) -> bool:
    """Whether a weight's rows are channels that RoPE turns: Hugging Face reorders those."""
    return ".wq." in name or ".wk." in name


def pairs_to_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Rows (heads * H, ...) in Mistral's order to Hugging Face's.

    RoPE turns channel 2i with 2i + 1 in the one, i with i + H/2 in the other.
    """
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def halves_to_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """Rows (heads * H, ...) in Hugging Face's order to Mistral's."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def read_settings(raw: Mapping[str, Any], layout: Layout, where: Path) -> ModelConfig:
    """The shape of a model from the settings in the file `where`.

    Raises:
        CheckpointError: a setting is missing, out of range, or not supported.
    """
    raw = {"mistral": _params_json, "hf": _config_json, "gguf": _gguf_fields}[layout](raw)
    for name, allowed in ONLY[layout].items():
        if raw.get(name) and raw[name] not in allowed:
            refuse(where, name, raw[name], allowed)

    def number(name: str, most: float, default: int | None = None, kind: type = int) -> Any:
        value: Any = raw.get(key(name, layout))
        value = default if value is None else value
        return read_number(value, most, where, key(name, layout), kind)

    dim, n_heads = number("dim", 2**17), number("n_heads", 2**12)
    n_layers, max_positions = number("n_layers", 2**10), number("max_position_embeddings", 2**27)
    config = ModelConfig(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=number("n_kv_heads", n_heads, default=n_heads),
        head_dim=number("head_dim", 2**12, default=dim // n_heads),
        hidden_dim=number("hidden_dim", 2**19),
        vocab_size=number("vocab_size", 2**22),
        rope_theta=float(number("rope_theta", 1e12, kind=float)),
        norm_eps=float(number("norm_eps", 1, kind=float)),
        # The first release of Mistral NeMo says 1,024,000, but it was trained for 128k.
        max_position_embeddings=131_072 if max_positions == 1_024_000 else max_positions,
        sliding_window=read_window(raw, n_layers, layout, where),
        tied_embeddings=bool(raw.get(key("tied_embeddings", layout))),
    )
    if n_heads % config.n_kv_heads or config.head_dim % 2:
        raise CheckpointError(
            f"{where}: {n_heads} query heads must be a multiple of {config.n_kv_heads} key-value "
            f"heads, and the {config.head_dim} channels of a head must be even in number"
        )
    if layout == "gguf":
        _refuse_other_fields(raw, config, where)
    scaling, far = read_scalings(raw, config, layout, where)
    return replace(config, rope_scaling=scaling, query_scaling=far)


def write_settings(config: ModelConfig, layout: Layout) -> dict[str, Any]:
    """The content of params.json, config.json or a GGUF's head that `read_settings` reads back.

    Raises:
        CheckpointError: the layout has no name for what the model computes.
    """
    values = {key(name, layout): getattr(config, name) for name in SETTINGS}
    values |= write_scalings(config, layout)
    if layout == "hf":
        name = values["model_type"].title()
        return {"architectures": [f"{name}ForCausalLM"], "hidden_act": "silu"} | values
    if layout == "gguf":
        del values["tied_embeddings"]  # the missing head says it
        values |= {"llama.attention.value_length": config.head_dim}
        values |= {"llama.rope.dimension_count": config.head_dim}
        prefix = values.get("general.architecture", "llama")
        values = {name.replace("llama", prefix, 1): value for name, value in values.items()}
    return {name: value for name, value in values.items() if value not in (None, False)}


def _params_json(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    raw = {name: value for name, value in raw.items() if value is not None}
    window = raw.get("sliding_window") or raw.get("_sliding_window")
    # Mistral's files do not say. Tekken came with 128k of context, SentencePiece with 32k.
    context = 131_072 if raw.get("vocab_size") == 131_072 else 32_768
    if isinstance(yarn := raw.get("yarn"), dict):
        factor, original = yarn.get("factor"), yarn.get("original_max_position_embeddings")
        if isinstance(factor, int | float) and isinstance(original, int) and 0 < factor < 2**16:
            context = int(factor * original)
    return {
        "max_position_embeddings": raw.get("max_seq_len") or context,
        "rope_theta": 1e4 if window else 1e6,  # as mistral-inference; the first is Mistral 7B v0.1
        **raw,
        "sliding_window": window,
        "bidirectional": raw.get("causal") is False,
    }


def _config_json(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    # Since transformers 5 one dictionary has all of RoPE; before, only its scaling.
    ropes = [raw.get(name) or {} for name in ("rope_scaling", "rope_parameters")]
    ropes = [rope if isinstance(rope, dict) else {"rope_type": rope} for rope in ropes]
    kind = raw.get("model_type")
    window = 4096 if kind in ("mistral", "ministral") else None  # the defaults of their configs
    defaults = {"rope_theta": 1e4, "rms_norm_eps": 1e-5 if kind == "ministral3" else 1e-6}
    both = {name: value for rope in ropes for name, value in rope.items() if value is not None}
    kinds = {str(rope.get("rope_type", rope.get("type"))) for rope in ropes} - {"None", "default"}
    both["rope_type"] = ", ".join(sorted(kinds)) or "default"
    kept = {name: both[name] for name in ("rope_theta", "partial_rotary_factor") if name in both}
    return defaults | {"sliding_window": window} | dict(raw) | kept | {"rope": both}


def _gguf_fields(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    if raw.get("general.architecture") == "mistral3":  # whose fields are the same
        raw = {name.replace("mistral3.", "llama.", 1): value for name, value in raw.items()}
    head_dim = raw.get("llama.rope.dimension_count")
    fields = {"llama.rope.freq_base": 1e4, "llama.attention.key_length": head_dim} | dict(raw)
    fields["llama.attention.bidirectional"] = raw.get("llama.attention.causal") is False
    # Stored as float32, where 1e-5 is 9.99999974738e-06.
    return {k: float(f"{v:.7g}") if isinstance(v, float) else v for k, v in fields.items()}


def _refuse_other_fields(raw: Mapping[str, Any], config: ModelConfig, where: Path) -> None:
    known = {f"llama.{name}" for name in FIELDS} | {gguf for _, gguf in SETTINGS.values()}
    for name, value in raw.items():
        if name.startswith("llama.") and name not in known and value:
            refuse(where, name, value, [])
    if (turned := raw.get("llama.rope.dimension_count") or config.head_dim) != config.head_dim:
        refuse(where, "llama.rope.dimension_count", turned, [config.head_dim])
