"""Programs that a model writes, run against their tests: HumanEval (arXiv:2107.03374).

They are run only when that is asked for, each in a process of its own, isolated from the user's
site packages, in an empty folder, with bounds on time, memory and file sizes. That stops accidents,
not attacks: use a container for models that are not trusted.
"""

import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from opennemo.errors import InvalidRequest, OpenNemoError
from opennemo.evals.benchmark_data import BenchmarkData
from opennemo.evals.rows import gather
from opennemo.evals.runs import Run, digest
from opennemo.evals.suites import Outcome, Programs, Request
from opennemo.llm import LLM

STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # the harness's, where a function ends
SECONDS, BYTES = 10, 2 << 30


def measure(llm: LLM, request: Request, run: Run) -> Outcome:
    """The share of problems whose first, greedy program passes (pass@1)."""
    options: Programs = request.options
    if not options.run_code:
        raise InvalidRequest(
            "--suite code runs programs that the model wrote: allow it by --run-code"
        )
    source = "github.com/openai/human-eval, data"
    problems = BenchmarkData(request.data).lines("humaneval.jsonl", source)[: request.limit]

    def write(problem: Mapping[str, Any]) -> str:
        return llm.complete(problem["prompt"], stop=STOP, temperature=0.0, max_tokens=512).text

    programs = run.ask_all(
        "Writing", problems, key=lambda p: digest("humaneval", llm.name, p["prompt"]), ask=write,
    )  # fmt: skip
    values: dict[str, float | str] = {}
    items = []
    for problem, program in zip(problems, programs, strict=True):
        if isinstance(program, OpenNemoError):
            values[problem["task_id"]] = str(program)
            continue
        wrong = run_program(
            f"{problem['prompt']}{program}\n{problem['test']}\ncheck({problem['entry_point']})\n"
        )
        values[problem["task_id"]] = float(wrong is None)
        items.append({"id": problem["task_id"], "program": program, "wrong": wrong})
    return Outcome(gather("HumanEval", values, setting="0-shot, pass@1"), items)


def run_program(text: str) -> str | None:
    """None if the program ends well, else the last line of its error."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", text], cwd=folder, env={}, capture_output=True,
                text=True, errors="replace", timeout=SECONDS, preexec_fn=_bound, check=False,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"no end in {SECONDS} s"
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def _bound() -> None:
    for limit, most in (
        (resource.RLIMIT_CPU, SECONDS),
        (resource.RLIMIT_AS, BYTES),
        (resource.RLIMIT_FSIZE, 1 << 24),
        (resource.RLIMIT_NPROC, 512),
    ):
        resource.setrlimit(limit, (most, most))
