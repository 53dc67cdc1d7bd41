"""What a model needs: the arithmetic of `opennemo info`."""

from dataclasses import replace
from pathlib import Path

import pytest

from opennemo.model.memory import Needs, machine_memory
from opennemo.model.transformer import PRESETS, ModelConfig

NEMO = Needs.of(ModelConfig())


def test_mistral_nemo():
    assert NEMO.n_parameters == 12_247_782_400
    assert NEMO.weights["bf16"] == 24_495_564_800
    # The figure of NVIDIA and Mistral's card: 12 GB of FP8, head and embedding apart.
    assert NEMO.weights["fp8"] == NEMO.weights["int8"] == pytest.approx(13.6e9, rel=0.01)
    assert {kv: n * 131_072 / 2**30 for kv, n in NEMO.kv_per_token.items()} == {
        "fp32": 40, "bf16": 20, "fp8": 10,
        "int8": 10 + 10 / 32,  # a scale of four bytes for the 128 channels of a head
    }  # fmt: skip


def test_a_tied_head_counts_once():
    tied = Needs.of(replace(PRESETS["tiny"], tied_embeddings=True))
    assert Needs.of(PRESETS["tiny"]).n_parameters - tied.n_parameters == 320 * 48


@pytest.mark.parametrize("weights", ["bf16", "fp8"])
@pytest.mark.parametrize("kv", ["bf16", "fp8"])
def test_the_longest_context_is_the_last_that_fits(weights, kv):
    for memory in (10 * 2**30, 24 * 2**30, 32 * 2**30, 80 * 2**30):
        n = NEMO.max_context(memory, weights, kv)
        used = NEMO.weights[weights] + n * NEMO.kv_per_token[kv]
        if n == 0:
            assert NEMO.weights[weights] + NEMO.kv_per_token[kv] > 0.9 * memory
        else:
            assert used <= 0.9 * memory
            assert n == 131_072 or used + NEMO.kv_per_token[kv] > 0.9 * memory


def test_this_machine():
    memory = machine_memory()["cpu"]
    assert 2**28 < memory < 2**50
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        assert memory <= int(meminfo.read_text().split()[1]) * 1024
