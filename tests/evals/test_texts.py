"""Perplexity in bits per byte, and programs that are run."""

import math

import pytest
import torch

from opennemo.errors import InvalidRequest
from opennemo.evals import coding, perplexity
from opennemo.evals.benchmark_data import BenchmarkData
from opennemo.evals.coding import run_program
from opennemo.evals.evaluate import Request, evaluate
from opennemo.evals.report import read
from opennemo.evals.runs import Run
from opennemo.model.attention import Packed
from opennemo.model.checkpoint import load
from tests.evals.conftest import write_lines

TEXTS = ["in the winter " * 20, "rivers run under ice", "", "né 🦙 " * 30]


@torch.inference_mode()
def bits(folder, tokenizer, text: str, window: int) -> float:
    """The definition: each window in a pass of its own, with what stands before it."""
    model = load(folder, dtype=torch.float32)
    ids, total = [tokenizer.bos_id, *tokenizer.encode(text)], 0.0
    for start in range(1, len(ids), window):
        end = min(len(ids), start + window)
        seen = ids[max(0, end - 1 - window) : end]
        hidden = model(torch.tensor(seen), Packed.of(len(seen)))
        logprobs = model.output(hidden[:-1]).log_softmax(-1)
        new = end - start
        total -= logprobs.gather(1, torch.tensor(seen[1:])[:, None])[-new:].sum().item()
    return total / math.log(2)


def test_bits_per_byte_are_those_of_the_definition(folder, llm, tmp_path):
    write_lines(tmp_path / "texts.jsonl", [
        {"text": text, "language": "fr" if "né" in text else "en"} for text in TEXTS
    ])  # fmt: skip
    for window in (50, 2048):
        run = Run(tmp_path / str(window), {})
        rows = {r.part: r for r in
                perplexity.measure(llm, [tmp_path / "texts.jsonl"], run, None, window)}  # fmt: skip
        for part, texts in (("en", TEXTS[:2]), ("fr", TEXTS[3:])):
            total = sum(bits(folder, llm.tokenizer, text, min(window, 1024)) for text in texts)
            size = sum(len(text.encode()) for text in texts)
            assert rows[part].score == pytest.approx(total / size, rel=1e-4)
    assert rows["en"].n == 2 and rows["fr"].error is None
    asked = Request(model=str(folder), suite="ppl", texts=(tmp_path / "texts.jsonl",),
                    output=tmp_path / "out")  # fmt: skip
    evaluate(asked, [])
    assert read(tmp_path / "out")[1][0].score == rows["en"].score
    with pytest.raises(InvalidRequest, match="--texts"):
        evaluate(Request(model=str(folder), suite="ppl"), [])


def test_formats_are_compared_with_the_first_in_one_command(folder, tmp_path):
    write_lines(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS if text])
    asked = Request(model=str(folder), suite="ppl", texts=(tmp_path / "texts.jsonl",),
                    output=tmp_path / "out")  # fmt: skip
    folders, lines, _ = evaluate(asked, ["fp32", "bf16", "fp8"])
    assert [f.name for f in folders] == ["fp32", "bf16", "fp8"]
    assert lines[0][:4] == ["benchmark", "items", "tiny fp32", "tiny bf16"]
    assert lines[1][4].startswith(("+0.", "-0.")) and "±" in lines[1][4]
    assert (tmp_path / "out" / "comparison.md").exists()
    assert (tmp_path / "out" / "scores.png").exists()


def test_a_program_passes_fails_or_is_stopped(monkeypatch):
    assert run_program("assert 1 + 1 == 2") is None
    assert run_program("assert 1 + 1 == 3") == "AssertionError"
    assert "NameError" in str(run_program("nonsense"))
    assert "MemoryError" in str(run_program("x = bytearray(8 << 30)"))
    assert run_program("import os; os._exit(3)") == "exit code 3"
    monkeypatch.setattr(coding, "SECONDS", 1)
    assert run_program("while True: pass") in ("no end in 1 s", "exit code -24", "exit code -9")


def test_humaneval_counts_what_passes(llm, tmp_path, monkeypatch):
    problem = {"prompt": "def f(x):\n    return x\n", "entry_point": "f", "task_id": "T/0"}
    write_lines(tmp_path / "humaneval.jsonl", [
        problem | {"test": "def check(f):\n    assert f(2) == 2\n"},
        problem | {"task_id": "T/1", "test": "def check(f):\n    assert f(2) == 3\n"},
    ])  # fmt: skip
    # What a random model writes after a whole function is no Python; this one writes nothing.
    monkeypatch.setattr(coding, "STOP", tuple({chr(i) for i in range(256)} | {"\ufffd"}))
    rows, items = coding.measure(llm, BenchmarkData(tmp_path), Run(tmp_path / "run", {}), None)
    assert rows[0].n == 2 and rows[0].score in (0.0, 50.0)
    assert {i["id"] for i in items} == {"T/0", "T/1"} and items[1]["wrong"]


def test_code_is_run_only_when_that_is_asked_for(folder, tmp_path):
    with pytest.raises(InvalidRequest, match="--run-code"):
        evaluate(Request(model=str(folder), suite="code", output=tmp_path), [])


def test_suites_say_what_they_cannot_take(folder, tmp_path, monkeypatch):
    with pytest.raises(InvalidRequest, match="table1, multilingual"):
        evaluate(Request(model=str(folder), suite="table2"), [])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidRequest, match="not a server"):
        evaluate(Request(model="http://127.0.0.1:9/v1", suite="table1", model_name="m"), [])
    with pytest.raises(InvalidRequest, match="fp8-static"):
        evaluate(Request(model=str(folder), suite="ppl", output=tmp_path / "x"), ["fp8-static"])
    assert not list(tmp_path.iterdir())  # nothing was begun
