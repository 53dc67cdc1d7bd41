"""Merges of several models equal their plain definitions, stream, and refuse what does not fit."""

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opennemo.errors import CheckpointError, InvalidRequest
from opennemo.model import merge_models as merging
from opennemo.model.checkpoint import convert, load, open_checkpoint, save
from opennemo.model.export import quantize, to_gguf
from opennemo.model.merge_models import Mixing, merge_models
from opennemo.model.transformer import ModelConfig, Transformer
from opennemo.tokenizer import load_tokenizer
from opennemo.tokenizer.tekken import SINGLE_BYTES, Tekken
from tests.model.test_gguf_writer import CONFIG, add_vocabulary

TINY = replace(CONFIG, dim=64, hidden_dim=96, head_dim=32, vocab_size=1032, sliding_window=None)


def make(folder: Path, seed: int, config: ModelConfig = TINY, **how) -> Path:
    """A model that is near those of other seeds, as fine-tunes are, with NeMo's first tokens."""
    torch.manual_seed(7)
    model = Transformer(config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    save(model, folder, **how)
    return add_vocabulary(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [make(folder / name, seed) for seed, name in enumerate(("base", "a", "b", "c"))]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch):
    """So that every matrix is computed in several parts, the last of which is short."""
    monkeypatch.setattr(merging, "ROWS", 1000)


def weights_of(path: Path) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in load(path).named_parameters()}


def plain_linear(given: list[Tensor], base: Tensor, weights: list[float]) -> Tensor:
    return torch.stack([w * x for w, x in zip(weights, given, strict=True)]).sum(0) / sum(weights)


def plain_slerp(given: list[Tensor], base: Tensor, t: float) -> Tensor:
    one, other = (x.double().flatten() for x in given)
    angle = torch.acos(torch.cosine_similarity(one, other, dim=0))
    first, second = torch.sin((1 - t) * angle), torch.sin(t * angle)
    return ((first * one + second * other) / torch.sin(angle)).view_as(given[0]).float()


def plain_ties(given: list[Tensor], base: Tensor, weights: list[float], keep: list[float]):
    """Algorithm 1 of arXiv:2306.01708: trim, elect signs, merge what agrees, disjointly."""
    changes = []
    for model, weight, density in zip(given, weights, keep, strict=True):
        change = (model - base).flatten()
        kept = change.abs().argsort(descending=True, stable=True)[: int(density * len(change))]
        trimmed = torch.zeros_like(change)
        trimmed[kept] = change[kept]
        changes.append(weight * trimmed)
    stacked = torch.stack(changes)
    sign = torch.where(stacked.sum(0) < 0, -1, 1)
    agrees = stacked.sign() == sign
    total = (torch.tensor(weights)[:, None] * agrees).sum(0)
    mean = (stacked * agrees).sum(0) / torch.where(total == 0, 1, total)
    return base + mean.view_as(base)


