"""The memory that models need and that is there: arithmetic, compared with what loading takes."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from opennemo.model.checkpoint import open_checkpoint, save
from opennemo.model.memory import (
    Needs,
    automatic,
    available_memory,
    forms,
    kv_bytes,
    machine_memory,
)
from opennemo.model.transformer import PRESETS, ModelConfig, Transformer
from tests.hollow import write_hollow


@pytest.fixture(scope="module")
def nemo(tmp_path_factory):
    return open_checkpoint(write_hollow(tmp_path_factory.mktemp("nemo") / "12b", ModelConfig()))


def test_mistral_nemo(nemo):
    made = forms(nemo, "cpu")
    needs = {name: Needs.of(nemo, form) for name, form in made.items()}
    assert [*made][:2] == ["bf16", "fp32"]
    assert automatic(made, "cpu") == ["bf16", "int8", "q4_k", "int4"]
    assert "q4_k" not in forms(nemo, "cuda")  # nothing there multiplies blocks
    assert needs["bf16"].weights == 24_495_564_800
    assert automatic(forms(nemo, "cpu", ranks=True), "cpu")[:2] == ["fp32", "bf16"]
    # Embedding in 16 bits, head in 8.
    tables = 131_072 * 5120 * 3
    assert needs["int8"].weights - tables == pytest.approx(10.9e9, rel=0.01)
    assert needs["fp8"].weights == needs["int8"].weights
    assert needs["int4"].weights - tables == pytest.approx(10.9e9 * 5 / 8, rel=0.01)
    assert needs["q4_k"].weights - tables == pytest.approx(10.9e9 * 4.625 / 8, rel=0.01)
    assert needs["int8"].read == pytest.approx(needs["int8"].weights - 131_072 * 5120 * 2, rel=1e-6)
    kv = {name: kv_bytes(nemo.config, name) * 131_072 / 2**30 for name in ("fp32", "bf16", "int8")}
    # int8: and a scale of four bytes for the 128 channels of a head
    assert kv == {"fp32": 40, "bf16": 20, "int8": 10 + 10 / 32}


def test_a_tied_head_is_packed_beside_the_embedding_on_a_cpu(tmp_path):
    config = replace(PRESETS["tiny"], tied_embeddings=True)
    checkpoint = open_checkpoint(write_hollow(tmp_path / "tied", config))
    form, table = forms(checkpoint, "cpu")["bf16"], 2 * 320 * 48
    of_gpu = Needs.of(checkpoint, form, "cuda").weights
    assert of_gpu == 2 * sum(map(math.prod, checkpoint.shapes.values()))
    assert Needs.of(checkpoint, form, "cpu").weights == of_gpu + table


MEASURE = """
import sys
from pathlib import Path
from opennemo.engine import EngineConfig, LocalEngine
from opennemo.model.checkpoint import load, open_checkpoint
from opennemo.model.memory import Needs, forms

def status(key):
    text = Path("/proc/self/status").read_text()
    return int(text.split(key + ":")[1].split()[0]) * 1024

tiny, model, name = sys.argv[1:]
config = EngineConfig(n_pages=4)
def open_(folder):
    checkpoint = open_checkpoint(Path(folder))
    made = forms(checkpoint, "cpu")
    form = made.get(name, made["int8"])  # the tiny one is too narrow for blocks
    return LocalEngine(load(checkpoint, form=form), [], config), Needs.of(checkpoint, form)
open_(tiny)  # imports, threads and the kernel count for neither
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
engine, needs = open_(model)
print(status("VmHWM") - before, status("VmRSS") - before, needs.weights, needs.loading)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["bf16", "int8", "q4_k", "int4", "fp32"])
def test_loading_takes_the_result_and_little_more(name, tmp_path):
    """Two layers in NeMo's proportions, a quarter as wide: 80 MB in bf16."""
    shape = ModelConfig(
        dim=1280, n_layers=2, n_heads=8, n_kv_heads=2, hidden_dim=3584, vocab_size=2048
    )
    for folder, config in (("tiny", PRESETS["tiny"]), ("model", shape)):
        save(Transformer(config).to(torch.bfloat16), tmp_path / folder)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "tiny", tmp_path / "model", name],
        capture_output=True, text=True, check=True,
        # Or glibc keeps freed blocks of up to 32 MB, by what was freed before.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"},
    )  # fmt: skip
    peak, after, weights, loading = map(int, done.stdout.split())
    slack = 8 * 2**20  # what rounding takes at a time, whatever the model
    assert weights - slack < after < weights + slack
    assert peak < weights + loading + slack


def test_this_machine():
    memory, available = machine_memory()["cpu"], available_memory()["cpu"]
    assert 2**26 < available <= memory and 2**28 < memory < 2**50
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        assert memory <= int(meminfo.read_text().split()[1]) * 1024
