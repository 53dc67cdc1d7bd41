"""Tables of the harness's tasks: what cannot be measured says why."""

import shutil

import pytest

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")


from opennemo.evals.benchmark_data import BenchmarkData
from opennemo.evals.benchmarks import TABLE1, Benchmark
from opennemo.evals.harness import OpenNemoLM
from opennemo.evals.rows import MISSING
from opennemo.evals.tables import run_tasks

SMALL = [b for b in TABLE1 if b.task in
         ("hellaswag", "winogrande", "nq_open", "commonsense_qa", "openbookqa")]  # fmt: skip


def test_missing_data_and_unknown_tasks_are_named(llm, hub, tmp_path):
    shutil.copytree(hub, tmp_path / "hub", dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "hub" / "allenai" / "winogrande")
    broken = Benchmark(name="None", task="none", folder="hellaswag", shots=0, metric="acc")
    rows, items = run_tasks(OpenNemoLM(llm), [*SMALL[:2], broken], BenchmarkData(tmp_path), 2)
    assert [row.n for row in rows] == [2, 0, 0] and len(items) == 2
    assert rows[1].score is None and next(iter(rows[1].trouble)).startswith(MISSING)
    assert rows[2].score is None and "none" in next(iter(rows[2].trouble))
