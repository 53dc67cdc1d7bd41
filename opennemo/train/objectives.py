"""The losses: for the next token, for answers alone, for preferences, for rewards of answers.

An objective takes a model and a batch and gives the *sum* of the losses over the batch's units
(targets, or pairs) and the sums of other metrics; the trainer divides by the units of the whole
step, so that parts of a step, and ranks, add up to what one pass would give.

The head is fused with the loss: rows without a target never go through it, and the others go in
chunks, so that memory does not grow with the vocabulary. Sources: DPO (arXiv:2305.18290), PPO
(arXiv:1707.06347), GRPO (arXiv:2402.03300), the estimate of its divergence (joschu.net, 2020).
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from opennemo.errors import InvalidRequest
from opennemo.model.lora import lora_disabled
from opennemo.model.parallel import Mesh, head_weight, share
from opennemo.model.quantization import fake_kv
from opennemo.model.transformer import Transformer
from opennemo.train.fused_losses import fused_losses
from opennemo.train.packing import IGNORED, Batch

if TYPE_CHECKING:  # pydantic is only needed for reading recipes
    from opennemo.train.config import Preference, Recipe, Reinforcement

Objective = Callable[[Transformer, Batch], tuple[Tensor, dict[str, Tensor]]]
# Rows of logits at once. At 131,072 words 512 rows in float32 are 256 MiB. PyTorch's own choice on
# a CPU is 2 rows, with which a step does not end.
CHUNK = 512


def hidden_of_targets(
    model: Transformer, batch: Batch, mesh: Mesh | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """For this rank's tokens with a target: hidden states (T', D), targets and places (T',)."""
    part = share(mesh, batch.cu_seqlens, batch.max_seqlen, batch.window)
    attend = batch.attend() if batch.parents else part.attend  # a fork is on one rank
    hidden = model(batch.tokens[part.inputs], fake_kv(model, attend))
    targets = batch.targets[part.outputs]
    wanted = targets != IGNORED
    return hidden[wanted], targets[wanted], part.outputs[wanted]


def head_losses(
    model: Transformer, hidden: Tensor, targets: Tensor, *, reduction: str = "sum"
) -> Tensor:
    """Cross-entropy of hidden states (T', D) with their targets (T',), in nats, head included."""
    weight = head_weight(model)
    if reduction == "sum" and hidden.dtype in (torch.bfloat16, torch.float16):
        # A sum in bf16 has three digits. One by one costs another pass over the head's forward.
        return head_losses(model, hidden, targets, reduction="none").float().sum()
    return fused_losses(hidden, weight, targets, reduction, CHUNK)


def next_token(
    model: Transformer, batch: Batch, mesh: Mesh | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Learn every target of the batch; of conversations those are the assistant's words alone."""
    hidden, targets, _ = hidden_of_targets(model, batch, mesh)
    return head_losses(model, hidden, targets), {}


def sequence_log_probs(model: Transformer, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probability (A,) of each answer's targets, and how many those are (A,)."""
    hidden, targets, places = hidden_of_targets(model, batch)
    losses = head_losses(model, hidden, targets, reduction="none")
    sequence = torch.searchsorted(batch.cu_seqlens[1:].long(), places, right=True)
    zeros = losses.new_zeros(len(batch.cu_seqlens) - 1)
    sums = zeros.index_add(0, sequence, -losses)
    counts = zeros.index_add(0, sequence, torch.ones_like(losses))
    return sums[batch.answers], counts[batch.answers]


def preference(
    model: Transformer, batch: Batch, settings: "Preference"
) -> tuple[Tensor, dict[str, Tensor]]:
    """Direct preference optimisation and its kin: answers come in pairs, the chosen one first."""
    assert batch.reference is not None
    log_probs, counts = sequence_log_probs(model, batch)
    gains = log_probs - batch.reference  # which is zero without a reference model
    if settings.length_normalized or not settings.has_reference:
        gains = gains / counts
    chosen, rejected = gains.view(-1, 2).unbind(-1)
    beta, margin = settings.beta, settings.beta * (chosen - rejected)
    smoothing = settings.label_smoothing
    if settings.loss == "ipo":
        losses = (chosen - rejected - 1 / (2 * beta)) ** 2
    elif settings.loss == "apo-zero":
        losses = 1 - (beta * chosen).sigmoid() + (beta * rejected).sigmoid()
    elif settings.loss == "orpo":  # of odds, beside the chosen answer's own loss
        odds = gains - torch.log(-torch.expm1(gains))
        losses = -beta * F.logsigmoid(odds[::2] - odds[1::2]) - chosen
    else:
        ahead = margin - settings.margin
        losses = -(1 - smoothing) * F.logsigmoid(ahead) - smoothing * F.logsigmoid(-ahead)
    if settings.sft:
        losses = losses - settings.sft * log_probs[::2] / counts[::2]
    metrics = {
        "accuracy": (margin > 0).sum(),
        "margin": margin.detach().sum(),
        "chosen_reward": beta * chosen.detach().sum(),
        "rejected_reward": beta * rejected.detach().sum(),
    }
    return losses.sum(), metrics


def reinforce(
    model: Transformer,
    batch: Batch,
    settings: "Reinforcement",
    reference: Transformer | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Make drawn answers likelier by their gains, as far as an update may change a token.

    `reference` is the model before training; without one, this model without its adapter, or
    with the adapter that training started from.
    """
    assert batch.drawn is not None and batch.gains is not None
    hidden, targets, _ = hidden_of_targets(model, batch)
    log_probs = -head_losses(model, hidden, targets, reduction="none").float()
    change = log_probs - batch.drawn
    ratio = change.exp()
    clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    losses = -torch.minimum(ratio * batch.gains, clipped * batch.gains)
    metrics = {
        "clipped": (ratio * batch.gains > clipped * batch.gains).sum(),
        "change": change.detach().abs().sum(),
    }
    if settings.kl:
        with torch.no_grad(), nullcontext() if reference else lora_disabled(model):
            first = reference or model
            hidden, targets, _ = hidden_of_targets(first, batch)
            before = -head_losses(first, hidden, targets, reduction="none").float()
        ahead = before - log_probs
        divergence = ahead.exp() - ahead - 1
        losses = losses + settings.kl * divergence
        metrics["kl"] = divergence.detach().sum()
    return losses.sum(), metrics


def distil(
    model: Transformer, batch: Batch, teacher: Transformer, *, reverse: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Learn another model's probabilities: KL(teacher || model) at every target (1503.02531).

    With `reverse` KL(model || teacher), which suits targets that the model drew (2306.13649).
    """
    hidden, targets, places = hidden_of_targets(model, batch)
    with torch.no_grad():
        wanted = teacher(batch.tokens, batch.attend())[places]
        losses = head_losses(model, hidden.detach(), targets)

    def divergence(hidden: Tensor, weight: Tensor, wanted: Tensor) -> Tensor:
        ours = F.linear(hidden, weight).float().log_softmax(-1)
        aim = F.linear(wanted, teacher.output.weight).float().log_softmax(-1)
        pair = (aim, ours) if reverse else (ours, aim)
        return F.kl_div(*pair, reduction="sum", log_target=True)

    weight = head_weight(model)
    parts = [
        checkpoint(divergence, h, weight, w, use_reentrant=False)
        for h, w in zip(hidden.split(CHUNK), wanted.split(CHUNK), strict=True)
    ]
    return torch.stack(parts).sum(), {"cross_entropy": losses}


def objective(
    recipe: "Recipe", teacher: Transformer | None = None, mesh: Mesh | None = None
) -> Objective:
    """The objective that a recipe names; `teacher` is a model to learn from, or to stay close to.

    Raises:
        InvalidRequest: it needs whole sequences, and the mesh divides them.
    """
    name = recipe.objective
    if name in ("text", "chat"):
        return partial(next_token, mesh=mesh)
    if mesh is not None and mesh.context.size() * mesh.tensor.size() > 1:
        raise InvalidRequest(
            f"objective {name} goes with data_parallel alone, not with context_parallel or "
            "tensor_parallel"
        )
    if name == "preference":
        return partial(preference, settings=recipe.preference)
    if name == "rl":
        return partial(reinforce, settings=recipe.rl, reference=teacher)
    assert teacher is not None
    return partial(distil, teacher=teacher, reverse=recipe.distil.on_policy)
