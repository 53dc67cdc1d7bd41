"""`make gpu` rehearsed on a CPU: every part runs, and one that fails stops no other."""

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def check() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        return importlib.import_module("gpu_check")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_the_rehearsal_runs_every_part(tmp_path: Path):
    done = subprocess.run(
        ["make", "gpu", "DRY=1", f"OUT={tmp_path}", f"PYTHON={sys.executable}", "BIN=/nowhere"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    failures = [file.read_text() for file in tmp_path.glob("*.failure.txt")]
    assert done.returncode == 0, done.stdout + done.stderr + "\n".join(failures)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [part["part"] for part in summary] == ["tests", "speed", "training"]
    assert all(part["passed"] for part in summary)
    versions = json.loads((tmp_path / "versions.json").read_text())
    assert {"python", "torch", "triton", "cards"} <= versions.keys()
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row["part"] for row in rows} == {"speed", "training"}
    names = {row["name"] for row in rows}
    for format in ("bf16", "fp8", "q4_k"):
        assert f"{format}, decode 1, to roofline" in names
        assert f"{format}, prefill 2048, to roofline" in names
    assert "q4_k, decode 1, to bf16" in names
    assert {"a step under FSDP2 on one rank", "a step under rounding to FP8"} <= names
    assert "1 passed" in (tmp_path / "tests.log").read_text()


def test_a_part_that_fails_or_hangs_leaves_its_trace_and_stops_no_other(
    check: ModuleType, tmp_path: Path
):
    fails = "def outer():\n    raise RuntimeError('no such card')\nprint('begun')\nouter()"
    failing = check.Part("failing", 0, ["-c", fails])
    hanging = check.Part("hanging", 0, ["-c", "import time; print('begun'); time.sleep(600)"])
    results = [
        check.run(failing, tmp_path, 100, True),
        check.run(hanging, tmp_path, 3, True),
        check.run(check.Part("fine", 0, ["-c", "print('done')"]), tmp_path, 100, True),
    ]
    assert [r["ended"] for r in results] == ["failed with 1", "time is up", "passed"]
    trace = (tmp_path / "failing.failure.txt").read_text()
    assert trace.startswith("Traceback") and trace.endswith("RuntimeError: no such card")
    assert (tmp_path / "hanging.failure.txt").exists()
    assert not (tmp_path / "fine.failure.txt").exists()


def test_of_failed_tests_the_first_one_is_shown(check: ModuleType):
    log = [
        "..F.F", "=== FAILURES ===", "____ test_first ____", "E   assert 1 == 2",
        "____ test_second ____", "E   assert 3 == 4", "==== short test summary info ====",
    ]  # fmt: skip
    assert check.first_failure("\n".join(log)).splitlines() == log[2:4]
    assert check.first_failure("killed") == "killed"
