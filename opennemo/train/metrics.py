"""What a run records: a line of JSON a step, TensorBoard's events, and plots of them.

`metrics.jsonl` is the record; everything else can be made from it. A run that resumes from a
checkpoint first drops the lines after it, so that the record reads as if nothing had happened. The
trainer decides which numbers there are.
"""

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from opennemo.errors import InvalidRequest
from opennemo.files import write_whole
from opennemo.model.transformer import Transformer
from opennemo.train.packing import Batch

FILE = "metrics.jsonl"
# What is drawn, one plot each, if the run has it: title, axis, and the series, by name or pattern.
PLOTS = (
    ("loss", "nats", ("loss", "valid_loss")),
    ("bits a byte, held out", "bits", ("valid_bits_per_byte",)),
    ("pairs ranked right", "share", ("accuracy", "valid_accuracy")),
    ("reward", "", ("reward", "valid_reward")),
    ("parts of the reward", "", ("reward_*",)),
    ("parts of the reward, held out", "", ("valid_reward_*",)),
    ("tokens of an answer", "", ("answer_tokens", "valid_answer_tokens")),
    ("answers cut off; groups with a spread", "share", ("cut", "spread")),
    ("learning rate", "", ("lr",)),
    ("norm of the gradient", "", ("grad_norm",)),
    ("speed", "tokens/s", ("tokens_per_second",)),
)


class Log:
    """The record of one run, as a file and as TensorBoard's events."""

    def __init__(self, run: Path, first_step: int):
        """Continue at `first_step`: records of later steps are dropped."""
        from tensorboardX import SummaryWriter

        path = run / FILE
        records = [record for record in _records(path) if record["step"] < first_step]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        write_whole(path, lines.encode())
        self._file = path.open("a", encoding="utf-8")
        events = run / "tensorboard"
        self._events = SummaryWriter(str(events), purge_step=first_step, flush_secs=30)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers of a step; numbers that are not finite become null."""
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._events.close()


def note(values: Mapping[str, float]) -> str:
    """The main numbers of a step, in one line."""
    shapes = (
        ("loss", "loss", ".4f"), ("reward", "reward", ".3f"), ("accuracy", "right", ".1%"),
        ("tokens_per_second", "tok/s", ",.0f"), ("mfu", "MFU", ".0%"),
    )  # fmt: skip
    return "  ".join(
        f"{label} {format(values[key], shape)}" for key, label, shape in shapes if key in values
    )


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All records of a run.

    Raises:
        InvalidRequest: the folder holds no run.
    """
    path = run / FILE
    if not path.exists():
        raise InvalidRequest(f"{run}: no run, for there is no {FILE} in it")
    return list(_records(path))


def plot(runs: Sequence[Path], out: Path) -> None:
    """Draw the curves of some runs into one picture, PNG or SVG by the name's ending.

    Raises:
        InvalidRequest: a folder holds no run, or the picture is of no known kind.
    """
    records = {run.resolve().name: read_metrics(run) for run in runs}
    recorded = dict.fromkeys(key for lines in records.values() for r in lines for key in r)
    plots = [
        (title, axis, [k for key in keys for k in recorded if fnmatchcase(k, key)])
        for title, axis, keys in PLOTS
    ]
    shown = [plot for plot in plots if plot[2]]

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if out.suffix.lstrip(".") not in ("png", "svg", "pdf"):
        raise InvalidRequest(f"{out}: pictures end in .png, .svg or .pdf")
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(5 * columns, 3.4 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    for axis, (title, unit, keys) in zip(axes.flat, shown, strict=False):
        for name, lines in records.items():
            for key in keys:
                points = [(r["step"], r[key]) for r in lines if r.get(key) is not None]
                if points:
                    dense = len(points) > 60
                    part = "held out" if key.startswith("valid_") else "training"
                    if not all(k.endswith(keys[0]) for k in keys):  # several things, not two sides
                        part = key.removeprefix("valid_").removeprefix("reward_")
                    label = name if len(keys) == 1 else f"{name}, {part}"
                    axis.plot(
                        *zip(*points, strict=True), label=label, lw=1, marker="" if dense else "."
                    )
        axis.set(title=title, xlabel="step", ylabel=unit)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(out, dpi=120)
    pyplot.close(figure)


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product here, the base of MFU."""
    n = 1024 if device.type == "cpu" else 8192
    a = torch.ones(n, n, device=device, dtype=dtype)
    best = math.inf
    for _ in range(5):
        _wait(device)
        start = time.perf_counter()
        torch.mm(a, a)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def step_flops(model: Transformer, batches: Iterable[Batch]) -> float:
    """Operations of a step by the usual count: 6 a weight and token, and attention's."""
    config = model.config
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    if not config.tied_embeddings:
        weights -= config.vocab_size * config.dim
    width = config.n_layers * config.n_heads * config.head_dim
    return sum(6.0 * weights * len(b.tokens) + 12.0 * width * b.n_seen for b in batches)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _records(path: Path) -> Iterable[dict[str, Any]]:
    """The lines of a record, except an incomplete last one that a kill cut off."""
    if not path.exists():
        return
    for line in path.read_text("utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)
