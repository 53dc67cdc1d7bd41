"""The decoder: a stack of pre-norm blocks of grouped-query attention and SwiGLU.

The model sees one flat run of tokens, never a padded batch. The `attend` argument decides which
tokens may see which (attention.py): in training it separates packed documents, in serving it reads
and writes the paged KV cache. So this file is the same for both, and knows nothing about caches,
masks, number formats, adapters or devices.

Shapes are written as letters throughout the package:

    T  tokens in this forward pass, over all sequences      S  sequences
    D  dim, width of the residual stream                    F  hidden_dim, width of the SwiGLU
    N  n_heads, query heads                                 K  n_kv_heads, key and value heads
    H  head_dim (N * H need not equal D: 32 * 128 < 5120)   L  n_layers
    V  vocab_size                                           P  pages of the KV cache

Sources: Llama 2 (arXiv:2307.09288) for the block, GQA (arXiv:2305.13245), RoPE (arXiv:2104.09864),
Mistral 7B (arXiv:2310.06825) for the sliding window, and the model card of Mistral NeMo. Names are
those of Mistral's own weights, so that official files load unmapped.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opennemo.model.positions import (
    QueryScaling,
    RopeScaling,
    Window,
    frequencies,
    query_scale,
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a model: `params.json` field for field. The defaults are Mistral NeMo 12B."""

    dim: int = 5120
    n_layers: int = 40
    n_heads: int = 32
    n_kv_heads: int = 8
    head_dim: int = 128
    # The model card prints 14,436; the weights have 14,336.
    hidden_dim: int = 14336
    vocab_size: int = 131072
    rope_theta: float = 1e6
    norm_eps: float = 1e-5
    max_position_embeddings: int = 131072  # longest context the model was trained for, in tokens
    sliding_window: Window = None
    tied_embeddings: bool = False  # the output head is the transposed embedding
    rope_scaling: RopeScaling | None = None
    query_scaling: QueryScaling | None = None


class Attend(Protocol):
    """Softmax attention over whatever context each token has; the one seam of the model."""

    positions: Tensor  # (T,) place of each token in its own sequence

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (T, N, H), k and v (T, K, H) -> (T, N, H)."""
        ...


class Transformer(nn.Module):
    """tokens (T,) -> hidden states (T, D); `output` turns the wanted rows into logits."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied_embeddings:
            self.output.weight = self.tok_embeddings.weight

    def forward(self, tokens: Tensor, attend: Attend) -> Tensor:
        """tokens (T,) -> hidden states (T, D), normed and ready for `output`.

        The head is left to the caller: at V = 131,072 a full logits tensor outweighs the model's
        activations, and neither training (which fuses it into the loss) nor prefill (which needs
        only each prompt's last token) ever wants it whole.
        """
        rope = rotary(attend.positions, self.config)
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x, rope, attend)
        return self.norm(x)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.attention = Attention(config, index)
        self.feed_forward = FeedForward(config)
        self.attention_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = nn.RMSNorm(config.dim, config.norm_eps)

    def forward(self, x: Tensor, rope: Tensor, attend: Attend) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, attend)
        return x + self.feed_forward(self.ffn_norm(x))


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.index, self.head_dim = index, config.head_dim
        q_width, kv_width = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.wq = nn.Linear(config.dim, q_width, bias=False)
        self.wk = nn.Linear(config.dim, kv_width, bias=False)
        self.wv = nn.Linear(config.dim, kv_width, bias=False)
        self.wo = nn.Linear(q_width, config.dim, bias=False)

    def forward(self, x: Tensor, rope: Tensor, attend: Attend) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        out = attend(self.index, rotate(q, rope[:, :1]), rotate(k, rope[:, -1:]), v)
        return self.wo(out.flatten(-2))


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)  # gate
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)  # down
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)  # up

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def rotary(positions: Tensor, config: ModelConfig) -> Tensor:
    """The rotations of queries and keys: positions (T,) -> (T, 1, H/2, 2), cosine, sine, float32.

    Where queries are scaled by position it is (T, 2, H/2, 2): theirs first, then that of keys.

    Angles are multiplied out in float64: at position 131,072 a float32 angle is off by up to
    0.016 radians, which is the difference between neighbouring tokens of the slow channels.
    """
    scaling = config.rope_scaling
    turns = frequencies(config.head_dim, config.rope_theta, scaling, positions.device)
    angles = positions.double()[:, None] * turns  # (T, H/2)
    rope = torch.stack((angles.cos(), angles.sin()), dim=-1)[:, None]
    rope = rope * scaling.gain if scaling else rope
    if config.query_scaling:
        scale = query_scale(positions, config.query_scaling)
        rope = torch.cat((rope * scale[..., None], rope), 1)
    return rope.float()


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn each neighbouring pair of channels of x (T, heads, H) by its angle.

    Mistral's weights pair neighbours (2i, 2i+1); Hugging Face's pair halves (i, i+H/2) and
    permute wq and wk to match, which checkpoint.py undoes on loading.
    """
    real, imag = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope.unbind(-1)
    turned = torch.stack((real * cos - imag * sin, real * sin + imag * cos), dim=-1)
    return turned.flatten(-2).type_as(x)


PRESETS = {
    "mistral-nemo-12b": ModelConfig(),
    "mistral-7b": ModelConfig(
        dim=4096, n_layers=32, vocab_size=32768, max_position_embeddings=32768
    ),
    # The same family in small; head_dim stands apart from dim / n_heads here as well.
    "nano-60m": ModelConfig(
        dim=512, n_layers=12, n_heads=8, n_kv_heads=2, head_dim=48, hidden_dim=1792,
        vocab_size=32768, max_position_embeddings=4096, tied_embeddings=True,
    ),
    "tiny": ModelConfig(
        dim=48, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, hidden_dim=96,
        vocab_size=320, max_position_embeddings=256,
    ),
}  # fmt: skip
