"""What the engine draws with is what the trainer computes."""

import numpy as np
import pytest
import torch

from opennemo.model.attention import Packed
from opennemo.model.formats import by_name
from opennemo.model.lora import add_lora_
from opennemo.model.quantization import observers, prepare_qat_, quantize_, set_qat_
from opennemo.model.transformer import ModelConfig, Transformer
from opennemo.rollouts import Rollouts, served
from opennemo.train.conversations import Example
from opennemo.train.objectives import head_losses, hidden_of_targets
from opennemo.train.packing import collate, pack
from opennemo.train.practice import Drawn
from opennemo.train.setup import initialise_
from tests.train.conftest import BYTES

SHAPE = ModelConfig(
    dim=256, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=64, hidden_dim=512, vocab_size=320,
    max_position_embeddings=256,
)  # fmt: skip
PROMPTS = [[1, *range(70, 90)], [1, 100, 101], [1, *range(64, 110)]]
# What the model learns as, and whether by an adapter ("codes": over such weights).
CASES = [
    ("fp32", None), ("int8", None), ("fp8", None), ("int4", None), ("q4_k", None),
    ("fp8-static", None), ("fp32", "adapter"), ("int8", "adapter"), ("int8", "codes"),
]  # fmt: skip


def learner(format: str, lora: str | None) -> Transformer:
    """A model with random weights, larger than at first, so that its answers are not uniform."""
    model = initialise_(Transformer(SHAPE), 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 3 if parameter.dim() == 2 else 1
    if lora == "codes":
        quantize_(model, by_name(format))
    elif format != "fp32":
        prepare_qat_(model, by_name(format), kv=format == "fp8-static")
    if lora:
        generator = torch.Generator().manual_seed(1)
        add_lora_(model, rank=4, alpha=8.0, generator=generator)
        for name, parameter in model.named_parameters():
            if name.endswith("low_rank.b"):
                parameter.data.normal_(0, 0.05, generator=generator)
    if format == "fp8-static":
        with torch.no_grad():  # it sees its inputs once; then scales stay
            model.train()(torch.arange(320), Packed.of(320))
            observers(model)["kv_rounding.largest"].fill_(6.0)
            set_qat_(model, observe=False)
    return model


def draw(model: Transformer, n: int = 3, max_tokens: int = 20, **more) -> list[list[Drawn]]:
    return Rollouts(BYTES)(model, PROMPTS, n=n, max_tokens=max_tokens, seeds=range(3), **more)


def computed(model: Transformer, answers: list[list[int]]) -> list[torch.Tensor]:
    """Log-probabilities in training of answers to the prompts, which have as many each."""
    found = []
    for i, answer in enumerate(answers):
        prompt = PROMPTS[i * len(PROMPTS) // len(answers)]
        ids = np.array([*prompt, *answer], np.uint32)
        batch = collate([pack([[Example(ids, np.arange(len(ids)) >= len(prompt))]])], None)
        with torch.no_grad():
            hidden, targets, _ = hidden_of_targets(model.train(), batch)
            found.append(-head_losses(model, hidden, targets, reduction="none"))
    return found


@pytest.mark.parametrize(("format", "lora"), CASES)
def test_the_engine_finds_the_log_probabilities_that_the_trainer_finds(format, lora):
    """But for the order of additions.

    That decides to which side a number is rounded that lies on the border of two codes, and what
    follows then differs by a step of the format. It does so within the trainer as well, if its
    embeddings change by a millionth: so much is allowed where inputs are rounded.
    """
    model = learner(format, lora)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    drawn = [answer for group in draw(model) for answer in group]
    # The model is as it was.
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    ours = computed(model, [d.ids for d in drawn])
    gaps = [(a - torch.tensor(d.log_probs)).abs() for a, d in zip(ours, drawn, strict=True)]
    assert sum(map(len, gaps)) > 60 and len({tuple(d.ids) for d in drawn}) == 9
    largest, exact = max(float(g.max()) for g in gaps), [g for g in gaps if g.max() < 1e-5]
    if by_name(format).inputs is None:
        assert largest < 1e-4
    else:
        torch.manual_seed(0)
        weight, noise = model.tok_embeddings.weight, 0.0
        kept = weight.detach().clone()
        for _ in range(5):  # by as much as sums in another order do; one may meet no border
            with torch.no_grad():
                weight[:] = kept * (1 + 1e-6 * torch.randn(kept.shape).sign())
            changed = computed(model, [d.ids for d in drawn])
            gaps = [float((a - b).abs().max()) for a, b in zip(ours, changed, strict=True)]
            noise = max(noise, *gaps)
        assert exact and largest < max(1e-4, 5 * noise, 0.1 * (format == "fp8-static"))


def test_answers_follow_from_their_seeds_and_end_where_they_are_to():
    model = learner("fp32", None)
    one, other = draw(model, n=18), draw(model, n=18)  # more than one request may have
    assert one == other and [len(group) for group in one] == [18] * 3
    assert len({tuple(d.ids) for d in one[0]}) > 16
    greedy = draw(model, n=2, greedy=True)
    assert all(group[0] == group[1] for group in greedy)
    with torch.no_grad():
        model.output.weight[:] = 0  # each id is as likely as any other
    found = draw(model, n=16, max_tokens=200)
    ended = [d for group in found for d in group if d.whole]
    assert ended and all(d.ids[-1] == BYTES.eos_id for d in ended)
    assert all(len(d.ids) == 200 for group in found for d in group if not d.whole)
    assert all(BYTES.eos_id not in d.ids[:-1] for group in found for d in group)


def test_what_is_served_shares_weights_and_holds_codes_where_it_learns_in_them():
    model = learner("fp32", None)
    made, adapter = served(model)
    assert adapter is None
    for (name, a), b in zip(model.named_parameters(), made.parameters(), strict=True):
        assert a.data_ptr() == b.data_ptr(), name
    made, _ = served(learner("int8", "adapter"))
    codes = dict(made.named_buffers())["layers.0.attention.wq.weight"]
    assert codes.dtype == torch.int8
    _, adapter = served(learner("int8", "codes"))
    assert adapter is not None and len(adapter.weights) == 7 * SHAPE.n_layers
