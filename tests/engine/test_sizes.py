"""The size of the KV cache: what settings, the model and memory say."""

from copy import deepcopy

import pytest
import torch

from opennemo.engine import EngineConfig, LocalEngine, SamplingParams
from opennemo.errors import InvalidRequest
from tests.engine.stepping import answers, prompts

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
