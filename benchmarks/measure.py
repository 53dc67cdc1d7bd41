"""What benchmarks share: a row of their tables, and the speed of a machine."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from opennemo.planning import machines


@dataclass(frozen=True, kw_only=True)
class Row:
    name: str
    ours: float
    peer: float
    peer_name: str
    unit: str = "tokens/s"
    ratio: float  # above 1: ours is better
    goal: float | None = None


def write_rows(rows: Sequence[Row], file: Path | None) -> None:
    """Write rows as JSON, if a file is named."""
    if file:
        file.write_text(json.dumps([asdict(row) for row in rows], indent=1), "utf-8")


def gpu_options(parser: argparse.ArgumentParser) -> argparse.Namespace | None:
    """The options of the command line, `--toy` and `--json` included; None if there is no GPU."""
    parser.add_argument("--toy", action="store_true", help="a tiny model, here, without a GPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    options = parser.parse_args()
    if torch.cuda.is_available() or options.toy:
        return options
    print(f"benchmarks/{parser.prog} needs an NVIDIA GPU; this machine has none")
    return None


def read_bandwidth(threads: int) -> float:
    """Bytes a second that this machine reads from memory, the best of some tries."""
    torch.set_num_threads(threads)
    return machines.read_bandwidth()


def peak_memory(pid: int | str = "self") -> int:
    """Bytes a process ever had in memory, files it mapped included (Linux)."""
    status = Path(f"/proc/{pid}/status").read_text("utf-8")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