WEIGHTS, DENSITIES = [0.5, 0.3, 0.9], [0.2, 0.5, 0.35]
CASES = [
    (Mixing(method="linear", weights=(0.5, 0.3, 0.9)), 3, plain_linear, [WEIGHTS]),
    (Mixing(method="linear"), 3, plain_linear, [[1.0, 1.0, 1.0]]),
    (Mixing(method="slerp", t=0.3), 2, plain_slerp, [0.3]),
    (
        Mixing(method="ties", weights=tuple(WEIGHTS), densities=tuple(DENSITIES)), 3,
        plain_ties, [WEIGHTS, DENSITIES],
    ),
    (
        Mixing(method="dare", weights=(0.4, 0.7)), 2,
        lambda given, base: base + 0.4 * (given[0] - base) + 0.7 * (given[1] - base), [],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("mixing", "n", "definition", "numbers"), CASES)
def test_every_weight_is_what_the_definition_gives(
    mixing, n, definition, numbers, models: list[Path], tmp_path: Path
):
    base, *given = models
    based = mixing.method in merging.ON_A_BASE
    merge_models(given[:n], tmp_path / "out", mixing, base=base if based else None)
    result, of_base = weights_of(tmp_path / "out"), weights_of(base)
    of_given = [weights_of(path) for path in given[:n]]
    for name, weight in result.items():
        expected = definition([w[name] for w in of_given], of_base[name], *numbers)
        torch.testing.assert_close(weight, expected, atol=1e-6, rtol=1e-5, msg=name)


def test_equal_changes_are_kept_in_order_and_parallel_models_are_a_line():
    base, change = torch.zeros(2500), torch.ones(2500)
    ties = Mixing(method="ties", weights=(1.0,), densities=(0.5,)).for_models(1)
    assert merging.merged(ties, "w", [change], base).nonzero().flatten().tolist() == [*range(1250)]
    slerp = Mixing(method="slerp", t=0.25).for_models(2)
    one, other = torch.ones(2500), torch.ones(2500) * 3
    assert torch.allclose(merging.merged(slerp, "w", [one, other], None), torch.tensor(1.5))
    nothing = merging.merged(slerp, "w", [torch.zeros(5), torch.ones(5)], None)
    assert nothing.isfinite().all()


def test_dare_keeps_a_share_scaled_up_and_the_same_with_the_same_seed(
    models: list[Path], tmp_path: Path
):
    base, one, *_ = models
    results = []
    for name, seed in (("x", 5), ("y", 5), ("z", 6)):
        mixing = Mixing(method="dare", weights=(1.0,), densities=(0.3,), seed=seed)
        merge_models([one], tmp_path / name, mixing, base=base)
        results.append(weights_of(tmp_path / name))
    n_kept = n = 0
    of_base, of_one = weights_of(base), weights_of(one)
    for name, weight in results[0].items():
        assert torch.equal(weight, results[1][name])
        change = of_one[name] - of_base[name]
        kept = (weight != of_base[name]) & (change != 0)
        expected = torch.where(kept, of_base[name] + change / 0.3, of_base[name])
        torch.testing.assert_close(weight, expected, atol=1e-6, rtol=1e-4)
        n_kept, n = n_kept + int(kept.sum()), n + kept.numel()
    assert abs(n_kept / n - 0.3) < 4 * math.sqrt(0.3 * 0.7 / n)
    assert any(not torch.equal(results[0][name], results[2][name]) for name in results[0])


@pytest.mark.parametrize("to", ["hf", "mistral", "gguf"])
def test_every_layout_in_and_out(to, models: list[Path], tmp_path: Path):
    _, a, b, _ = models
    convert(b, tmp_path / "mistral", to="mistral")
    to_gguf(a, tmp_path / "a.gguf")
    merge_models([a, b], tmp_path / "plain", Mixing(method="linear", weights=(0.25, 0.75)))
    out = tmp_path / ("out.gguf" if to == "gguf" else "out")
    done: list[tuple[float, float]] = []
    merge_models(
        [tmp_path / "a.gguf", tmp_path / "mistral"], out, to=to, dtype=torch.float32,
        mixing=Mixing(method="linear", weights=(0.25, 0.75)),
        progress=lambda n, total: done.append((n, total)),
    )  # fmt: skip
    expected = weights_of(tmp_path / "plain")
    for name, weight in weights_of(out).items():
        torch.testing.assert_close(weight, expected[name], msg=name)
    assert open_checkpoint(out).layout == to and done[-1][0] == done[-1][1] > 0
    text = "The quick brown fox"
    assert load_tokenizer(out).encode(text) == load_tokenizer(a).encode(text)


def test_the_result_has_the_type_and_the_companions_of_the_base_or_the_first(
    models: list[Path], tmp_path: Path
):
    base, a, b, _ = models
    convert(base, tmp_path / "half", to="hf", dtype=torch.bfloat16)
    said: list[str] = []
    ties = Mixing(method="ties", weights=(0.5, 9.0, 0.5), densities=(0.5, 0.1, 0.4))
    given = [a, tmp_path / "half", b]  # mergekit's users list the base among the models
    merge_models(given, tmp_path / "out", ties, base=tmp_path / "half", say=said.append)
    assert open_checkpoint(tmp_path / "out").dtype == torch.bfloat16 and said == []
    alone = Mixing(method="ties", weights=(0.5, 0.5), densities=(0.5, 0.4))
    merge_models([a, b], tmp_path / "again", alone, base=tmp_path / "half")
    bytes_of = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("out", "again")]
    assert len({hashlib.sha256(content).digest() for content in bytes_of}) == 1

    template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    chats = make(tmp_path / "chats", 9)
    (chats / "chat_template.jinja").write_text(template)
    linear = Mixing(method="linear")
    merge_models([a, chats], tmp_path / "plain", linear, say=said.append)
    assert not (tmp_path / "plain" / "chat_template.jinja").exists()
    assert len(said) == 1 and "chat template" in said[0] and str(chats) in said[0]
    merge_models([a, chats], tmp_path / "taken", linear, companions=chats)
    assert (tmp_path / "taken" / "chat_template.jinja").read_text() == template


