"""HumanEval: programs that are run, within bounds, when that is asked for."""

import pytest

from opennemo.errors import InvalidRequest
from opennemo.evals import coding
from opennemo.evals.coding import run_program
from opennemo.evals.evaluate import evaluate
from opennemo.evals.runs import Run
from opennemo.evals.suites import Programs, Request
from tests.evals.conftest import write_lines


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
    options = Programs(run_code=True)
    request = Request(model=llm.name, suite="code", data=tmp_path, options=options)
    outcome = coding.measure(llm, request, Run(tmp_path / "run", {}))
    rows, items = outcome.rows, outcome.items
    assert rows[0].n == 2 and rows[0].score in (0.0, 50.0)
    assert {i["id"] for i in items} == {"T/0", "T/1"} and items[1]["wrong"]


def test_code_is_run_only_when_that_is_asked_for(folder, tmp_path):
    with pytest.raises(InvalidRequest, match="--run-code"):
        evaluate(Request(model=str(folder), suite="code", output=tmp_path), [])
