"""What a model needs and what fits: arithmetic over its shape, before anything is loaded.

Weights are counted as they are stored: the matrices of the blocks in the format, embedding, head
and norms in bf16 if those are codes. The KV cache takes 2 * L * K * H numbers a token.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from opennemo.model.checkpoint import weight_shapes
from opennemo.model.formats import FORMATS, Format, names
from opennemo.model.pages import rounding_of
from opennemo.model.transformer import ModelConfig

# Leaves room for activations, the logits of a step, and PyTorch itself.
USABLE = 0.9


@dataclass(frozen=True, kw_only=True)
class Needs:
    """The memory that a model needs, in bytes, by format."""

    config: ModelConfig
    n_parameters: int
    weights: dict[str, int]
    kv_per_token: dict[str, int]

    @classmethod
    def of(cls, config: ModelConfig) -> "Needs":
        """Without loading it."""
        shapes = weight_shapes(config)
        n_parameters = sum(map(math.prod, shapes.values()))
        matrices = [s for name, s in shapes.items() if "layers." in name and len(s) == 2]
        rest, heads = n_parameters - sum(map(math.prod, matrices)), 2 * config.n_layers
        heads *= config.n_kv_heads

        def weights(format: Format) -> int:
            number = 2 if format.in_codes else format.weights.dtype.itemsize
            return number * rest + sum(format.nbytes(*shape) for shape in matrices)

        return cls(
            config=config,
            n_parameters=n_parameters,
            weights={name: weights(FORMATS[name]) for name in names("load")},
            kv_per_token={
                name: round(heads * rounding_of(name).row_bytes(config.head_dim))
                for name in names("cache")
            },
        )

    def max_context(self, memory: int, weights: str, kv: str) -> int:
        """Tokens of context that `memory` bytes have room for beside the weights, 0 if for none."""
        room = int(USABLE * memory) - self.weights[weights]
        return max(0, min(room // self.kv_per_token[kv], self.config.max_position_embeddings))


def machine_memory() -> dict[str, int]:
    """Bytes of memory by device: "cpu", what a container may use of it, and each "cuda:N"."""
    memory = {"cpu": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")}
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        memory["cpu"] = min(memory["cpu"], int(text))
    for i in range(torch.cuda.device_count()):
        memory[f"cuda:{i}"] = torch.cuda.get_device_properties(i).total_memory
    return memory
