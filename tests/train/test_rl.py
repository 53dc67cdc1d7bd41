"""Learning from rewards: what is drawn, what it is worth, what is learned, and what goes wrong."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from opennemo.errors import OpenNemoError
from opennemo.model.checkpoint import load
from opennemo.rollouts import Rollouts
from opennemo.train.metrics import read_metrics
from opennemo.train.run import train

REWARDS = '''
def wanted(attempt):
    """How much of an answer is the letter z."""
    return attempt.text.count("z") / 6

def raises(attempt):
    raise KeyError("of ours")

def hangs(attempt):
    import time
    time.sleep(60)

def is_nan(attempt):
    return float("nan")

def is_a_list(attempt):
    return [1.0, 2.0]

def is_an_array(attempt):
    import numpy
    return numpy.ones((3, 2))

no_function = 3
'''


@pytest.fixture(scope="session")
def rewards(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "ours.py"
    path.write_text(REWARDS)
    return path


@pytest.fixture
def make_rl(make_recipe, chats, rewards):
    """A recipe that rewards the letter z: `make_rl(steps=3, rl={"updates": 2})`."""

    def make(objective="rl", reward="wanted", rl=None, **changes):
        changes.setdefault("data", {})
        changes["data"] = {
            "train": [{"path": str(chats)}], "valid": [{"path": str(chats)}], "window": 64,
            "rows": 4, "micro_rows": 2, **changes["data"],
        }  # fmt: skip
        more = {"rewards": [{"name": f"{rewards}:{reward}"}], **(rl or {})}
        changes = {
            "drawing": {"answers": 8, "max_tokens": 6},
            "optim": {"lr": 1e-2, "weight_decay": 0.0, "warmup": 0.0},
            **({"rl": more} if objective == "rl" else {}), **changes,
        }  # fmt: skip
        return make_recipe(objective, **changes)

    return make


def run(recipe, folder: Path) -> list[dict]:
    train(recipe, folder, rollout=Rollouts, quiet=True)
    return read_metrics(folder)


def test_a_tiny_model_learns_to_emit_the_letter_that_is_rewarded(make_rl, rewards, tmp_path):
    records = run(make_rl(steps=30, evaluation={"every": 15}), tmp_path / "run")
    assert records[0]["reward"] < 0.1 and records[-1]["reward"] > 0.9
    assert records[-1]["valid_reward"] == 1
    assert records[-1][f"reward_{rewards}:wanted"] == records[-1]["reward"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").open()]
    assert [line["step"] for line in lines[::16]] == [14, 29]
    assert lines[-1]["answer"].count("z") / 6 == lines[-1]["reward"]
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "| rewards | 1 " in card and "44 prompts of" in card
    print(time_of(records))


def time_of(records):
    return sum(r["seconds_drawing"] for r in records)
