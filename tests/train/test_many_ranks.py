"""Ranks change how a run is computed, but not its result: gloo, on this CPU."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from opennemo.model.checkpoint import load
from opennemo.train.config import Recipe
from opennemo.train.metrics import read_metrics
from opennemo.train.run import train
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]


def run(recipe: Recipe, folder: Path) -> None:
    train(recipe, folder, quiet=True)


def course(folder: Path) -> np.ndarray:
    return np.array([[r["loss"], r["grad_norm"]] for r in read_metrics(folder)])


CASES = {
    "data": {},
    "tensor": {"parallel": {"tensor_parallel": 2}},
    "context": {"parallel": {"context_parallel": 2}},
    "rounded": {"qat": {"format": "fp8-static", "kv": True, "start": 0.3}},
    "preference": {},
}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] * (c != "rounded")) for c in CASES]
)
def test_two_ranks_learn_what_one_does(make_recipe, tmp_path, case):
    objective = case if case == "preference" else "text"
    changes = {"steps": 5, "saving": {"every": 0}, **CASES[case]}
    alone = {k: v for k, v in changes.items() if k != "parallel"}
    run(make_recipe(objective, **alone), tmp_path / "one")
    run_ranks(2, run, make_recipe(objective, **changes), tmp_path / "two")
    np.testing.assert_allclose(course(tmp_path / "two"), course(tmp_path / "one"), rtol=1e-5)
    held_out = [
        [r["valid_loss"] for r in read_metrics(tmp_path / name) if "valid_loss" in r]
        for name in ("one", "two")
    ]
    np.testing.assert_allclose(*held_out, rtol=1e-5)
    one, two = (load(tmp_path / name / "model") for name in ("one", "two"))
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks(make_recipe, tmp_path, monkeypatch):
    """Two ranks, killed after four of six steps; then one; as if one had done it all."""
    recipe = make_recipe(steps=6)
    run(recipe, tmp_path / "one")
    run_ranks(2, run, recipe, tmp_path / "two")
    newest = tmp_path / "two" / "checkpoints" / "step-00000006"
    for path in sorted(newest.iterdir()):
        path.unlink()
    newest.rmdir()
    for made in ("model",):
        for path in (tmp_path / "two" / made).iterdir():
            path.unlink()
        (tmp_path / "two" / made).rmdir()
    run(recipe, tmp_path / "two")
    np.testing.assert_allclose(course(tmp_path / "two"), course(tmp_path / "one"), rtol=1e-5)


@pytest.mark.slow
def test_a_killed_worker_is_started_again_and_nothing_is_lost(recipe_file, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    launch = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "--max-restarts", "3", "-m", "opennemo", "train", str(recipe_file),
    ]  # fmt: skip
    whole = subprocess.run(
        [*launch, "--out", str(tmp_path / "whole")], env=environment, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert whole.returncode == 0, whole.stderr[-3000:]
    process = subprocess.Popen(
        [*launch, "--out", str(tmp_path / "killed")], env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics = tmp_path / "killed" / "metrics.jsonl"
    for _ in range(1200):
        if metrics.exists() and len(metrics.read_text().splitlines()) >= 12:
            break
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    assert read_metrics(tmp_path / "killed")[-1]["step"] == 29
    np.testing.assert_array_equal(course(tmp_path / "killed"), course(tmp_path / "whole"))
