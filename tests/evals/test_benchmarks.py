"""The table of benchmarks: each entry names a task of the harness."""

from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")


from opennemo.evals.benchmarks import BENCHMARKS


def test_every_benchmark_names_a_task_of_the_harness():
    from lm_eval import tasks

    root = Path(tasks.__file__).parent
    for benchmarks in BENCHMARKS.values():
        for folder in {b.folder for b in benchmarks}:
            manager = tasks.TaskManager(include_path=str(root / folder), include_defaults=False)
            wanted = [b.task for b in benchmarks if b.folder == folder]
            assert {*wanted} <= {*manager.all_tasks}
