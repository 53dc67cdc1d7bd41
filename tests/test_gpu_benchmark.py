"""What benchmarks/gpu.py measures, at toy size: the same model twice, and the right roofline."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from opennemo.model.checkpoint import empty_model
from opennemo.model.formats import FORMATS
from opennemo.model.quantization import quantize_
from opennemo.model.torch_step import TorchStep
from opennemo.model.transformer import PRESETS

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)  # as when it is run
        return importlib.import_module(SCRIPT.stem)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_without_a_gpu_it_says_so_and_ends_well():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout == "benchmarks/gpu.py needs an NVIDIA GPU; this machine has none\n"


@pytest.mark.parametrize("format", ["bf16", "fp8"])
def test_every_case_can_be_computed(gpu: ModuleType, format: str):
    config = PRESETS["tiny"]
    net = gpu.random_model(config, "cpu")
    if format == "fp8":
        quantize_(net, FORMATS["fp8"])
    for case in gpu.CASES:
        small = case._replace(
            sequences=min(case.sequences, 3),
            context=min(case.context, 9),
            tokens=min(case.tokens, 9),
        )
        logits = TorchStep(net)(*gpu.inputs_of(small, config, "cpu"))
        assert logits.shape == (small.sequences, config.vocab_size)
        assert logits.isfinite().all()


def test_the_peer_runs_on_the_same_weights(gpu: ModuleType):
    config = PRESETS["tiny"]
    net = gpu.random_model(config, "cpu")
    peer = gpu.transformers(net)
    assert peer.lm_head.weight.data_ptr() == net.output.weight.data_ptr()
    assert peer.config._attn_implementation == "sdpa"
    assert all(tensor.device.type == "cpu" for tensor in (*peer.parameters(), *peer.buffers()))
    for case in gpu.CASES:
        small = case._replace(
            sequences=min(case.sequences, 3),
            context=min(case.context, 9),
            tokens=min(case.tokens, 9),
        )
        run = gpu.peer_step(peer, small, config)
        first = run()
        assert first.shape == (small.sequences, 1, config.vocab_size)
        assert torch.equal(first, run())  # the cache is as long as before


def test_the_roofline_of_a_12b(gpu: ModuleType):
    """Decoding one sequence reads each weight but the embedding once; a prompt computes."""
    net = empty_model(PRESETS["mistral-nemo-12b"]).bfloat16()
    card = gpu.Card(1e12, {"bf16": 1e15, "fp8": 2e15})
    decode, prefill = gpu.CASES[0], gpu.CASES[4]
    weights = 2 * (12_247_782_400 - 131_072 * 5_120)
    kv = 2 * 2 * 40 * 8 * 128 * 1024
    assert gpu.roofline(net, decode, "bf16", card) == pytest.approx((weights + kv) / 1e12)
    blocks = 2 * (12_247_782_400 - 2 * 131_072 * 5_120) * 2048
    attention = 4 * 40 * 32 * 128 * 2048 * 2049 / 2
    expected = (blocks + attention + 2 * 131_072 * 5_120) / 1e15
    assert gpu.roofline(net, prefill, "bf16", card) == pytest.approx(expected, rel=1e-4)
