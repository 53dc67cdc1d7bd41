"""What fits: the form of weights and the KV cache, by settings, the model and memory."""

from copy import deepcopy

import pytest
import torch

from opennemo.engine import EngineConfig, LocalEngine, SamplingParams
from opennemo.engine.sizes import announcement, fit
from opennemo.errors import InvalidRequest
from opennemo.model.checkpoint import open_checkpoint
from opennemo.model.transformer import ModelConfig
from tests.engine.stepping import answers, prompts
from tests.hollow import write_hollow

EOS = 7


def test_a_cache_in_fp8_asks_for_scales(model):
    with pytest.raises(InvalidRequest, match="needs the scales of keys and values"):
        LocalEngine(model, [], EngineConfig(kv_format="fp8"))
    with pytest.raises(InvalidRequest, match="'int5'; allowed: fp32"):
        LocalEngine(model, [], EngineConfig(kv_format="int5"))
    own = LocalEngine(deepcopy(model), [], kv_scale=torch.full((2, 2), 2.0**-7))
    given = LocalEngine(deepcopy(model), [], EngineConfig(kv_format="fp8", kv_scale=2**-7))
    params, texts = SamplingParams(max_tokens=12), prompts(6)
    assert own.runner.pages.format == "fp8"
    assert answers(own, texts, params) == answers(given, texts, params)


def test_a_context_that_does_not_fit_into_memory_is_shortened(model, monkeypatch):
    page = 2 * 2 * 16 * 2 * 16 * 4  # bytes: k and v, layers, tokens, heads, channels, float32
    weights = sum(p.nbytes for p in model.parameters())
    memory = {"cpu": int((weights + 5.5 * page) / 0.9)}
    monkeypatch.setattr("opennemo.engine.sizes.available_memory", lambda: memory)
    engine = LocalEngine(deepcopy(model), [])
    assert (engine.cache.n_pages, engine.max_context) == (5, 80)


def fit_in(folder, gib, monkeypatch, format="auto", **settings):
    memory = {"cpu": int(gib * 2**30)}
    monkeypatch.setattr("opennemo.engine.sizes.available_memory", lambda: memory)
    checkpoint, config = open_checkpoint(folder), EngineConfig(**settings)
    chosen = fit(checkpoint, "cpu", config, format)
    return chosen, announcement(checkpoint, config, chosen, format)


def test_more_context_than_the_model_has_is_refused(nemo, monkeypatch):
    with pytest.raises(InvalidRequest, match="200,000 tokens: the model has 131,072"):
        fit_in(nemo, 64, monkeypatch, max_context=200_000)


@pytest.fixture(scope="module")
def nemo(tmp_path_factory):
    """Mistral NeMo's 24.5 GB, which are not there."""
    return write_hollow(tmp_path_factory.mktemp("nemo") / "12b", ModelConfig())


@pytest.mark.parametrize(
    ("gib", "name", "context"),
    [(64, "bf16", 131_072), (28, "bf16", 18_000), (24, "int8", 100_000), (16, "int8", 18_000)],
)
def test_what_does_not_fit_is_rounded_and_what_is_given_up_is_said(
    nemo, gib, name, context, monkeypatch
):
    chosen, said = fit_in(nemo, gib, monkeypatch)
    assert (chosen.name, chosen.kv_format) == (name, "int8")
    assert 0.7 * context <= chosen.context <= min(1.4 * context, 131_072)
    cache = chosen.context * 2 * 40 * 8 * (128 + 4)
    assert chosen.needs.weights + cache < chosen.room == int(0.9 * gib * 2**30)
    assert ("rounded to int8" in said) == (name == "int8")
    assert (f"{chosen.context:,} tokens instead of 131,072" in said) == (chosen.context < 131_072)


def test_four_bits_are_the_last_that_is_tried(nemo, monkeypatch):
    chosen, said = fit_in(nemo, 12, monkeypatch)
    assert chosen.name == "q4_k" and "rounded to q4_k" in said
    with pytest.raises(InvalidRequest, match=r"needed .* of weights in q4_k.*no format of it fits"):
        fit_in(nemo, 8, monkeypatch)


def test_a_context_that_is_asked_for_is_given_or_refused(nemo, monkeypatch):
    chosen, said = fit_in(nemo, 16, monkeypatch, max_context=8192)
    assert (chosen.name, chosen.context) == ("int8", 8192) and "instead" not in said
    # Four bits leave room for what eight do not.
    assert fit_in(nemo, 16, monkeypatch, max_context=40_000)[0].name == "q4_k"
    with pytest.raises(InvalidRequest, match=r"for 131,072 tokens.*--format q4_k with [\d,]+ tok"):
        fit_in(nemo, 16, monkeypatch, max_context=131_072)
    with pytest.raises(InvalidRequest, match=r"weights in bf16.*what fits: --format int8"):
        fit_in(nemo, 16, monkeypatch, "bf16")
    with pytest.raises(InvalidRequest, match="'int5': allowed are auto, bf16"):
        fit_in(nemo, 16, monkeypatch, "int5")


def test_formats_that_are_named_are_taken(nemo, monkeypatch):
    for name in ("fp8", "int4", "q4_k", "bf16"):
        assert fit_in(nemo, 64, monkeypatch, name)[0].name == name
    assert fit_in(nemo, 64, monkeypatch, kv_format="bf16")[0].kv_format == "bf16"


def test_a_step_has_more_tokens_on_a_gpu_unless_it_is_said():
    assert [EngineConfig().step_tokens(device) for device in ("cpu", "cuda")] == [512, 2048]
    asked = EngineConfig(max_batched_tokens=7)
    assert [asked.step_tokens(device) for device in ("cpu", "cuda")] == [7, 7]
