"""Programs of a model are run, within bounds, when that is asked for."""

import ast
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
    nothing = tuple({chr(i) for i in range(256)} | {"\ufffd"})
    silent = replace(coding.BENCHMARKS["HumanEval"], stop=nothing)
    monkeypatch.setitem(coding.BENCHMARKS, "HumanEval", silent)
    options = Programs(run_code=True)
    request = Request(model=llm.name, suite="code", data=tmp_path, options=options)
    outcome = coding.measure(llm, request, Run(tmp_path / "run", {}))
    rows, items = outcome.rows, outcome.items
    assert [row.name for row in rows] == ["HumanEval", "HumanEval+", "MBPP"]
    assert rows[0].n == 2 and rows[0].score in (0.0, 50.0)
    assert rows[2].n == 0 and "no data: needs mbpp.jsonl" in next(iter(rows[2].trouble))
    assert {i["id"] for i in items} == {"T/0", "T/1"} and items[1]["wrong"]


def test_code_is_run_only_when_that_is_asked_for(folder, tmp_path):
    with pytest.raises(InvalidRequest, match="--run-code"):
        evaluate(Request(model=str(folder), suite="code", output=tmp_path), [])
    request = Request(model="none", suite="code", data=tmp_path, options=Programs(run_code=True))
    with pytest.raises(InvalidRequest, match=r"HumanEval needs humaneval\.jsonl in --data, from"):
        evaluate(request, [])


def mbpp(number: int, tests: list[str]) -> dict[str, Any]:
    code = f"def f(x):\r\n  return x + {number}"
    return {"task_id": number, "text": f"Add {number}.", "code": code, "test_list": tests}


def test_mbpp_shows_three_examples_and_runs_the_assertions(llm, tmp_path, monkeypatch):
    lines = [mbpp(i, [f"assert f({j}) == {i + j}" for j in range(3)]) for i in (2, 3, 4, 7, 11, 12)]
    write_lines(tmp_path / "mbpp.jsonl", lines)
    prompts: list[str] = []

    def complete(prompt: str, **settings: Any) -> Any:
        prompts.append(prompt)
        return SimpleNamespace(text="def f(x):\n  return x + 11\n")

    monkeypatch.setattr(llm, "complete", complete)
    request = Request(model=llm.name, suite="code", tasks=("MBPP",), data=tmp_path,
                      options=Programs(run_code=True))  # fmt: skip
    (row,) = coding.measure(llm, request, Run(tmp_path / "run", {})).rows
    assert row.items == {"MBPP/11": 1.0, "MBPP/12": 0.0} and row.setting == "3-shot, pass@1"
    assert "Add 7." not in prompts[0] and prompts[0].count("[BEGIN]") == 4


def test_prompts_are_those_of_the_harness():
    lm_eval = pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    jinja2, yaml = pytest.importorskip("jinja2"), pytest.importorskip("yaml")
    folder = Path(lm_eval.__file__).parent / "tasks"

    def task(name: str) -> dict[str, Any]:
        text = re.sub(r"!function (\S+)", r"\1", (folder / name).read_text("utf-8"))
        return yaml.safe_load(text)

    theirs, ours = task("mbpp/mbpp.yaml"), coding.BENCHMARKS["MBPP"]
    assert list(ours.stop) == theirs["generation_kwargs"]["until"]
    tree = ast.parse((folder / "mbpp" / "utils.py").read_text("utf-8"))
    functions = {node.name: node.body[0] for node in tree.body if isinstance(node, ast.FunctionDef)}
    returned: Any = functions["list_fewshot_samples"]
    shots = ast.literal_eval(returned.value)
    render = lambda key, doc: jinja2.Template(theirs[key], keep_trailing_newline=True).render(**doc)  # noqa: E731
    asked = mbpp(11, ["assert f(1)", "assert f(2)", "assert f(3)"])
    examples = [render("doc_to_text", s) + render("doc_to_target", s) for s in shots]
    ((_, prompt, _, after),) = ours.problems([*shots, asked])
    assert prompt == "\n\n".join([*examples, render("doc_to_text", asked)])
    assert after == "\n" + render("doc_to_target", asked)
    theirs = task("humaneval/humaneval.yaml")
    assert list(coding.STOP) == theirs["generation_kwargs"]["until"]
    assert (
        task("humaneval/humaneval_plus.yaml")["dataset_path"]
        in coding.BENCHMARKS["HumanEval+"].source
    )
