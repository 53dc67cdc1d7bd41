"""A 12B model in 8 bits on this machine: how long it takes to load, and how fast it decodes.

    python benchmarks/nemo12b.py [--format int8|fp8] [--threads N] [--folder DIR] [--json FILE]

Real weights would take no other time than random ones, so a folder of Mistral NeMo's exact shape is
written with random codes (12.9 GB; kept if `--folder` names a place for it, and used again). It is
then loaded and decodes in this process. A step reads every weight once, so no program can decode
faster than this machine's read bandwidth over the bytes of a step; what counts is the share of it.
"""

import argparse
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch
from measure import Row, peak_memory, read_bandwidth, write_rows
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from opennemo.engine import EngineConfig, LocalEngine, SamplingParams, Token
from opennemo.files import new_folder
from opennemo.model import compressed
from opennemo.model.checkpoint import load, weight_shapes, write_model
from opennemo.model.formats import FORMATS
from opennemo.model.memory import machine_memory
from opennemo.model.quantization import quantize_head_
from opennemo.model.transformer import PRESETS, ModelConfig

PREFILL, DECODED = 128, 16


def write_random(folder: Path, config: ModelConfig, format: str) -> None:
    """A model folder of this shape whose weights are noise of a sane size."""
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, shape in weight_shapes(config).items():
        if not compressed.is_stored_in_codes(name):
            tensors[name] = (torch.bfloat16, shape)
            continue
        parts = compressed.parts(FORMATS[format], "hf", shape)
        tensors |= {
            f"{name.removesuffix('weight')}{suffix}": part for suffix, part in parts.items()
        }
    # Every matrix is a stretch of the same noise: making 12 billion numbers takes minutes.
    noise = torch.randint(-100, 101, (1 << 28,), dtype=torch.int8)
    if format == "fp8":
        noise = (noise / 100).to(torch.float8_e4m3fn)
    offset = 0

    def read(name: str) -> Tensor:
        nonlocal offset
        dtype, shape = tensors[name]
        size = math.prod(shape)
        if name.endswith("weight_scale"):  # rows of unit length, about
            unit = 58.0 if format == "int8" else 0.58
            return torch.full(shape, 1 / (unit * math.sqrt(config.dim)))
        if dtype == torch.bfloat16:
            return (torch.ones(shape) if len(shape) == 1 else torch.randn(shape) / 50).to(dtype)
        offset = (offset + 4096) % (1 << 20)
        return noise[offset : offset + size].view(shape)

    said = compressed.describe(FORMATS[format], "hf")
    with (
        Progress(transient=True, disable=not sys.stderr.isatty()) as progress,
        new_folder(folder) as partial,
    ):
        task = progress.add_task("Writing a random 12B model")

        def note(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        write_model(partial, "hf", config, tensors, read, said, note)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--format", default="int8", choices=["int8", "fp8"])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, help="where to write the model, and keep it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    options = parser.parse_args()
    config = PRESETS["mistral-nemo-12b"]
    folder = options.folder or Path(tempfile.mkdtemp()) / "nemo-12b"
    memory, needed = machine_memory()["cpu"], 15 * 10**9
    if memory < needed or shutil.disk_usage(folder.parent).free < 14 * 10**9:
        print("This takes 15 GB of memory and 14 GB of disk; there is less here.")
        return
    if not folder.exists():
        write_random(folder, config, options.format)
    bandwidth = read_bandwidth(options.threads)
    try:
        start = time.perf_counter()
        model = load(folder)
        quantize_head_(model, FORMATS["int8"])
        n_bytes = sum(
            t.nbytes for name, t in model.state_dict().items() if "tok_embeddings" not in name
        )
        engine = LocalEngine(model, [], EngineConfig(n_pages=64))
        seconds = time.perf_counter() - start
    finally:
        if options.folder is None:
            shutil.rmtree(folder.parent)
    times: list[float] = []

    def listen(event: Token) -> None:
        assert event.error is None, event.error
        times.append(time.perf_counter())

    begin = time.perf_counter()
    prompt = [(31 * i) % 100_000 + 1000 for i in range(PREFILL)]
    engine.submit(prompt, SamplingParams(max_tokens=DECODED), listen)
    while engine.step():
        pass
    step = statistics.median([b - a for a, b in pairwise(times)])
    # The machine's best, before and after: other work on it would make us look good.
    bandwidth = max(bandwidth, read_bandwidth(options.threads))
    table = Table(f"Mistral NeMo 12B in {options.format}, {options.threads} threads", "")
    table.add_row("weights a step reads", f"{n_bytes / 1e9:.2f} GB")
    table.add_row("read bandwidth", f"{bandwidth / 1e9:.1f} GB/s")
    table.add_row("load", f"{seconds:.1f} s")
    table.add_row("peak memory", f"{peak_memory() / 1e9:.1f} GB")
    table.add_row("prefill", f"{PREFILL / (times[0] - begin):.1f} tokens/s")
    table.add_row("decode", f"{1 / step:.2f} tokens/s")
    table.add_row("share of the bandwidth", f"{n_bytes / step / bandwidth:.0%}")
    Console().print(table)
    row = Row(
        name=f"NeMo 12B, {options.format}, decode 1", ours=1 / step, peer=bandwidth / n_bytes,
        peer_name="bandwidth / bytes", ratio=n_bytes / step / bandwidth,
    )  # fmt: skip
    write_rows([row], options.json)


if __name__ == "__main__":
    main()
