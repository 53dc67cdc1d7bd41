"""Table 1 over our engine and over lm-evaluation-harness's own `hf` model: time and parity.

    python benchmarks/evaluation.py --data HUB [--limit 200] [--model MODEL] [--json FILE]

Both read the same float32 weights, on as many threads, and are given the same questions by the
harness, benchmark by benchmark in turns. Loading the models is not counted. The table also shows
how many choices and answers differ, and by how much log-likelihoods do. Needs the extras `eval` and
`dev`, and test data (HUB, a folder laid out like the Hugging Face hub; without it, that hub).
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from opennemo.evals.benchmark_data import BenchmarkData
from opennemo.evals.benchmarks import TABLE1
from opennemo.evals.harness import OpenNemoLM
from opennemo.evals.tables import run_tasks
from opennemo.llm import LLM
from opennemo.model.checkpoint import convert
from opennemo.model.hub import DEFAULT_MODEL, locate

# Benchmarks that run together: the two measures of TruthfulQA ask the same questions.
GROUPS = [["hellaswag"], ["winogrande"], ["openbookqa"], ["commonsense_qa"],
          ["truthfulqa_mc1", "truthfulqa_mc2"], ["mmlu"], ["nq_open", "triviaqa"]]  # fmt: skip
GOAL = 4.0


def differences(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, float]:
    """Differences on the same questions: in choices or answers, and in log-likelihoods."""
    found = {"items": 0, "different": 0, "largest": 0.0}
    for a, b in zip(ours, theirs, strict=True):
        assert (a["id"], a["prompt"]) == (b["id"], b["prompt"])
        found["items"] += 1
        if isinstance(a["answers"][0], str):
            found["different"] += a["answers"] != b["answers"]
            continue
        x, y = ([logprob for logprob, _ in item["answers"]] for item in (a, b))
        found["different"] += x.index(max(x)) != y.index(max(y))
        found["largest"] = max(found["largest"], *(abs(p - q) for p, q in zip(x, y, strict=True)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="a folder laid out like the hub")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--tasks", default="", help="of the harness, commas between; all")
    parser.add_argument("--batch-size", type=int, default=8, help="of the hf model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    from lm_eval.models.huggingface import HFLM

    data, rows, scratch = BenchmarkData(options.data), [], tempfile.TemporaryDirectory()
    folder = Path(scratch.name) / "model"
    convert(locate(options.model), folder, to="hf", dtype=torch.float32)
    hf: Any = HFLM
    with LLM.load(str(folder), device="cpu") as llm:
        ours = OpenNemoLM(llm)
        theirs = hf(pretrained=str(folder), dtype="float32", device="cpu",
                    batch_size=options.batch_size)  # fmt: skip
        for group in GROUPS:
            wanted = [t for t in group if not options.tasks or t in options.tasks.split(",")]
            chosen = [b for b in TABLE1 if b.task in wanted]
            if not chosen:
                continue
            seconds, processor, scores, answers = [], [], [], []
            run_tasks(ours, chosen, data, 1)  # both find the data read already
            for lm in (ours, theirs):
                began, used = time.perf_counter(), time.process_time()
                found, items = run_tasks(lm, chosen, data, options.limit)
                seconds.append(time.perf_counter() - began)
                processor.append(time.process_time() - used)
                scores.append([row.score for row in found])
                answers.append(items)
            row = {"tasks": wanted, "seconds": seconds, "processor": processor, "scores": scores}
            rows.append(row | differences(*answers))
            print(json.dumps(rows[-1]), flush=True)
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1), "utf-8")
    table = Table(
        "tasks", "items", "ours", "hf", "ratio", "of processor time", "different", "logprob"
    )
    total: dict[str, Any] = {"tasks": ["all"], "largest": max(r["largest"] for r in rows)}
    for key in ("items", "different"):
        total[key] = sum(r[key] for r in rows)
    for key in ("seconds", "processor"):
        total[key] = [sum(r[key][i] for r in rows) for i in (0, 1)]
    for row in [*rows, total]:
        (ours_s, theirs_s), (ours_p, theirs_p) = row["seconds"], row["processor"]
        table.add_row(
            ", ".join(row["tasks"]), str(row["items"]), f"{ours_s:.0f} s", f"{theirs_s:.0f} s",
            f"{theirs_s / ours_s:.2f}", f"{theirs_p / ours_p:.2f}", str(row["different"]),
            f"{row['largest']:.1e}",
        )  # fmt: skip
    Console().print(table)
    print(
        f"Goal: {GOAL:g} times as fast, with no different choice and log-likelihoods within 1e-3."
    )


if __name__ == "__main__":
    main()
