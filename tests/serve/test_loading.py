"""The model that settings name."""

from opennemo.engine import LocalEngine
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
