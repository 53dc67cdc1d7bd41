"""Losses equal what they are defined to be, whatever is packed with them."""

import math
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from opennemo.model.attention import Packed
from opennemo.model.formats import FORMATS
from opennemo.model.quantization import prepare_qat_
from opennemo.model.transformer import PRESETS, Transformer
from opennemo.train import fused_losses, objectives
from opennemo.train.config import Optim, Preference
from opennemo.train.conversations import Example, Pair, n_shared
from opennemo.train.objectives import distil, next_token, preference, sequence_log_probs
from opennemo.train.optim import optimizers, rate
from opennemo.train.packing import (
    IGNORED,
    Batch,
    ExampleRows,
    collate,
    first_fit,
    fork,
    pack,
    step_rows,
)


def model(seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(PRESETS["tiny"])


def example(length: int, seed: int) -> Example:
    rng = np.random.default_rng(seed)
    mask = rng.random(length) < 0.6
    mask[0], mask[-1] = False, True
    return Example(rng.integers(0, 320, length).astype(np.uint32), mask)


EXAMPLES = [example(length, seed) for seed, length in enumerate([17, 5, 40, 23, 9, 31])]


def plain_loss(net: Transformer, e: Example) -> torch.Tensor:
    """Summed over the ids of the mask, from whole logits of the example alone."""
    ids = torch.from_numpy(e.ids.astype(np.int64))
    logits = net.output(net(ids, Packed.of(len(ids))))[:-1]
    losses = F.cross_entropy(logits, ids[1:], reduction="none")
    return losses[torch.from_numpy(e.mask[1:])].sum()


def batch_of(rows: ExampleRows, references: np.ndarray | None = None) -> Batch:
    return collate([rows[i] for i in range(len(rows))], None, references)


@pytest.mark.parametrize("chunk", [7, 512])
def test_packed_and_chunked_is_separate_and_whole(chunk, monkeypatch):
    monkeypatch.setattr(objectives, "CHUNK", chunk)
    net = model()
    batch = batch_of(ExampleRows(EXAMPLES, 64, seed=1))
    loss, _ = next_token(net, batch)
    loss.backward()
    found = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    expected = torch.stack([plain_loss(net, e) for e in EXAMPLES]).sum()
    expected.backward()
    assert batch.n_units == sum(int(e.mask[1:].sum()) for e in EXAMPLES)
    torch.testing.assert_close(loss, expected)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-4)


def test_a_sum_of_losses_in_bf16_is_not_rounded_to_three_digits():
    net = model().bfloat16()
    torch.manual_seed(0)
    hidden, targets = torch.randn(700, 48).bfloat16(), torch.randint(0, 320, (700,))
    found = objectives.head_losses(net, hidden, targets)
    wanted = F.cross_entropy(net.output(hidden).float(), targets, reduction="sum")
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(wanted), rel=3e-4)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="PyTorch before 2.13")
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_losses_in_chunks_are_pytorchs(reduction: str):
    torch.manual_seed(0)
    found = []
    hidden, weight, targets = torch.randn(50, 16), torch.randn(90, 16), torch.randint(90, (50,))
    for losses in (fused_losses.by_pytorch, fused_losses.by_chunks):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        loss = losses(leaves[0], leaves[1], targets, reduction, 7)
        found.append([loss.detach(), *torch.autograd.grad(loss.sum(), leaves)])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_preferences_are_those_of_the_paper():
    net, reference = model(), model(1)
    pairs = [Pair(EXAMPLES[i], EXAMPLES[i + 1]) for i in (0, 2, 4)]
    rows = ExampleRows(pairs, 64, seed=1)
    with torch.no_grad():
        policy, before = (
            torch.tensor([[-plain_loss(m, p.chosen), -plain_loss(m, p.rejected)] for p in pairs])
            for m in (net, reference)
        )
    margin = 0.3 * ((policy - before)[:, 0] - (policy - before)[:, 1])
    expected = -0.9 * margin.sigmoid().log() - 0.1 * (-margin).sigmoid().log()
    n_chosen = torch.tensor([float(p.chosen.mask[1:].sum()) for p in pairs])
    expected = expected - 0.5 * policy[:, 0] / n_chosen
    settings = Preference(beta=0.3, label_smoothing=0.1, sft=0.5)
    batch = batch_of(rows, before.numpy())
    loss, metrics = preference(net, batch, settings)
    torch.testing.assert_close(loss, expected.sum(), rtol=1e-4, atol=1e-4)
    assert batch.n_units == 3 and int(metrics["accuracy"]) == int((margin > 0).sum())
    lengths = torch.tensor([[p.chosen.mask[1:].sum(), p.rejected.mask[1:].sum()] for p in pairs])
    per_token = (policy - before) / lengths
    loss, _ = preference(net, batch, Preference(beta=0.3, length_normalized=True))
    expected = -(0.3 * (per_token[:, 0] - per_token[:, 1])).sigmoid().log().sum()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


