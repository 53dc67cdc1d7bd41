"""Programs that a model writes, run against their tests: HumanEval, HumanEval+ and MBPP.

They run only on request, each in a process of its own, isolated from the user's site packages, in
an empty folder, with bounds on time, memory and file sizes. That stops accidents, not attacks: use
a container for models that are not trusted.

HumanEval: arXiv:2107.03374; with more tests, arXiv:2305.01210; MBPP: arXiv:2108.07732. Prompts and
stops are the harness's, whose own scoring downloads the code that runs programs.
"""

import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opennemo.errors import InvalidRequest, OpenNemoError
from opennemo.evals.benchmark_data import BenchmarkData, report_lacking
from opennemo.evals.rows import MISSING, ResultRow, gather
from opennemo.evals.runs import Run, digest
from opennemo.evals.suites import Outcome, Request
from opennemo.llm import LLM

STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # where a function ends
SECONDS, BYTES = 10, 2 << 30
Problem = tuple[str, str, str, str]  # identity, prompt, and the program before and after the answer


def _functions(lines: Sequence[Mapping[str, Any]]) -> list[Problem]:
    """Functions to be completed; a function `check` asserts what they return."""
    after = "\n{test}\ncheck({entry_point})\n"
    return [(it["task_id"], it["prompt"], it["prompt"], after.format(**it)) for it in lines]


def _descriptions(lines: Sequence[Mapping[str, Any]]) -> list[Problem]:
    """Programs for a description and assertions: tasks 11 to 510, after 2, 3 and 4 as examples."""
    ask = (
        "You are an expert Python programmer, and here is your task: {} Your code should pass "
        "these tests:\n\n{}\n[BEGIN]\n"
    )
    by_id = {it["task_id"]: it for it in lines}
    if missing := {2, 3, 4} - {*by_id}:
        raise InvalidRequest(f"mbpp.jsonl: the example tasks {sorted(missing)} are missing")
    asked = {i: ask.format(it["text"], "\n".join(it["test_list"][:3])) for i, it in by_id.items()}
    shots = "".join(f"{asked[i]}{by_id[i]['code']}\n[DONE]\n\n" for i in (2, 3, 4))
    return [
        (f"MBPP/{i}", shots + asked[i], it.get("test_setup_code", "") + "\n",
         "\n" + "\n".join(it["test_list"]))
        for i, it in sorted(by_id.items()) if 11 <= i <= 510
    ]  # fmt: skip


@dataclass(frozen=True)
class ProgramSet:
    """Problems of a file, and how a model is asked to solve them."""

    file: str
    source: str
    problems: Callable[[Sequence[Mapping[str, Any]]], list[Problem]] = _functions
    setting: str = "0-shot, pass@1"
    stop: tuple[str, ...] = STOP
    max_tokens: int = 512


BENCHMARKS = {
    "HumanEval": ProgramSet("humaneval.jsonl", "github.com/openai/human-eval, data"),
    "HumanEval+": ProgramSet("humanevalplus.jsonl", "the hub's evalplus/humanevalplus"),
    "MBPP": ProgramSet(
        "mbpp.jsonl", "github.com/google-research/google-research, mbpp", _descriptions,
        "3-shot, pass@1", ("[DONE]",), 256,
    ),
}  # fmt: skip


def prepare(request: Request) -> None:
    """Print what benchmarks lack; raises InvalidRequest if none can be measured."""
    if not request.options.run_code:
        raise InvalidRequest(
            "--suite code runs programs that the model wrote: allow it by --run-code"
        )
    report_lacking(_lacking(request), len(request.chosen([*BENCHMARKS])))


def _lacking(request: Request) -> dict[str, str]:
    """What each of the chosen benchmarks lacks, by name."""
    data = BenchmarkData(request.data)
    chosen = {name: BENCHMARKS[name] for name in request.chosen([*BENCHMARKS])}
    return {
        name: f"needs {benchmark.file} in --data, from {benchmark.source}"
        for name, benchmark in chosen.items()
        if not data.look(benchmark.file)
    }


def measure(llm: LLM, request: Request, run: Run) -> Outcome:
    """The share of problems whose first, greedy program passes (pass@1)."""
    lacking, data = _lacking(request), BenchmarkData(request.data)
    rows, items = [], []
    for name in request.chosen([*BENCHMARKS]):
        benchmark = BENCHMARKS[name]
        if name in lacking:
            trouble = {f"{MISSING}: {lacking[name]}": 1}
            rows.append(ResultRow(name=name, setting=benchmark.setting, items={}, trouble=trouble))
            continue
        lines = data.lines(benchmark.file, benchmark.source)
        problems = benchmark.problems(lines)[: request.limit]
        settings: dict[str, Any] = {"stop": benchmark.stop, "max_tokens": benchmark.max_tokens}
        answers = run.ask_all(
            f"Writing {name}", [prompt for _, prompt, *_ in problems],
            key=lambda prompt, name=name, settings=settings: digest(
                name, llm.name, prompt, settings
            ),
            ask=lambda prompt, settings=settings: (
                llm.complete(prompt, temperature=0.0, **settings).text
            ),
        )  # fmt: skip
        values: dict[str, float | str] = {}
        for (id, _, before, after), answer in zip(problems, answers, strict=True):
            if isinstance(answer, OpenNemoError):
                values[id] = str(answer)
                continue
            wrong = run_program(before + answer + after)
            values[id] = float(wrong is None)
            items.append({"id": id, "program": answer, "wrong": wrong})
        rows += gather(name, values, setting=benchmark.setting)
    return Outcome(rows, items)


def run_program(text: str) -> str | None:
    """None if the program succeeds, else the last line of its error."""
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
