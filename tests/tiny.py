"""Tiny models in NeMo's shape (heads * head_dim is not the width) whose answers are written down.

Attention and feed-forward add nothing, so the last token's embedding alone decides: the head maps
it to the token that a chain says follows. The vocabulary is one token a byte.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from opennemo.tokenizer.saving import save_huggingface
from opennemo.tokenizer.tekken import SINGLE_BYTES, Tekken

BYTES = Tekken(r"[\s\S]", [*SINGLE_BYTES, b"zq"], n_special=64)
DIM, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, LAYERS = 64, 4, 2, 32, 128, 2
SHAPES = {
    "self_attn.q_proj": (HEADS * HEAD_DIM, DIM), "self_attn.k_proj": (KV_HEADS * HEAD_DIM, DIM),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, DIM), "self_attn.o_proj": (DIM, HEADS * HEAD_DIM),
    "mlp.gate_proj": (HIDDEN, DIM), "mlp.up_proj": (HIDDEN, DIM), "mlp.down_proj": (DIM, HIDDEN),
}  # fmt: skip
LINEAR = [f"model.layers.{i}.{name}.weight" for i in range(LAYERS) for name in SHAPES]


def chain(ids: Iterable[int], after: int) -> list[tuple[int, int]]:
    """Pairs of token and next token: after one of them, these."""
    ids = list(ids)
    return list(zip([after, *ids[:-1]], ids, strict=True))


def weights(
    vocab: int, pairs: Iterable[tuple[int, int]] | None = None, std: float = 0.3
) -> dict[str, Tensor]:
    """Under Hugging Face's names; without pairs, all random."""
    generator = torch.Generator().manual_seed(0)
    embedding, head = (torch.randn(vocab, DIM, generator=generator) for _ in range(2))
    head *= 0.02
    for token, following in pairs or ():
        head[following] += embedding[token]
    tensors = {"model.embed_tokens": embedding, "model.norm": torch.ones(DIM), "lm_head": head}
    for i in range(LAYERS):
        for name, shape in SHAPES.items():
            silent = pairs is not None and name.endswith(("o_proj", "down_proj"))
            weight = torch.randn(shape, generator=generator) * (0 if silent else std)
            tensors[f"model.layers.{i}.{name}"] = weight
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}"] = torch.ones(DIM)
    return {f"{name}.weight": tensor for name, tensor in tensors.items()}


def settings(vocab: int, **more: Any) -> dict[str, Any]:
    """The content of config.json."""
    return {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": DIM,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "head_dim": HEAD_DIM,
        "num_key_value_heads": KV_HEADS, "intermediate_size": HIDDEN, "vocab_size": vocab,
        "rms_norm_eps": 1e-5, "rope_theta": 1e6, "hidden_act": "silu", "sliding_window": None,
        "max_position_embeddings": 1024, "tie_word_embeddings": False, "torch_dtype": "float32",
        "bos_token_id": 1, "eos_token_id": 2, **more,
    }  # fmt: skip


def write(
    folder: Path, tensors: Mapping[str, Tensor], vocab: int | None = None, **more: Any
) -> Path:
    """A folder in Hugging Face's layout, without a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", {"format": "pt"})
    if vocab is None:
        vocab = len(tensors["model.embed_tokens.weight"])
    (folder / "config.json").write_text(json.dumps(settings(vocab, **more)))
    return folder


def write_tokenizer(
    folder: Path, added: Mapping[str, bool], template: str | None = None, **config: Any
) -> dict[str, int]:
    """The vocabulary with tokens added behind it, special or not: their ids."""
    folder.mkdir(parents=True, exist_ok=True)
    save_huggingface(BYTES, folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    ids = {name: BYTES.vocab_size + i for i, name in enumerate(added)}
    for name, special in added.items():
        entry = {"id": ids[name], "content": name, "special": special}
        spec["added_tokens"].append({**spec["added_tokens"][0], **entry})
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"chat_template": template} | config
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return ids
