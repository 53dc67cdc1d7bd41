"""A model of which each rank computes a share of every layer, for serving.

A rank's share is a model like any other, with fewer heads and a narrower feed-forward; only two of
its layers know about the other ranks: the outputs of `wo` and `w2` are summed over all of them. So
attention, the KV cache and the steps that compute them are those of one rank. The head is divided
by words, and logits are gathered; each rank has the whole embedding and norms.

Training divides a model in place, with gradients and optimizer states in mind (parallel.py); here
a rank reads only its share from the files. Megatron-LM's division (arXiv:1909.08053).
"""

import math
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from opennemo.errors import InvalidRequest
from opennemo.model.checkpoint import Checkpoint, empty_model
from opennemo.model.quantization import replace_module
from opennemo.model.transformer import ModelConfig, Transformer

DIVIDED = ("n_heads", "n_kv_heads", "hidden_dim", "vocab_size")
# Which dimension of a weight is divided: its outputs, or what it sums over.
DIM = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1}


class Summed(nn.Linear):
    """A linear layer of which each rank has some of the inputs; outputs are summed."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight)
        dist.all_reduce(out)
        return out


class Gathered(nn.Linear):
    """A linear layer of which each rank has some of the outputs, as many as the others."""

    def forward(self, x: Tensor) -> Tensor:
        part = F.linear(x, self.weight)
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
        if part.numel():
            dist.all_gather(parts, part)
        return torch.cat(parts, -1)


def check_divides(config: ModelConfig, n_ranks: int) -> None:
    """Raises: InvalidRequest, heads, channels or words cannot be shared evenly; says which can."""
    common = math.gcd(*(getattr(config, name) for name in DIVIDED))
    if common % n_ranks:
        sizes = ", ".join(f"{name} {getattr(config, name):,}" for name in DIVIDED)
        allowed = ", ".join(str(n) for n in range(1, min(common, 64) + 1) if common % n == 0)
        raise InvalidRequest(
            f"tensor_parallel_size is {n_ranks}, allowed for this model are {allowed} ({sizes})"
        )


def load_share(
    checkpoint: Checkpoint, rank: int, n_ranks: int, *, device: str, dtype: torch.dtype | None
) -> Transformer:
    """This rank's share of a model, read weight by weight; the process group is the default one.

    Raises:
        InvalidRequest: it does not divide, or is stored in codes.
    """
    config = checkpoint.config
    check_divides(config, n_ranks)
    if checkpoint.format is not None:
        raise InvalidRequest(
            f"tensor_parallel_size is {n_ranks}, allowed is 1 for a model that is stored in codes "
            f"({checkpoint.format})"
        )
    own = replace(
        config,
        n_heads=config.n_heads // n_ranks,
        n_kv_heads=config.n_kv_heads // n_ranks,
        hidden_dim=config.hidden_dim // n_ranks,
    )
    model = empty_model(own)
    for name in checkpoint.shapes:
        module, _, kind = name.rpartition(".")
        weight = checkpoint.read(name, dtype or checkpoint.dtype)
        dim = DIM.get(module.rpartition(".")[2])
        if dim is not None:
            weight = weight.chunk(n_ranks, dim)[rank].contiguous()
        setattr(model.get_submodule(module), kind, nn.Parameter(weight.to(device)))
    if config.tied_embeddings:
        rows = model.tok_embeddings.weight.chunk(n_ranks)[rank]
        model.output.weight = nn.Parameter(rows.detach())
    for block in range(config.n_layers):
        for path in (f"layers.{block}.attention.wo", f"layers.{block}.feed_forward.w2"):
            _become(model, path, Summed)
    _become(model, "output", Gathered)
    return model.requires_grad_(False)


def _become(model: Transformer, path: str, kind: type[nn.Linear]) -> None:
    weight = model.get_submodule(path).get_parameter("weight")
    with torch.device("meta"):
        linear = kind(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    replace_module(model, path, linear)
