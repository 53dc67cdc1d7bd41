"""Errors and help of every command: one line, and no import of torch."""

import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest

from opennemo.model.transformer import ModelConfig
from opennemo.tokenizer.tekken import SINGLE_BYTES, Tekken
from tests.cli.conftest import opennemo
from tests.hollow import write_hollow


@pytest.mark.parametrize(
    ("args", "stdin", "message"),
    [
        (["chat", "no/such/folder.gguf"], b"hi", "does not exist"),
        (["chat"], b"\xff\xfe", "not UTF-8"),
        (["chat"], b"  \n", "empty"),
        (["generate", "smollm2-135m-instruct"], b"", "give a prompt or --file"),
        (["generate", "smollm2-135m-instruct", "-f", "{tmp}/bad.txt"], b"", "not UTF-8"),
        (["generate", "smollm2-135m-instruct", "-f", "{tmp}/none.txt"], b"", "No such file"),
        (["info", "{tmp}"], b"", "params.json"),
        (["convert", "smollm2-135m-instruct", "{tmp}"], b"", "empty folder"),
        (["convert", "smollm2-135m-instruct", "{tmp}/new", "--to", "onnx"], b"", "hf, mistral"),
        (["info", "nobody/nothing"], b"", "network"),
        (
            ["generate", "smollm2-135m-instruct", "Hi", "--device", "tpu"],
            b"",
            "allowed are cpu, cu",
        ),
        (["generate", "smollm2-135m-instruct", "Hi", "--device", "cuda:99"], b"", "PyTorch"),
        (
            [
                "tokenizer",
                "compare",
                "opennemo-tekken-32k",
                "--texts",
                "{tmp}/bad.txt",
                "--layout",
                "page",
            ],
            b"",
            "allowed are document, paragraph, sentence",
        ),
        (["inform"], b"", "(see `opennemo --help`)"),
        (["info"], b"", "Missing argument 'model' (see `opennemo info --help`)"),
        (["chat", "--seed", "one"], b"", "Invalid value for '--seed'"),
        (["generate", "{tmp}/12b", "x", "--format", "fp32"], b"", "of weights in fp32"),
        (["generate", "{tmp}/12b", "x", "--format", "int5"], b"", "allowed are auto, bf16"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(args, stdin, message, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    if "{tmp}/12b" in args:
        folder = write_hollow(tmp_path / "12b", ModelConfig())
        Tekken(r"(?s:.)", SINGLE_BYTES, n_special=64).save(folder / "tekken.json")
    args = [arg.replace("{tmp}", str(tmp_path)) for arg in args]
    env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = opennemo(*args, input=stdin, env=env)
    assert done.returncode == 2
    assert message in done.stderr.decode() and done.stderr.count(b"\n") == 1
    assert b"Traceback" not in done.stderr


def test_the_version_is_that_of_the_package():
    assert opennemo("--version").stdout.decode() == f"opennemo {version('opennemo')}\n"


def test_help_imports_neither_torch_nor_an_extra():
    code = (
        "import sys, opennemo.cli, typer.main; typer.main.get_command(opennemo.cli.app); "
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "lm_eval", "fastapi", "pydantic"} & {*done.stdout.split()}


def test_info_shows_what_is_stored_what_fits_and_how_fast(tmp_path):
    done = opennemo("info", str(write_hollow(tmp_path / "12b", ModelConfig())))
    assert done.returncode == 0, done.stderr
    out = done.stdout.decode()
    lines = out.splitlines()
    assert "parameters  12,247,782,400" in lines
    assert "stored      363 tensors in bfloat16 (22.8 GiB)" in lines
    assert any("int8" in line and "12.0 GiB" in line for line in lines)
    assert "tokens/s at most" in out and "GB/s" in out


def test_superwords_are_learned_shown_and_compared_in_layouts(tmp_path):
    text = "It is one of the things that have to be said of the things that are to come.\n"
    (tmp_path / "en.txt").write_text(text * 40, encoding="utf-8")
    options = ("--vocab-size", "1296", "--superwords", "--transition", "1284", "--max-words", "3")
    done = opennemo("tokenizer", "train", f"{tmp_path}/en.txt", *options, "-o", f"{tmp_path}/own")
    assert done.returncode == 0, done.stderr
    assert b"Counting phrases" in done.stderr and b"1,296 ids" in done.stdout
    done = opennemo("tokenizer", "show", f"{tmp_path}/own/tekken.json", "of the things")
    assert b"among the tokens" in done.stdout, done.stderr
    layouts = ("--layout", "sentence", "--layout", "document", "--json", f"{tmp_path}/out.json")
    tokenizers = (f"own={tmp_path}/own", "old=opennemo-tekken-32k")
    done = opennemo("tokenizer", "compare", *tokenizers, "--texts", f"{tmp_path}/en.txt", *layouts)
    assert done.returncode == 0, done.stderr
    assert b"sentence by sentence" in done.stdout
    assert json.loads((tmp_path / "out.json").read_text()).keys() == {"sentence", "document"}
