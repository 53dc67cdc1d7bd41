"""Filters of whole rows: what their definitions say, written plainly, and what they never do."""

import random
from typing import Any

import pytest
import torch

from opennemo.engine.filters import narrow_, penalise_repeats_
from opennemo.engine.params import SamplingParams

torch.manual_seed(0)
ROWS = [torch.randn(200) * scale for scale in (0.1, 1.0, 5.0)]
ROWS += [row.masked_fill(torch.arange(200) % 3 > 0, -torch.inf) for row in ROWS]


def kept(row: torch.Tensor, chance: float = 1.0, **params: Any) -> set[int]:
    narrowed = row.clone()
    narrow_(narrowed, SamplingParams(**params), chance)
    left = narrowed.isfinite().nonzero().flatten().tolist()
    assert left and torch.equal(narrowed[left], row[left])
    return set(left)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("p", [0.05, 0.5, 0.95])
def test_typical_is_that_of_transformers(row: torch.Tensor, p: float):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs = transformers.TypicalLogitsWarper(mass=p)(torch.zeros(1, 1), row[None].clone())[0]
    wanted = {i for i, x in enumerate(theirs.tolist()) if x > -float("inf")}
    assert kept(row, typical_p=p) == wanted


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("n", [0.5, 1.0, 3.0])
def test_top_n_sigma(row: torch.Tensor, n: float):
    values = [x for x in row.tolist() if x > -float("inf")]
    mean = sum(values) / len(values)
    sigma = (sum((x - mean) ** 2 for x in values) / len(values)) ** 0.5
    border = max(values) - n * sigma
    assert kept(row, top_n_sigma=n) == {i for i, x in enumerate(row.tolist()) if x >= border}


def test_xtc_drops_the_likely_but_for_the_least_likely_of_them():
    row = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]).log()
    drop = {"xtc_probability": 0.5, "xtc_threshold": 0.12}
    assert kept(row, 0.49, **drop) == {2, 3, 4}
    assert kept(row, 0.5, **drop) == {0, 1, 2, 3, 4}
    assert kept(row, 0.0, xtc_probability=1.0, xtc_threshold=0.35) == {0, 1, 2, 3, 4}
    assert kept(row, 0.99, xtc_probability=1.0, xtc_threshold=0.0) == {4}


def dry(tokens: list[int], params: SamplingParams, n_tokens: int) -> list[float]:
    """The definition: try every earlier position in the text, one token at a time."""
    said = tokens[-params.dry_window :] if params.dry_window else tokens
    longest = dict.fromkeys(range(n_tokens), 0)
    for end in range(len(said) - 1):
        n = 0
        while (
            n <= end and said[end - n] == said[-1 - n] and said[-1 - n] not in params.dry_breakers
        ):
            n += 1
        longest[said[end + 1]] = max(longest[said[end + 1]], n)
    allowed = params.dry_allowed_length
    return [
        params.dry_multiplier * params.dry_base ** (n - allowed)
        if n and n >= allowed and token not in params.dry_breakers
        else 0.0
        for token, n in longest.items()
    ]


@pytest.mark.parametrize("breakers", [frozenset(), frozenset({3})])
@pytest.mark.parametrize("window", [0, 20])
def test_dry_is_its_definition(breakers: frozenset[int], window: int):
    chance = random.Random(1)
    params = SamplingParams(
        dry_multiplier=0.8, dry_base=1.3, dry_allowed_length=2, dry_window=window,
        dry_breakers=breakers,
    )  # fmt: skip
    assert params.penalises
    for n in (0, 1, 2, 3, 10, 50):
        for _ in range(20):
            tokens = [chance.randrange(5) for _ in range(n)]
            row = torch.zeros(5)
            penalise_repeats_(row, params, tokens)
            torch.testing.assert_close(row, -torch.tensor(dry(tokens, params, 5)))


def test_dry_of_an_endless_repetition_is_finite():
    row = torch.zeros(2)
    penalise_repeats_(row, SamplingParams(dry_multiplier=100, dry_base=100), [0] * 5000)
    assert row[0] < -1e8 and row.isfinite().all()


def test_typical_of_a_large_row_keeps_the_nearest_by_its_definition():
    """Where counting by upper bits leaves some to sort."""
    row = torch.randn(20_000, generator=torch.Generator().manual_seed(2)).double() * 2
    probs = row.softmax(-1)
    distances = (-probs.log() - (-probs * probs.log()).sum()).abs()
    order = distances.argsort()
    for p in (0.01, 0.3, 0.9):
        n = int((probs[order].cumsum(-1) < p).sum()) + 1
        assert kept(row.float(), typical_p=p) ^ {*order[:n].tolist()} <= {
            *order[n - 2 : n + 2].tolist()
        }
