"""A model's step as PyTorch computes it: the definition that the fast steps are tested against."""

import torch
from torch import Tensor

from opennemo.model.attention import Paged
from opennemo.model.transformer import Transformer


class TorchStep:
    """tokens (T,), whose keys and values go where `attend` says -> logits (R, V) of `rows` (R,)."""

    def __init__(self, model: Transformer):
        self.model = model

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, attend: Paged, rows: Tensor) -> Tensor:
        return self.model.output(self.model(tokens, attend)[rows]).float()
