"""A 12B model on this machine: how long it takes to load, and how fast it decodes.

    python benchmarks/nemo12b.py [--format int8|fp8] [--threads N] [--folder DIR] [--json FILE]
    python benchmarks/nemo12b.py --file MODEL.gguf [--cases "decode 1" ...] [--rounds N]
                                 [--llama-python PYTHON] [--threads N] [--json FILE]

With `--file` a GGUF file, of any size, runs in its own codes beside llama.cpp: from the start of
the process to the first token, the most memory with 4,096 tokens of context, steps that decode 1, 8
and 32 sequences, prompts of 512 and 2,048 tokens, and for models below a billion weights the
divergence (KL, nats a token) from float32. llama.cpp (`llama-cpp-python`, in the environment of
`--llama-python`) takes turns with ours; both have their fastest cache: bf16 here, f16 there.

Without it, real weights would take the same time as random ones, so a folder of Mistral NeMo's
exact shape is written with random codes (12.9 GB; kept if `--folder` names a place for it, and used
again). It is then loaded and decodes in this process. A step reads every weight once, so no program
can decode faster than this machine's read bandwidth over the bytes of a step; the result is the
share of that bound.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from inference import (
    DOCUMENTS,
    N_SCORED,
    Case,
    Worker,
    compare,
    divergence,
    inputs_of,
    native,
    run_step,
    weight_bytes,
)
from measure import Row, peak_memory, read_bandwidth, write_rows
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from opennemo.engine import EngineConfig, LocalEngine, SamplingParams, Token
from opennemo.files import new_folder
from opennemo.llm import LLM
from opennemo.model import compressed
from opennemo.model.attention import Packed
from opennemo.model.checkpoint import Form, load, weight_shapes, write_model
from opennemo.model.formats import FORMATS
from opennemo.model.memory import machine_memory
from opennemo.model.quantization import quantize_head_
from opennemo.model.transformer import PRESETS, ModelConfig
from opennemo.tokenizer import load_tokenizer

PREFILL, DECODED, CONTEXT = 128, 16, 4096
SMALL = 10**9  # weights, below which a model is expanded to float32 to compare with
# Few tokens behind each sequence: llama.cpp takes a minute for a thousand of them with 12B weights.
CASES = [
    Case("decode 1", 1, 128, 1, 8),
    Case("decode 8", 8, 16, 1, 3),
    Case("decode 32", 32, 16, 1, 2),
    Case("prefill 512", 1, 0, 512, 1),
    Case("prefill 2048", 1, 0, 2048, 1),
]
GOALS = {  # against llama.cpp: small models, and those of billions of weights
    "first token": (0.5, 1.0), "peak memory": (1 / 1.2, 1.5), "decode 1": (1.3, 1.0),
    "decode 8": (2.0, 3.0), "decode 32": (2.0, 3.0), "prefill 512": (2.0, 2.0),
    "prefill 2048": (2.0, 2.0), "KL": (1.0, None),
}  # fmt: skip


def write_random(folder: Path, config: ModelConfig, format: str) -> None:
    """A model folder of this shape whose weights are noise of a reasonable size."""
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


def first_token(file: str, threads: int) -> None:
    """In a fresh process: load, make room for CONTEXT tokens, say one; print the peak in bytes."""
    torch.set_num_threads(threads)
    with LLM.load(file, config=EngineConfig(n_pages=CONTEXT // 16)) as llm:
        llm.complete([1, 2, 3], max_tokens=1, temperature=0).finish()
    print(json.dumps({"peak": peak_memory()}))


def start_up(options: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Seconds from the start of a process to the first token, and peak bytes: ours, llama.cpp's."""
    ours = [
        sys.executable,
        __file__,
        "--start",
        str(options.file),
        "--threads",
        str(options.threads),
    ]
    begin = time.perf_counter()
    done = subprocess.run(ours, capture_output=True, text=True, check=True)
    mine = [time.perf_counter() - begin, json.loads(done.stdout.splitlines()[-1])["peak"]]
    begin = time.perf_counter()
    peer = Worker("llama_cpp", options.llama_python, options.file)
    peer.ask(start=options.threads)
    theirs = [time.perf_counter() - begin]
    peer.run(Case("room", 1, CONTEXT - 1, 1, 0)._replace(context=7), options.threads)
    theirs.append(peer.ask(peak=True)["peak"])
    peer.close()
    return mine, theirs


