"""`opennemo convert`, `quantize` and `merge` between folders and GGUF files."""

from pathlib import Path

import pytest
import torch

from opennemo.model.checkpoint import load, open_checkpoint
from opennemo.model.gguf import GGUF
from opennemo.model.lora import add_lora_, save_adapter
from tests.cli.conftest import opennemo
from tests.model.test_gguf_writer import make


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("cli") / "model")


def test_a_folder_becomes_a_file_and_a_folder_again(model: Path, tmp_path: Path):
    file, folder = tmp_path / "model.gguf", tmp_path / "again"
    for args in ([model, file, "--dtype", "bfloat16"], [file, folder, "--to", "mistral"]):
        done = opennemo("convert", *map(str, args))
        assert done.returncode == 0, done.stderr
        assert done.stdout.decode() == f"Wrote {args[1]}\n"
    assert open_checkpoint(folder).config == open_checkpoint(model).config
    assert GGUF(file).type_of("blk.0.attn_q.weight") == "BF16"


def test_quantize_writes_a_mixture_weighted_by_texts(model: Path, tmp_path: Path):
    text, files = tmp_path / "text.txt", [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20, "utf-8")
    for file, more in zip(files, ([], ["--calibrate", str(text)]), strict=True):
        done = opennemo("quantize", str(model), str(file), "--format", "q4_k_m", *more)
        assert done.returncode == 0, done.stderr
    plain, weighted = map(GGUF, files)
    assert weighted.type_of("blk.1.ffn_up.weight") == "Q4_K"
    codes = [file.read_codes("blk.1.ffn_up.weight") for file in (plain, weighted)]
    assert codes[0].shape == codes[1].shape and not codes[0].equal(codes[1])


def test_merge_folds_an_adapter_or_merges_models(model: Path, tmp_path: Path):
    adapter, other = tmp_path / "adapter", tmp_path / "other"
    learner = load(model)
    add_lora_(learner, rank=4, alpha=8.0, generator=torch.Generator().manual_seed(0))
    save_adapter(learner, adapter, base_model_name=str(model))
    for args in (
        [model, adapter, other],
        [model, other, "--method", "linear", "--weights", "3,1", "--out", tmp_path / "mean.gguf"],
        [model, other, "--method", "dare", "--base", model, "--densities", "0.5", "--out",
         tmp_path / "dare"],
    ):  # fmt: skip
        done = opennemo("merge", *map(str, args))
        assert done.returncode == 0, done.stderr
        assert done.stdout.decode() == f"Wrote {args[-1]}\n"
    assert "random_seed" in (tmp_path / "dare" / "README.md").read_text()
    assert open_checkpoint(tmp_path / "mean.gguf").config == open_checkpoint(model).config


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["convert", "{model}", "{tmp}/new", "--to", "gguf"], "a GGUF file is called NAME.gguf"),
        (["convert", "{model}", "{tmp}/a.gguf", "--to", "hf"], "a GGUF file is called NAME.gguf"),
        (["convert", "{model}", "{tmp}/a.gguf", "--adapter", "{tmp}/no"], "adapter_config.json"),
        (["convert", "{model}", "{tmp}/a", "--adapter", "{tmp}/no", "--to", "hf"], "--to is hf"),
        (["quantize", "{model}", "{tmp}/new", "--format", "q4_k_m"], "is called NAME.gguf"),
        (
            ["quantize", "{model}", "{tmp}/a.gguf", "--format", "int8"],
            "int8 is written into a folder",
        ),
        (["quantize", "{model}", "{tmp}/a.gguf", "--format", "q9"], "allowed are fp8, "),
        (["quantize", "{model}", "{tmp}/a.gguf", "--format", "q4_0", "--kv", "fp8"], "a folder"),
        (["merge", "{model}", "{model}"], "merge takes MODEL ADAPTER OUT"),
        (["merge", "{model}", "{tmp}/a", "{tmp}/b", "--base", "{model}"], "give --method, too"),
        (["merge", "{model}", "{tmp}/a", "{tmp}/b", "--t", "0.5"], "--t belongs to merging models"),
        (["merge", "{model}", "{tmp}/a", "{tmp}/b", "--seed", "0"], "--seed belongs to merging"),
        (["merge", "{model}", "{model}", "--method", "linear"], "needs --out"),
        (["merge", "{model}", "--method", "ties", "--out", "{tmp}/a"], "ties needs the base"),
        (["merge", "{model}", "--method", "mean", "--out", "{tmp}/a"], "allowed are linear, slerp"),
        (
            ["merge", "{model}", "{model}", "--method", "linear", "--weights", "a", "--out", "b"],
            "--weights a: allowed are numbers",
        ),
        (
            ["quantize", "{model}", "{tmp}/a.gguf", "--format", "q4_0", "--calibrate", "{tmp}/0"],
            "{tmp}/0",
        ),
    ],
)
def test_what_does_not_go_together_is_one_line(args, message, model: Path, tmp_path: Path):
    names = {"model": str(model), "tmp": str(tmp_path)}
    done = opennemo(*(arg.format(**names) for arg in args))
    assert done.returncode == 2
    assert message.format(**names) in done.stderr.decode()
    assert done.stderr.count(b"\n") == 1 and b"Traceback" not in done.stderr
    assert [*tmp_path.iterdir()] == []


def test_the_help_of_quantize_names_the_mixtures():
    assert b"q4_k_m" in opennemo("quantize", "--help").stdout
