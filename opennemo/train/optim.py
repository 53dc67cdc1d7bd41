"""Optimisers and the course of the learning rate, as functions of the step alone.

Matrices decay, norms do not; neither does the embedding, whose rows are rarely seen and would
shrink in between. With Muon (Jordan 2024; arXiv:2502.16982 for the size of its steps, which makes
one learning rate serve both) the matrices of blocks are its, and the rest is AdamW's.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # pydantic is only needed for reading recipes
    from opennemo.train.config import Optim


def optimizers(model: nn.Module, settings: "Optim") -> list[torch.optim.Optimizer]:
    """The optimizers for the trainable parameters of a model."""
    decayed, plain, matrices = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        in_block = name.startswith("layers.") and parameter.dim() == 2
        if in_block and settings.name == "muon":
            matrices.append(parameter)
        else:
            (decayed if in_block else plain).append(parameter)
    groups = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((decayed, settings.weight_decay), (plain, 0.0))
        if parameters
    ]
    chosen: list[torch.optim.Optimizer] = []
    if groups:
        chosen.append(
            torch.optim.AdamW(
                groups, settings.lr, betas=settings.betas, eps=settings.eps, fused=True
            )
        )
    if matrices:
        chosen.append(
            torch.optim.Muon(
                matrices, settings.lr, weight_decay=settings.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )  # fmt: skip
    return chosen


def rate(step: int, steps: int, settings: "Optim") -> float:
    """The learning rate of a step, counted from 0."""
    warmup = round(settings.warmup * steps)
    if step < warmup:
        return settings.lr * (step + 1) / (warmup + 1)
    if settings.schedule == "cosine":
        done = (step - warmup) / max(1, steps - warmup)
        share = 0.5 * (1 + math.cos(math.pi * done))
    else:
        decay = max(1, round(settings.decay * steps))
        share = min(1.0, (steps - step) / decay)
    return settings.lr * (settings.final + (1 - settings.final) * share)


def set_rate(optimizers: list[torch.optim.Optimizer], lr: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


def clip(parameters: Sequence[nn.Parameter], largest: float) -> Tensor:
    """Scale gradients down to a norm of at most `largest`, unless it is 0; gives their norm."""
    norm = nn.utils.clip_grad_norm_(parameters, largest or math.inf)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # pyright: ignore
