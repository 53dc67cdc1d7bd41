"""`opennemo eval --engine ray`: what one engine finds, whatever is killed meanwhile."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opennemo.evals import report
from tests.evals.conftest import write_lines
from tests.servers import needs_ray

N = 400
COMMAND = [sys.executable, "-m", "opennemo.cli", "eval"]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    lines = [{"text": f"In the year {i} " * (5 + i % 7 * 20), "lang": "en"} for i in range(N)]
    write_lines(tmp_path / "texts.jsonl", lines)
    return tmp_path / "texts.jsonl"


@pytest.mark.slow
@needs_ray
def test_a_run_that_is_killed_goes_on_and_ends_as_that_of_one_engine(
    folder: Path, texts: Path, tmp_path: Path
):
    asked = [*COMMAND, str(folder), "--suite", "ppl", "--texts", str(texts), "-o"]
    spread = [*asked, str(tmp_path / "ray"), "--engine", "ray", "--replicas", "2"]
    answers = tmp_path / "ray" / "answers.jsonl"
    killed = subprocess.Popen(spread, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (answers.exists() and answers.stat().st_size):
        assert killed.poll() is None, "it ended before it was killed"
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    n_before = answers.read_bytes().count(b"\n")
    assert 0 < n_before < N
    gone_on = subprocess.run(spread, capture_output=True, text=True, timeout=300)
    assert gone_on.returncode == 0, gone_on.stderr
    assert "were answered before" in gone_on.stderr
    assert gone_on.stdout.startswith("| benchmark")
    alone = subprocess.run(
        [*asked, str(tmp_path / "one")], env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    keys = [json.loads(line)[0] for line in answers.read_text("utf-8").splitlines()]
    assert len(keys) == len(set(keys))
    (ours,), (theirs,) = (report.read(tmp_path / name)[1] for name in ("ray", "one"))
    assert ours.items == pytest.approx(theirs.items, abs=1e-4)
    # Replicas are not a setting of a run: one engine can resume it, too.
    again = subprocess.run([*asked, str(tmp_path / "ray")], capture_output=True, timeout=300)
    assert again.returncode == 0, again.stderr