def test_the_other_losses_of_preferences_are_those_of_their_papers():
    net = model()
    pairs = [Pair(EXAMPLES[i], EXAMPLES[i + 1]) for i in (0, 2, 4)]
    with torch.no_grad():
        policy = torch.tensor([[-plain_loss(net, e) for e in vars(p).values()] for p in pairs])
    lengths = torch.tensor([[e.mask[1:].sum() for e in vars(p).values()] for p in pairs])
    before = policy + torch.tensor([[0.5, -0.5], [-1.0, 2.0], [0.0, 0.3]])
    ahead = (policy - before).diff(dim=-1)[:, 0].neg()
    mean, chosen = policy / lengths, (policy / lengths)[:, 0]
    odds = mean - (1 - mean.exp()).log()
    expected = {
        "ipo": (ahead - 1 / 0.6).square(),
        "apo-zero": 1 - (0.3 * (policy - before)[:, 0]).sigmoid()
        + (0.3 * (policy - before)[:, 1]).sigmoid(),
        "simpo": -(0.3 * (mean[:, 0] - mean[:, 1]) - 0.2).sigmoid().log(),
        "orpo": -chosen - 0.3 * (odds[:, 0] - odds[:, 1]).sigmoid().log(),
    }  # fmt: skip
    rows = ExampleRows(pairs, 64, seed=1)
    for loss, losses in expected.items():
        settings = Preference(loss=cast(Any, loss), beta=0.3, margin=0.2 * (loss == "simpo"))
        reference = before.numpy() if settings.has_reference else np.zeros((3, 2), np.float32)
        found, _ = preference(net, batch_of(rows, reference), settings)
        torch.testing.assert_close(found, losses.sum(), rtol=1e-4, atol=1e-4, msg=loss)
    with pytest.raises(ValueError, match=r"preference.margin: not of orpo, of dpo and simpo"):
        Preference(loss="orpo", margin=1.0)


def branches(n_prompt: int, lengths: list[int], seed: int) -> list[Example]:
    """Answers to one prompt."""
    rng = np.random.default_rng(seed)
    prompt = rng.integers(0, 320, n_prompt)
    answers = [rng.integers(0, 320, length) for length in lengths]
    mask = [np.arange(n_prompt + length) >= n_prompt for length in lengths]
    ids = [np.concatenate((prompt, answer)).astype(np.uint32) for answer in answers]
    return [Example(*both) for both in zip(ids, mask, strict=True)]