def test_the_card_says_how_it_was_made(models: list[Path], tmp_path: Path):
    base, a, b, _ = models
    mixing = Mixing(method="dare", weights=(0.6, 0.4), densities=(0.5,), seed=3)
    merge_models([a, b], tmp_path / "out", mixing, base=base)
    card = (tmp_path / "out" / "README.md").read_text()
    how = json.loads(card.partition("```json")[2].partition("```")[0])
    assert how == {
        "merge_method": "dare_linear", "base_model": "base", "random_seed": 3,
        "dtype": "float32", "tokenizer_source": "base", "parameters": {"normalize": False},
        "models": [
            {"model": "a", "parameters": {"weight": 0.6, "density": 0.5}},
            {"model": "b", "parameters": {"weight": 0.4, "density": 0.5}},
        ],
    }  # fmt: skip
    assert "- merge" in card and "base_model:" in card


@pytest.mark.parametrize(
    ("mixing", "n", "message"),
    [
        (Mixing(method="slerp"), 3, "slerp merges two models, and there are 3"),
        (Mixing(method="linear"), 1, "and there are 1"),
        (Mixing(method="linear", weights=(1, 2, 3)), 2, "weights are 3 numbers"),
        (Mixing(method="linear", weights=(1, -1)), 2, "add up to 0"),
        (Mixing(method="linear", weights=(1, math.nan)), 2, "a weight is nan"),
        (
            Mixing(method="linear", densities=(0.5,)),
            2,
            "densities does not belong to linear, but to ties and dare",
        ),
        (Mixing(method="linear", t=0.4), 2, "t does not belong to linear, but to slerp"),
        (Mixing(method="linear", seed=1), 2, "seed does not belong to linear, but to dare"),
        (Mixing(method="slerp", normalize=True), 2, "normalize does not belong to slerp"),
        (Mixing(method="slerp", weights=(0.5,)), 2, "weights do not belong to slerp"),
        (Mixing(method="slerp", t=1.5), 2, "t is 1.5"),
        (Mixing(method="ties"), 2, "ties needs the base"),
        (Mixing(method="nearswap"), 2, "allowed are linear, slerp, ties, dare"),  # type: ignore
    ],
)
def test_settings_that_make_no_sense(mixing, n, message, models: list[Path], tmp_path: Path):
    with pytest.raises(InvalidRequest, match=message):
        merge_models(models[1 : n + 1], tmp_path / "out", mixing)
    assert not (tmp_path / "out").exists()


def test_a_density_of_none_and_a_base_of_linear_are_refused(models: list[Path], tmp_path: Path):
    base, a, b, _ = models
    with pytest.raises(InvalidRequest, match="a density is 0, allowed is more than 0"):
        ties = Mixing(method="ties", densities=(0.0,))
        merge_models([a, b], tmp_path / "out", ties, base=base)
    with pytest.raises(InvalidRequest, match="linear has no base"):
        merge_models([a, b], tmp_path / "out", Mixing(method="linear"), base=base)


def test_models_that_do_not_fit_are_named(models: list[Path], tmp_path: Path):
    _, a, *_ = models
    linear = Mixing(method="linear")
    wide = make(tmp_path / "wide", 3, replace(TINY, vocab_size=1040))
    tied = make(tmp_path / "tied", 3, replace(TINY, tied_embeddings=True))
    far = make(tmp_path / "far", 3, replace(TINY, rope_theta=1e6))
    quantize(a, tmp_path / "int8", format="int8")
    other = make(tmp_path / "other", 3)
    Tekken(r"[\s\S]", [*SINGLE_BYTES, b"zq"], n_special=32).save(other / "tekken.json")
    for path, message in (
        (wide, r"tok_embeddings.weight is \(1040, 64\), not \(1032, 64\); output.weight is"),
        (tied, r"output.weight is missing, not \(1032, 64\)"),
        (far, "rope_theta is 1000000.0, not 500000.0"),
        (tmp_path / "int8", "stored as int8"),
        (other, "vocabulary is another one: id"),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            merge_models([a, path], tmp_path / "out", linear)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    longer = make(tmp_path / "longer", 3, replace(TINY, max_position_embeddings=2048))
    merge_models([a, longer], tmp_path / "fine", linear)
