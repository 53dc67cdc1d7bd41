"""All checks on a GPU in one command of at most 9 minutes: tests, speed, training.

    python benchmarks/gpu_check.py [--out FOLDER] [--minutes 9] [--dry]        (or: make gpu)

Three parts run one after the other, each a process with a share of the time, and none stops the
others: the tests of kernels, step and engine on the card; `gpu.py --quick`; `gpu_training.py`.
The folder then holds a log of each part, `versions.json`, `rows.json` (all that was measured),
`summary.json`, and, where a part failed, the trace of its first failure. It needs no network.
`--dry` rehearses it on a CPU, in Triton's interpreter and at toy size.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
ON_CARD = [
    "tests/kernels/test_gpu.py", "tests/kernels/test_paged_attention.py",
    "tests/kernels/test_paged_prefill.py", "tests/kernels/test_packed_weights.py",
    "tests/model/test_gpu_step.py",
]  # fmt: skip
REHEARSED = "tests/kernels/test_gpu.py::test_numbers_that_are_not_finite_stay_so"
TRACE = 60  # lines at most of a first failure
PACKAGES = ("torch", "triton", "numpy", "safetensors", "transformers")


class Part(NamedTuple):
    name: str
    share: float  # of the time, beside what earlier parts leave
    command: list[str]


def parts(out: Path, dry: bool) -> list[Part]:
    # All tests of these files, on the card; those that only compile need none.
    tests = [REHEARSED] if dry else [*ON_CARD, "-m", "gpu or not slow", "-k", "not compiles"]
    toy = ["--toy"] if dry else []

    def rows(name: str) -> list[str]:
        return [*toy, "--json", str(out.resolve() / f"{name}.json")]

    return [
        Part("tests", 0.4, ["-m", "pytest", "-p", "no:cacheprovider", "--durations=10", *tests]),
        Part("speed", 0.35, ["benchmarks/gpu.py", "--quick", *rows("speed")]),
        Part("training", 0.25, ["benchmarks/gpu_training.py", *rows("training")]),
    ]


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        if importlib.util.find_spec(name):
            found[name] = importlib.metadata.version(name)
    for name, command in {
        "cards": ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv"],
        "commit": ["git", "-C", str(ROOT), "rev-parse", "HEAD"],
    }.items():
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
            found[name] = done.stdout.strip()
        except (OSError, subprocess.SubprocessError) as error:
            found[name] = f"unknown: {error}"
    return found


def run(part: Part, out: Path, seconds: float, dry: bool) -> dict:
    """A part and its result; its output goes to its log as it comes."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]]), "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": str(int(dry)),
    }  # fmt: skip
    if dry:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    log, start = out / f"{part.name}.log", time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *part.command], cwd=ROOT, env=environment, stdout=file,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
    took = round(time.monotonic() - start, 1)
    ended = "time is up" if code is None else "passed" if code == 0 else f"failed with {code}"
    if code != 0:
        trace = first_failure(log.read_text("utf-8", errors="replace"))
        (out / f"{part.name}.failure.txt").write_text(trace, "utf-8")
    print(f"{part.name}: {ended}, {took:.0f} s")
    return {"part": part.name, "ended": ended, "seconds": took, "passed": code == 0}


def first_failure(log: str) -> str:
    """The lines from the first failure on: of a test, or of a program."""
    lines = log.splitlines()
    heads = re.compile(r"_{4,} .+ _{4,}$|Traceback \(most recent call last\):")
    first = next((i for i, line in enumerate(lines) if heads.match(line)), None)
    if first is None:
        return "\n".join(lines[-TRACE:])
    others = (
        i for i in range(first + 1, len(lines)) if re.match(r"_{4,} .+ _{4,}$|={4,} ", lines[i])
    )
    last = next(others, len(lines))
    if last - first <= TRACE:
        return "\n".join(lines[first:last])
    return "\n".join([*lines[first : first + 10], "...", *lines[last - TRACE + 11 : last]])


def rows_of(out: Path) -> list[dict]:
    found = []
    for name in ("speed", "training"):
        if (file := out / f"{name}.json").exists():
            found += [{"part": name, **row} for row in json.loads(file.read_text("utf-8"))]
    return found


def write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="a folder; by default gpu-DATE-TIME here")
    parser.add_argument("--minutes", type=float, help="for all of it: 9, and 60 with --dry")
    parser.add_argument("--dry", action="store_true", help="rehearse it on a CPU, at toy size")
    options = parser.parse_args()
    minutes = (60.0 if options.dry else 9.0) if options.minutes is None else options.minutes
    if minutes <= 0:
        parser.error(f"--minutes {minutes:g}: must be above 0")
    out = options.out or Path(f"gpu-{datetime.now(UTC):%Y%m%d-%H%M%S}")
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes - 10  # to write down the results
    write(out / "versions.json", versions())
    results, spare = [], 0.0
    for part in parts(out, options.dry):
        share = part.share * 60 * minutes + spare
        seconds = max(1.0, min(share, end - time.monotonic()))
        results.append(run(part, out, seconds, options.dry))
        spare = max(0.0, share - results[-1]["seconds"])
        write(out / "summary.json", results)
        write(out / "rows.json", rows_of(out))
    print(f"all of it is in {out}")
    return 0 if all(result["passed"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
