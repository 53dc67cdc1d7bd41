"""The model that settings name."""

import pytest

from opennemo.engine import EngineConfig, LocalEngine
from opennemo.engine.sizes import fits
from opennemo.errors import InvalidRequest
from opennemo.model.checkpoint import open_checkpoint
from opennemo.model.formats import FORMATS
from opennemo.model.quantization import QuantizedLinear
from opennemo.serve.loading import load_model
from opennemo.serve.settings import read_settings


def test_weights_are_rounded_as_they_are_loaded(folder):
    with load_model(read_settings([str(folder), "--quantization", "fp8"])) as llm:
        assert isinstance(llm.engine, LocalEngine)
        modules = dict(llm.engine.runner.model.named_modules())
        layers = {n: m for n, m in modules.items() if n.endswith((".wq", ".w2"))}
        assert layers
        for layer in layers.values():
            assert isinstance(layer, QuantizedLinear) and layer.format == FORMATS["fp8"]


def test_what_does_not_fit_is_rounded_as_it_is_read_and_said(folder, monkeypatch, capsys):
    config = EngineConfig(max_context=16)
    found = fits(open_checkpoint(folder), "cpu", config)
    most = found["int8"].fixed + 2 * found["int8"].per_page
    assert most < min(found["bf16"].fixed, found["fp32"].fixed)
    memory = {"cpu": int(most / 0.9)}
    monkeypatch.setattr("opennemo.engine.sizes.available_memory", lambda: memory)
    settings = [str(folder), "--max-model-len", "16"]
    with load_model(read_settings(settings)) as llm:
        assert isinstance(llm.engine, LocalEngine)
        rounded = llm.engine.runner.model.get_submodule("layers.0.attention.wq")
        assert isinstance(rounded, QuantizedLinear) and rounded.format == FORMATS["int8"]
        assert llm.complete([1, 2, 3], max_tokens=3, ignore_eos=True).finish().ids
    assert capsys.readouterr().err.count("weights are rounded to int8 as they are read") == 1
    with pytest.raises(InvalidRequest, match=r"of weights in bf16, .* may be taken"):
        load_model(read_settings([*settings, "--format", "bf16"]))


def test_one_way_to_name_a_format(folder):
    with pytest.raises(InvalidRequest, match="exclude each other"):
        read_settings([str(folder), "--format", "int8", "--dtype", "float32"])