def same_file(options: argparse.Namespace) -> list[Row]:
    """Ours and llama.cpp's on one GGUF file, in turns."""
    rows: list[Row] = []
    net = load(options.file, form=Form(dtype=torch.float32, blocks=True))
    config, n_bytes = net.config, weight_bytes(net)
    small = sum(map(math.prod, weight_shapes(config).values())) < SMALL

    def add(name: str, ours: float, peer: float, unit: str, ratio: float) -> None:
        key = name.partition(",")[0]
        goal = GOALS[key][not small] if key in GOALS else None
        rows.append(
            Row(
                name=name, ours=ours, peer=peer, peer_name="llama.cpp", unit=unit, ratio=ratio,
                goal=goal,
            )
        )  # fmt: skip

    pairs = [start_up(options) for _ in range(options.rounds)]
    for i, (name, unit, scale) in enumerate((("first token", "s", 1), ("peak memory", "GB", 1e9))):
        a, b = (statistics.median(pair[side][i] for pair in pairs) for side in (0, 1))
        ratio = statistics.median(theirs[i] / mine[i] for mine, theirs in pairs)
        add(name, a / scale, b / scale, unit, ratio)
    step = native(net, options.threads)
    peer = Worker("llama_cpp", options.llama_python, options.file)
    peer.ask(start=options.threads)
    if small:
        text = "\n".join(path.read_text("utf-8") for path in sorted(DOCUMENTS.glob("*.md")))
        scored = torch.tensor(load_tokenizer(options.file).encode(text)[:N_SCORED])
        exact = load(options.file, dtype=torch.float32)
        with torch.inference_mode():
            reference = exact.output(exact(scored, Packed.of(N_SCORED))).log_softmax(-1)
        _, attend, _ = inputs_of(Case("score", 1, 0, N_SCORED, 1), config)
        ours = divergence(reference, step(scored, attend, torch.arange(N_SCORED)))
        with tempfile.TemporaryDirectory() as scratch:
            theirs = divergence(reference, peer.logits(scored.tolist(), Path(scratch)))
        add("KL", ours, theirs, "nats", theirs / ours)
    bandwidth = read_bandwidth(options.threads)
    for case in CASES:
        if case.name not in options.cases:
            continue
        mine, theirs, ratio, _ = compare(
            options.file.name, case, partial(run_step, step, config, case),
            partial(peer.run, case, options.threads), options.rounds,
        )  # fmt: skip
        add(case.name, mine, theirs, "tokens/s", ratio)
        if case.name == "decode 1":
            bandwidth = max(bandwidth, read_bandwidth(options.threads))
            reached = mine * n_bytes
            add("decode 1, of the read bandwidth", reached / 1e9, bandwidth / 1e9, "GB/s",
                reached / bandwidth)  # fmt: skip
            rows[-1] = Row(**{**vars(rows[-1]), "peer_name": "read bandwidth", "goal": 0.9})
    peer.close()
    return rows


def show(rows: list[Row], title: str) -> None:
    table = Table("", "ours", "", "peer", "", "ratio", "goal", title=title)
    for row in rows:
        goal = f"{row.goal:.2f}" if row.goal else ""
        table.add_row(
            row.name, f"{row.ours:.4g}", row.unit, f"{row.peer:.4g}", row.peer_name,
            f"{row.ratio:.2f}", goal,
        )  # fmt: skip
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--format", default="int8", choices=["int8", "fp8"])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, help="where to write the model, and keep it")
    parser.add_argument("--file", type=Path, help="a .gguf file, to run beside llama.cpp")
    names = [case.name for case in CASES]
    parser.add_argument("--cases", nargs="*", default=names, choices=names)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--llama-python", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--start", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        first_token(options.start, options.threads)
        return
    if options.file:
        rows = same_file(options)
        show(rows, f"{options.file.name}, {options.threads} threads")
        write_rows(rows, options.json)
        return
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
        engine = LocalEngine(model, [], EngineConfig(n_pages=64, n_draft_tokens=0))
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
    # The machine's best, before and after: other work on it would make our share look too good.
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
