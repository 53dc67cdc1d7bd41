"""A model's step, tokens to logits: native on a CPU, fused on a GPU, or as PyTorch defines it.

`compile_step` gives a function of (tokens, attend, rows); the choice affects only speed.
"""

import importlib.util
import warnings
from typing import Protocol

import torch
from torch import Tensor

from opennemo.kernels.cpu import CompilerMissing
from opennemo.model.attention import Paged
from opennemo.model.cpu_step import NativeStep, has_kernels
from opennemo.model.torch_step import TorchStep
from opennemo.model.transformer import Transformer


class Step(Protocol):
    """tokens (T,), whose keys and values go where `attend` says -> logits (R, V) of `rows` (R,)."""

    def __call__(self, tokens: Tensor, attend: Paged, rows: Tensor) -> Tensor: ...


def compile_step(
    model: Transformer,
    n_threads: int | None = None,
    release: bool = False,
    kv_format: str = "fp32",
) -> Step:
    """The fastest step for this model; without a C++ compiler or Triton, PyTorch's.

    A warning says so. On a GPU no sequence may use the last page of the KV cache.

    `kv_format` is that of the pages. `n_threads`, of a CPU, defaults to PyTorch's. With `release`
    the model's own matrices are emptied as they are packed, so that memory holds them once; PyTorch
    cannot run the model then.
    """
    device = model.norm.weight.device.type
    if device == "cuda" and importlib.util.find_spec("triton"):
        from opennemo.model.gpu_step import GpuStep  # imports Triton: seconds that a CPU saves

        return GpuStep(model)
    if device == "cuda":
        warnings.warn("Triton is missing; the model runs in PyTorch, much slower", stacklevel=2)
    if device != "cpu" or not has_kernels(model, kv_format):
        return TorchStep(model)
    try:
        return NativeStep(model, n_threads or torch.get_num_threads(), release=release)
    except CompilerMissing as error:
        warnings.warn(f"{error}; the model runs in PyTorch, several times slower", stacklevel=2)
        return TorchStep(model)
