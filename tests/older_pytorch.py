"""PyTorch as it was in 2.11: what is newer is taken away, for whoever imports this first.

    python -m pytest -p tests.older_pytorch tests/model/test_attention.py

What is newer was found by reading 2.11, 2.12, 2.13 and 2.14: docs/dependencies.md lists it.
"""

import sys
from typing import Any

import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import varlen

assert "opennemo" not in sys.modules, "it has chosen already"

if hasattr(F, "linear_cross_entropy"):
    del F.linear_cross_entropy, nn.LinearCrossEntropyOptions
if hasattr(funcol, "all_gather_single_autograd"):
    funcol.all_gather_tensor_autograd = funcol.all_gather_single_autograd
    del funcol.all_gather_single_autograd

_newer: Any = varlen.varlen_attn


def varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor,
    max_q: int, max_k: int, *, return_aux: Any = None, scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Any:  # fmt: skip
    """Neither pages nor key heads that queries share."""
    assert query.shape[1:] == key.shape[1:] == value.shape[1:]
    return _newer(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, return_aux=return_aux, scale=scale,
        window_size=window_size,
    )  # fmt: skip


varlen.varlen_attn = varlen_attn
