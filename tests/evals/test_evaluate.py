"""From a request to a folder: formats in one command, errors before work, and kills."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from opennemo.errors import InvalidRequest
from opennemo.evals import report
from opennemo.evals.benchmark_data import BenchmarkData
from opennemo.evals.evaluate import evaluate
from opennemo.evals.suites import Request, TextFiles
from tests import processes
from tests.evals.conftest import write_lines

TEXTS = ["in the winter " * 20, "rivers run under ice", "né 🦙 " * 30]


def test_formats_are_compared_with_the_first_in_one_command(folder, tmp_path):
    write_lines(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS if text])
    asked = Request(
        model=str(folder),
        suite="ppl",
        options=TextFiles(texts=(tmp_path / "texts.jsonl",)),
        output=tmp_path / "out",
    )
    folders, lines, _ = evaluate(asked, ["fp32", "bf16", "fp8"])
    assert [f.name for f in folders] == ["fp32", "bf16", "fp8"]
    assert lines[0][:4] == ["benchmark", "items", "tiny fp32", "tiny bf16"]
    assert lines[1][4].startswith(("+0.", "-0.")) and "±" in lines[1][4]
    assert (tmp_path / "out" / "comparison.md").exists()
    assert (tmp_path / "out" / "scores.png").exists()


def test_suites_say_what_they_cannot_take(folder, tmp_path, monkeypatch):
    with pytest.raises(InvalidRequest, match="table1, multilingual"):
        evaluate(Request(model=str(folder), suite="table2"), [])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidRequest, match="not a server"):
        evaluate(Request(model="http://127.0.0.1:9/v1", suite="table1", model_name="m"), [])
    request = Request(
        model=str(folder), suite="ppl", output=tmp_path / "x",
        options=TextFiles(texts=(Path(__file__),)),
    )  # fmt: skip
    with pytest.raises(InvalidRequest, match="fp8-static"):
        evaluate(request, ["fp8-static"])
    assert not list(tmp_path.iterdir())  # nothing was begun


def test_a_killed_evaluation_goes_on_where_it_was(folder, llm, hub, tmp_path):
    """SIGKILL in the middle: the same command gives the same results, and asks only the rest."""
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    from opennemo.evals.benchmarks import TABLE1
    from opennemo.evals.harness import OpenNemoLM
    from opennemo.evals.tables import run_tasks

    tasks = ["HellaSwag", "NaturalQuestions", "CommonsenseQA"]
    command = ["-m", "opennemo.cli", "eval", folder, "--suite", "table1", "--data", hub]
    command += ["--tasks", ",".join(tasks), "-o", tmp_path]
    killed = processes.start(*command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    answers = tmp_path / "answers.jsonl"
    while killed.poll() is None and not (answers.exists() and answers.stat().st_size > 500):
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    n_before = answers.read_bytes().count(b"\n")
    again = processes.run(*command)
    out, error = again.stdout.decode(), again.stderr.decode()
    assert again.returncode == 0, error
    assert "| HellaSwag | 0-shot, acc_norm | 5 |" in out and "| 83.5 |" in out
    assert report.CAVEAT in out
    assert n_before > 0 and "were answered before" in error
    wanted = [benchmark for benchmark in TABLE1 if benchmark.name in tasks]
    assert (
        report.read(tmp_path)[1] == run_tasks(OpenNemoLM(llm), wanted, BenchmarkData(hub), None)[0]
    )
    keys = [json.loads(line)[0] for line in answers.read_bytes().splitlines()]
    assert len(keys) == len(set(keys))  # nothing was asked twice