@pytest.mark.parametrize("format", [None, "fp8"])
def test_answers_that_share_their_prompt_learn_as_separate_ones(format):
    """Pairs as they are packed, and with the prompt once for each answer: loss and gradients."""
    net = model()
    if format:
        prepare_qat_(net, FORMATS[format], kv=True)
        cast(Any, net.kv_rounding).largest.fill_(3.0)
    pairs = [Pair(*branches(n, lengths, n)) for n, lengths in ((30, [5, 9]), (12, [1, 3]))]
    sides = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    settings, reference = Preference(beta=0.3, sft=0.5), np.array([[-9.0, -8.0], [-4.0, -5.0]])
    row = ExampleRows(pairs, 64, seed=1)[0]
    assert len(row.ids) == sum(len(e.ids) for e in sides) - 29 - 11
    forked = collate([row], None, reference)
    rows = [pack([[side]]) for n in row.units for side in sides[2 * n : 2 * n + 2]]
    separate = collate([rows[0]._replace(units=row.units), *rows[1:]], None, reference)
    assert not separate.parents and separate.n_units == forked.n_units == 2
    found = []
    for batch in (forked, separate):
        loss, _ = preference(net, batch, settings)
        net.zero_grad()
        loss.backward()
        found.append(
            (loss.detach(), {n: cast(Any, p.grad).clone() for n, p in net.named_parameters()})
        )
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("a", "b", "shared"),
    [
        ([1, 2, 3, 4, 5], [1, 2, 3, 6], 2),  # what is learned begins at the fourth
        ([1, 2, 3, 4, 5], [1, 9, 3, 4], 1),
        ([7, 2, 3, 4, 5], [1, 2, 3, 4], 0),
    ],
)
def test_what_is_shared_ends_before_what_is_learned(a, b, shared):
    both = [Example(np.array(x, np.uint32), np.arange(len(x)) >= 3) for x in (a, b)]
    assert n_shared(both) == shared and n_shared(both[:1]) == 0
    learned = [x[x != IGNORED].tolist() for x in fork(both)[1]]
    assert [x for x in learned if x] == [a[3:], b[3:]]


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    net, batch = model(), batch_of(ExampleRows(EXAMPLES, 64, seed=1))
    loss, metrics = distil(net, batch, model())
    assert float(loss) == pytest.approx(0, abs=1e-4)
    torch.testing.assert_close(metrics["cross_entropy"], next_token(net, batch)[0].detach())
    with torch.no_grad():
        found, expected = [], []
        for e in EXAMPLES:
            ids = torch.from_numpy(e.ids.astype(np.int64))
            p, q = (
                m.output(m(ids, Packed.of(len(ids))))[:-1].log_softmax(-1) for m in (model(1), net)
            )
            expected.append((p.exp() * (p - q)).sum(-1)[torch.from_numpy(e.mask[1:])].sum())
    found, _ = distil(net, batch, model(1))
    torch.testing.assert_close(found, torch.stack(expected).sum(), rtol=1e-4, atol=1e-4)
    assert sequence_log_probs(net, batch)[1].sum() == batch.n_units


@given(st.lists(st.integers(1, 50), min_size=1, max_size=80), st.integers(0, 9))
def test_rows_hold_every_unit_once_and_never_too_much(sizes, seed):
    order = np.random.default_rng(seed).permutation(len(sizes))
    rows = first_fit(np.array(sizes), order, 50)
    assert sorted(unit for row in rows for unit in row) == list(range(len(sizes)))
    room = [50 - sum(sizes[unit] for unit in row) for row in rows]
    assert min(room) >= 0
    # First fit never leaves two rows that could have been one.
    assert sum(50 - left < 26 for left in room) <= 1


@given(st.integers(0, 5), st.integers(1, 4), st.integers(1, 3))
def test_ranks_share_the_rows_of_a_step(step, world, share):
    rows = [row for rank in range(world) for row in step_rows(step, world * share, rank, world)]
    assert rows == list(range(step * world * share, (step + 1) * world * share))


def test_an_epoch_shows_every_example_once_in_a_new_order():
    rows = ExampleRows(EXAMPLES, 45, seed=3)
    epochs = [[tuple(rows[e * len(rows) + i].units) for i in range(len(rows))] for e in range(4)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    row = rows[0]
    assert (row.targets[np.cumsum(row.lengths) - 1] == IGNORED).all()


def test_the_rate_warms_up_stays_and_decays():
    wsd = Optim(lr=1.0, warmup=0.1, decay=0.2, final=0.1)
    course = [rate(step, 100, wsd) for step in range(100)]
    assert course[0] == pytest.approx(1 / 11) and course[10:80] == [1.0] * 70
    assert course[90] == pytest.approx(0.55) and min(course[10:]) == course[99]
    cosine = [rate(s, 100, Optim(lr=1.0, schedule="cosine", warmup=0.0)) for s in range(100)]
    assert cosine[0] == 1.0 and cosine[50] == pytest.approx(0.5)
    assert all(math.isfinite(x) and x > 0 for x in cosine)


def test_muon_takes_the_matrices_of_blocks_and_norms_do_not_decay():
    adamw, muon = optimizers(model(), Optim(name="muon"))
    assert all(p.dim() == 2 for group in muon.param_groups for p in group["params"])
    assert sum(len(g["params"]) for g in muon.param_groups) == 14
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.0]
