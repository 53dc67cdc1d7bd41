"""How fast a step is on this CPU: ours against llama.cpp and transformers, on the same weights.

    python benchmarks/kernels.py [MODEL.gguf] [--threads 1 2] [--formats int8 fp8] [--json FILE]

llama.cpp gets the same model in Q8_0, written from the file's own weights; it runs in a process of
its own, from the environment that `--llama-python` names (`pip install llama-cpp-python`), and is
left out where there is none. transformers runs here, in float32. Ours and a peer take turns, case
by case; a number is the median of the rounds.

A busy machine spoils clock times, so every ratio comes twice: of the clock, and of processor time.
With two threads processor time counts waiting too and is only a hint.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import gguf
import torch
from gguf.quants import dequantize, quantize
from rich.console import Console
from rich.table import Table

from opennemo.model.attention import Paged
from opennemo.model.checkpoint import load
from opennemo.model.cpu import NativeStep, compile_step
from opennemo.model.hub import locate
from opennemo.model.pages import Pages
from opennemo.model.quantization import FORMATS, quantize_

PAGE, CONTEXT, PREFILL = 16, 128, 512
GOALS = {  # on two threads, against llama.cpp
    "decode 1": 1.4, "decode 8": 2.0, "decode 32": 2.0, f"prefill {PREFILL}": 2.0,
}  # fmt: skip


class Case(NamedTuple):
    name: str
    sequences: int
    context: int  # tokens each sequence has behind it
    tokens: int  # new ones of each, in one step
    repeats: int


CASES = [
    Case("decode 1", 1, CONTEXT, 1, 16),
    Case("decode 8", 8, CONTEXT, 1, 6),
    Case("decode 32", 32, CONTEXT, 1, 3),
    Case(f"prefill {PREFILL}", 1, 0, PREFILL, 1),
]


class Times(NamedTuple):
    clock: list[float]  # seconds a step
    processor: list[float]


@dataclass(frozen=True, kw_only=True)
class Row:
    name: str
    ours: float
    peer: float
    peer_name: str
    unit: str
    ratio: float
    ratio_of_processor_time: float
    goal: float | None
    share_of_bandwidth: float | None


Runner = Callable[[Case], Times]


def timed(step: Callable[[], object], repeats: int) -> Times:
    times = Times([], [])
    for _ in range(repeats):
        clock, processor = time.perf_counter(), time.process_time()
        step()
        times.clock.append(time.perf_counter() - clock)
        times.processor.append(time.process_time() - processor)
    return times


def ours(model: Path, format: str, threads: int) -> tuple[Runner, int]:
    """A runner of our step, and the bytes of weights that a step reads."""
    torch.set_num_threads(threads)
    net = load(model, device="cpu", dtype=torch.float32)
    if format != "fp32":
        # llama.cpp's head is in 8 bits as well. FP8 has it in int8, as its own is coarser.
        quantize_(net, FORMATS[format], head=FORMATS["int8" if format == "fp8" else format])
    state = net.state_dict()
    n_bytes = sum(t.nbytes for name, t in state.items() if "tok_embeddings" not in name)
    step = compile_step(net, threads)
    assert isinstance(step, NativeStep), "no C++ compiler"
    config = net.config

    def run(case: Case) -> Times:
        length = case.context + case.tokens
        n_pages = -(-length // PAGE)
        table = torch.randperm(case.sequences * n_pages).view(case.sequences, n_pages)
        place = torch.arange(case.context, length)
        slots = table[:, place // PAGE] * PAGE + place % PAGE
        shape = (config.n_layers, 2, table.numel(), PAGE, config.n_kv_heads, config.head_dim)
        attend = Paged(
            pages=Pages(torch.randn(shape)),
            positions=place.repeat(case.sequences),
            slots=slots.flatten(),
            cu_seqlens=torch.arange(case.sequences + 1) * case.tokens,
            max_seqlen=case.tokens,
            context_lens=torch.full((case.sequences,), length),
            page_table=table.int(),
        )
        tokens = torch.randint(0, config.vocab_size, (case.sequences * case.tokens,))
        rows = torch.arange(1, case.sequences + 1) * case.tokens - 1
        step(tokens, attend, rows)
        return timed(lambda: step(tokens, attend, rows), case.repeats)

    return run, n_bytes


def as_q8_0(source: Path, target: Path) -> None:
    """The same model with its matrices in llama.cpp's 8-bit format."""
    kinds, array = gguf.GGMLQuantizationType, gguf.GGUFValueType.ARRAY
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(target, "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind, inner = field.types[0], field.types[-1]
            value = 7 if field.name == "general.file_type" else field.contents()
            writer.add_key_value(field.name, value, kind, sub_type=inner if kind == array else None)
    for tensor in reader.tensors:
        if len(tensor.shape) == 2:
            data = quantize(dequantize(tensor.data, tensor.tensor_type), kinds.Q8_0)
            writer.add_tensor(tensor.name, data, raw_dtype=kinds.Q8_0)
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp(python: str, model: Path) -> Callable[[int], Runner] | None:
    """llama.cpp in a process of its own; None if that environment has none."""
    found = subprocess.run([python, "-c", "import llama_cpp"], capture_output=True, check=False)
    if found.returncode:
        return None
    worker = Path(__file__).with_name("llama_cpp_worker.py")
    process = subprocess.Popen(
        [python, str(worker), str(model)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdin and process.stdout
    question, answer = process.stdin, process.stdout

    def with_threads(threads: int) -> Runner:
        def run(case: Case) -> Times:
            print(json.dumps(case._asdict() | {"threads": threads}), file=question, flush=True)
            line = answer.readline()
            if not line:
                raise SystemExit("llama.cpp's process has ended")
            times = json.loads(line)
            return Times(times["seconds"], times["cpu_seconds"])

        return run

    return with_threads


def transformers(model: Path) -> Callable[[int], Runner]:
    """transformers, eager in float32."""
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings(action="ignore"):
        net = AutoModelForCausalLM.from_pretrained(
            model.parent, gguf_file=model.name, dtype=torch.float32
        )

    def with_threads(threads: int) -> Runner:
        @torch.inference_mode()
        def run(case: Case) -> Times:
            torch.set_num_threads(threads)
            total = Times([], [])
            past = torch.randint(0, 1000, (case.sequences, case.context))
            new = torch.randint(0, 1000, (case.sequences, case.tokens))
            cache = net(past, logits_to_keep=1).past_key_values if case.context else None
            for _ in range(max(1, case.repeats // 4)):
                once = timed(lambda: net(new, past_key_values=cache, logits_to_keep=1), 1)
                if cache is not None:
                    cache.crop(-case.tokens)
                total.clock.extend(once.clock)
                total.processor.extend(once.processor)
            return total

        return run

    return with_threads


def read_bandwidth(threads: int) -> float:
    """Bytes a second that this machine reads from memory, the best of some tries."""
    torch.set_num_threads(threads)
    block = torch.ones(1 << 26)
    return block.nbytes / min(timed(block.sum, 7).clock)


def compare(
    name: str, case: Case, run: Runner, peer: Runner, rounds: int
) -> tuple[float, float, float, float]:
    """Take turns -> tokens a second of ours and the peer, and both ratios, medians of rounds."""
    n = case.sequences * case.tokens
    pairs = [(run(case), peer(case)) for _ in range(rounds)]
    middle = statistics.median
    ours_s = middle([middle(a.clock) for a, _ in pairs])
    peer_s = middle([middle(b.clock) for _, b in pairs])
    ratio = middle([middle(b.clock) / middle(a.clock) for a, b in pairs])
    processor = middle([middle(b.processor) / middle(a.processor) for a, b in pairs])
    print(f"  {name}, {case.name}: {ratio:.2f} ({processor:.2f})", file=sys.stderr)
    return n / ours_s, n / peer_s, ratio, processor


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="?", type=Path, help="a .gguf file; the built-in model")
    parser.add_argument("--formats", nargs="+", default=["int8", "fp8"], choices=list(FORMATS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--peers", nargs="*", default=["llama.cpp", "transformers"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--llama-python", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    options = parser.parse_args()
    model = options.model or locate("smollm2-135m-instruct")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        peers = {}
        if "llama.cpp" in options.peers:
            as_q8_0(model, Path(scratch) / "q8_0.gguf")
            peers["llama.cpp Q8_0"] = llama_cpp(options.llama_python, Path(scratch) / "q8_0.gguf")
            if peers["llama.cpp Q8_0"] is None:
                print("llama.cpp is left out: pip install llama-cpp-python", file=sys.stderr)
        if "transformers" in options.peers:
            peers["transformers fp32"] = transformers(model)
        for threads in options.threads:
            bandwidth = read_bandwidth(threads)
            for format in options.formats:
                run, n_bytes = ours(model, format, threads)
                for peer_name, with_threads in peers.items():
                    if with_threads is None:
                        continue
                    for case in CASES:
                        name = f"{format}, {case.name}, {threads} thread{'s' * (threads > 1)}"
                        mine, theirs, ratio, processor = compare(
                            peer_name, case, run, with_threads(threads), options.rounds
                        )
                        goal = GOALS[case.name] if "llama" in peer_name and threads > 1 else None
                        if goal and format == "fp8":
                            goal = 1.0 if case.name.startswith("decode") else None
                        share = mine * n_bytes / bandwidth if case.name == "decode 1" else None
                        rows.append(
                            Row(
                                name=name, ours=mine, peer=theirs, peer_name=peer_name,
                                unit="tokens/s", ratio=ratio, ratio_of_processor_time=processor,
                                goal=goal, share_of_bandwidth=share,
                            )
                        )  # fmt: skip
            print(f"{threads} threads read {bandwidth / 1e9:.1f} GB/s", file=sys.stderr)
    table = Table("case", "ours", "peer", "tokens/s", "ratio", "of CPU time", "goal", "bandwidth")
    for row in rows:
        goal = f"{row.goal:.1f}" if row.goal else ""
        share = f"{row.share_of_bandwidth:.0%}" if row.share_of_bandwidth else ""
        table.add_row(
            row.name, f"{row.ours:.1f}", row.peer_name, f"{row.peer:.1f}", f"{row.ratio:.2f}",
            f"{row.ratio_of_processor_time:.2f}", goal, share,
        )  # fmt: skip
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1), "utf-8")


if __name__ == "__main__":
    main()
