import pytest
import torch

from opennemo.model.transformer import PRESETS, Transformer


def tiny_model() -> Transformer:
    """A tiny random model whose greedy answers differ from prompt to prompt."""
    torch.manual_seed(0)
    model = Transformer(PRESETS["tiny"]).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.mul_(3)  # sharper choices than at initialisation
    return model


@pytest.fixture
def model() -> Transformer:
    return tiny_model()
