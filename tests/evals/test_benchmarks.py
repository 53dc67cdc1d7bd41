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


def test_every_benchmark_names_the_data_that_its_task_loads():
    from lm_eval import tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    root = Path(tasks.__file__).parent
    for benchmark in (b for benchmarks in BENCHMARKS.values() for b in benchmarks):
        paths = set()
        for file in (root / benchmark.folder).rglob("*.yaml"):
            config = load_yaml(file, resolve_func=False)
            paths.add(config.get("dataset_path"))
        assert benchmark.data in paths, benchmark.key
