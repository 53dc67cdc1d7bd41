"""Changes to other packages: each still finds what it changes, and is undone."""

import logging
from importlib.metadata import version

import pytest

from opennemo.evals.patches import bfcl, bfcl_services, call_checker, datasets_from, quiet_harness


def test_the_harness_is_the_version_whose_bars_are_hidden_and_comes_back(capfd):
    tasks = pytest.importorskip("lm_eval.api.task", reason="the extra `eval` is not installed")
    assert version("lm_eval") == "0.4.13"
    bar, level = tasks.tqdm, logging.getLogger("lm_eval").level
    with quiet_harness():
        assert list(tasks.tqdm([1, 2], total=2)) == [1, 2]
        assert "tqdm" in tasks.Task.build_all_requests.__code__.co_names
    assert tasks.tqdm is bar and logging.getLogger("lm_eval").level == level
    assert capfd.readouterr().err == ""


def test_data_sets_come_from_the_folder_and_from_nowhere_else(hub):
    datasets = pytest.importorskip("datasets", reason="the extra `eval` is not installed")
    load = datasets.load_dataset
    with datasets_from(hub, "a-name"):
        lines = datasets.load_dataset(path="tau/commonsense_qa", name="default")
        assert len(lines["validation"]) == 5
        with pytest.raises(FileNotFoundError, match="nobody/nothing is not in the folder"):
            datasets.load_dataset(path="nobody/nothing")
    assert datasets.load_dataset is load


def test_the_harness_loads_data_by_the_function_that_is_changed():
    tasks = pytest.importorskip("lm_eval.api.task", reason="the extra `eval` is not installed")
    assert "load_dataset" in tasks.ConfigurableTask.download.__code__.co_names


def test_bfcls_checker_opens_without_the_clients_of_vendors():
    pytest.importorskip("bfcl_eval", reason="pip install --no-deps bfcl-eval==2026.3.23")
    assert version("bfcl-eval") == "2026.3.23"
    assert callable(call_checker())


def test_bfcls_services_of_a_conversation_are_its_own_and_forgotten():
    pytest.importorskip("bfcl_eval", reason="pip install --no-deps bfcl-eval==2026.3.23")
    utils = bfcl("eval_checker.multi_turn_eval.multi_turn_utils")
    before, results = set(vars(utils)), []
    for _ in range(2):
        with bfcl_services() as name:
            calls = ["mkdir(dir_name='new')", "ls()"]
            run = utils.execute_multi_turn_func_call
            results.append(run(calls, {}, ["GorillaFileSystem"], name, "an_id")[0])
            assert set(vars(utils)) != before
        assert set(vars(utils)) == before
    assert results[0] == results[1] and "new" in results[0][1]
