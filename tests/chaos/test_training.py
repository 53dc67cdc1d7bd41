"""A run that is killed again and again ends with the weights of one that was left alone."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from opennemo.tokenizer.tekken import SINGLE_BYTES, Tekken
from opennemo.train.corpus import ShardWriter, describe_tokenizer

BYTES = Tekken(r"(?s:.)", SINGLE_BYTES, n_special=64)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A run of some seconds over Python's documentation, with a checkpoint at each third step."""
    (tmp_path / "tokenizer").mkdir()
    BYTES.save(tmp_path / "tokenizer" / "tekken.json")
    (tmp_path / "shards").mkdir()
    writer = ShardWriter(tmp_path / "shards", describe_tokenizer(BYTES, "bytes"))
    text = "\n\n".join(topics.values())[:200_000]
    ids = np.array([BYTES.bos_id, *BYTES.encode(text), BYTES.eos_id], np.uint32)
    writer.add(ids, np.array([len(ids)]), np.array([len(text.encode())]))
    writer.finish()
    path = tmp_path / "recipe.toml"
    path.write_text(
        f"""
        steps = 300
        device = "cpu"
        model = {{ shape = "tiny", tokenizer = "{tmp_path / "tokenizer"}" }}
        saving = {{ every = 3 }}
        [data]
        train = [{{ path = "{tmp_path / "shards"}" }}]
        window = 256
        rows = 4
        micro_rows = 2
        """
    )
    return path


def start(recipe: Path, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "opennemo.cli", "train", str(recipe), "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def n_steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.chaos
def test_twenty_kills_change_no_bit(recipe, tmp_path):
    process = start(recipe, tmp_path / "whole")
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    rng, killed_at = random.Random(20), []
    for i in range(20):
        process = start(recipe, tmp_path / "run")
        # While it starts, steps, saves or resumes: some time after, on average, five steps more.
        before, goal = n_steps(tmp_path / "run"), rng.randrange(9) if i % 4 else -1
        deadline = time.monotonic() + 120
        while goal >= 0 and n_steps(tmp_path / "run") < before + goal and process.poll() is None:
            assert time.monotonic() < deadline, "it does not get on"
            time.sleep(0.002)
        time.sleep(rng.random() * (2.0 if goal < 0 else 0.05))
        process.kill()
        said, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL, said
        killed_at.append(n_steps(tmp_path / "run"))
    process = start(recipe, tmp_path / "run")
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    print(f"\nkilled with so many steps in metrics.jsonl: {killed_at}")
    whole, run = (
        load_file(next((tmp_path / name / "model").glob("*.safetensors")))
        for name in ("whole", "run")
    )
    assert whole.keys() == run.keys() and all(torch.equal(run[name], whole[name]) for name in whole)
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / n / "metrics.jsonl").open()]
        for n in ("whole", "run")
    ]
    assert losses[1] == losses[0]  # each step is recorded once
