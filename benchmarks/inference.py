"""The CPU engine against llama.cpp and transformers, side by side on the same weights.

    python benchmarks/inference.py [--model M] [--peers llama.cpp transformers openvino]
                                   [--threads 1 2] [--formats int8 fp8] [--json FILE]

One row a case: a step that decodes 1, 8 or 32 sequences with 128 tokens behind each, a step over a
prompt of 512 or 2,048, loading, and the most memory while decoding 32. Beside the speed it shows
the cost of the format: the divergence (KL, nats per token) of its next-token probabilities from
float32's, on this project's own documents. llama.cpp runs Q8_0 with its KV cache in f16, ours is in
bf16; transformers runs float32. A decode row also shows the share of this machine's read bandwidth
at which the weights of a step are read, and `layer` measures that for a layer as wide as Mistral
NeMo's, whose weights fit no cache.

llama.cpp runs in a process of its own, in the environment of `--llama-python` (this one unless
given; `pip install llama-cpp-python`), and is left out where there is none; so is OpenVINO, which
reads the same file (`--openvino-python`, `pip install openvino-genai`). Ours and a peer take
turns, case by case; a number is the median of the rounds, a ratio the median of the rounds' ratios.
A busy machine spoils clock times, so every ratio is given twice: of clock time and of processor
time. With two threads processor time counts waiting too and is only a hint.
"""

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from measure import Row, peak_memory, read_bandwidth, write_rows
from rich.console import Console
from rich.table import Table
from torch import Tensor

from opennemo.engine import EngineConfig
from opennemo.llm import LLM
from opennemo.model import export
from opennemo.model.attention import Packed, Paged
from opennemo.model.checkpoint import empty_model, load
from opennemo.model.cpu_step import NativeStep
from opennemo.model.formats import FORMATS
from opennemo.model.hub import locate
from opennemo.model.pages import Pages
from opennemo.model.quantization import QuantizedLinear, quantize_, replace_module
from opennemo.model.step import Step, compile_step
from opennemo.model.transformer import ModelConfig, Transformer
from opennemo.tokenizer import load_tokenizer

PAGE, CONTEXT = 16, 128
GOALS = {  # on two threads, against llama.cpp
    "decode 1": 1.4, "decode 8": 2.0, "decode 32": 2.0, "prefill 512": 2.0, "prefill 2048": 2.0,
}  # fmt: skip
DOCUMENTS = Path(__file__).parent.parent / "docs"
N_SCORED = 512  # tokens that quality is measured on
# As wide as Mistral NeMo, two layers deep: half a gigabyte in 8 bits.
NEMO_LAYERS = ModelConfig(n_layers=2, vocab_size=256)


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
    Case("prefill 512", 1, 0, 512, 1),
    Case("prefill 2048", 1, 0, 2048, 1),
]


class Times(NamedTuple):
    clock: list[float]  # seconds a step
    processor: list[float]


@dataclass(frozen=True, kw_only=True)
class Speed(Row):
    ratio_of_processor_time: float
    share_of_bandwidth: float | None = None
    divergence: float  # KL from float32's probabilities, nats a token
    peer_divergence: float


class Peer(NamedTuple):
    name: str
    run: Callable[[Case, int], Times]  # on so many threads
    divergence: float


def timed(step: Callable[[], object], repeats: int) -> Times:
    times = Times([], [])
    for _ in range(repeats):
        clock, processor = time.perf_counter(), time.process_time()
        step()
        times.clock.append(time.perf_counter() - clock)
        times.processor.append(time.process_time() - processor)
    return times


# ---- ours -------------------------------------------------------------------------------------


def inputs_of(case: Case, config: ModelConfig) -> tuple[Tensor, Paged, Tensor]:
    """Random tokens, in shuffled pages of a cache that is full of numbers."""
    length = case.context + case.tokens
    n_pages = -(-length // PAGE)
    table = torch.randperm(case.sequences * n_pages).view(case.sequences, n_pages)
    place = torch.arange(case.context, length)
    slots = table[:, place // PAGE] * PAGE + place % PAGE
    pages = Pages.empty(config, table.numel(), PAGE, "bf16")
    pages.codes.normal_()
    attend = Paged(
        pages=pages,
        positions=place.repeat(case.sequences),
        slots=slots.flatten(),
        cu_seqlens=torch.arange(case.sequences + 1) * case.tokens,
        max_seqlen=case.tokens,
        context_lens=torch.full((case.sequences,), length),
        page_table=table.int(),
    )
    tokens = torch.randint(0, config.vocab_size, (case.sequences * case.tokens,))
    return tokens, attend, torch.arange(1, case.sequences + 1) * case.tokens - 1


def native(net: Transformer, threads: int) -> Step:
    step = compile_step(net, threads)
    assert isinstance(step, NativeStep), "no C++ compiler"
    return step


def run_step(step: Step, config: ModelConfig, case: Case) -> Times:
    inputs = inputs_of(case, config)
    step(*inputs)
    return timed(lambda: step(*inputs), case.repeats)


def rounded(model: Path, format: str) -> Transformer:
    net = load(model, dtype=torch.float32)
    if format != "fp32":
        # llama.cpp's head is in 8 bits as well. FP8 has it in int8, as its own is coarser.
        quantize_(net, FORMATS[format], head=FORMATS["int8" if format == "fp8" else format])
    return net


def weight_bytes(net: Transformer) -> int:
    """Bytes that a step reads: everything but the embedding, of which it reads a row."""
    state = net.state_dict()
    return sum(tensor.nbytes for name, tensor in state.items() if "tok_embeddings" not in name)


def nemo_layers(format: str) -> Transformer:
    """Random codes, in layers as wide as Mistral NeMo's."""
    net = empty_model(NEMO_LAYERS)
    for name, parameter in list(net.named_parameters()):
        path, rows = name.removesuffix(".weight"), len(parameter)
        if name.startswith("layers.") and parameter.dim() == 2:
            # Codes below the exponents of NaN in E4M3.
            codes = torch.randint(0, 120, parameter.shape, dtype=torch.uint8)
            codes = codes.view(FORMATS[format].weights.dtype)
            replace_module(
                net,
                path,
                QuantizedLinear(
                    FORMATS[format],
                    parameter.shape,
                    {"weight": codes, "scale": torch.ones(rows, 1)},
                ),
            )
        else:
            weight = torch.nn.Parameter(torch.ones(parameter.shape), requires_grad=False)
            net.get_submodule(path).register_parameter("weight", weight)
    return net


# ---- peers ------------------------------------------------------------------------------------


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


class Worker:
    """llama.cpp or OpenVINO in a process of its own."""

    def __init__(self, kind: str, python: str, model: Path):
        worker = Path(__file__).with_name(f"{kind}_worker.py")
        self.kind = kind
        self.process = subprocess.Popen(
            [python, str(worker), str(model)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def ask(self, **question: object) -> dict:
        assert self.process.stdin and self.process.stdout
        print(json.dumps(question), file=self.process.stdin, flush=True)
        # OpenVINO writes to standard output, too.
        while (line := self.process.stdout.readline()) and not line.startswith("{"):
            continue
        if not line:
            raise SystemExit(f"{self.kind}'s process has ended")
        return json.loads(line)

    def run(self, case: Case, threads: int) -> Times:
        times = self.ask(**case._asdict(), threads=threads)
        return Times(times["seconds"], times["cpu_seconds"])

    def logits(self, tokens: list[int], scratch: Path) -> Tensor:
        self.ask(score=tokens, file=str(scratch / "logits.npy"))
        return torch.from_numpy(np.load(scratch / "logits.npy"))

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def transformers(model: Path) -> Callable[[Case, int], Times]:
    """transformers, eager in float32."""
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings(action="ignore"):
        net = AutoModelForCausalLM.from_pretrained(
            model.parent, gguf_file=model.name, dtype=torch.float32
        )

    @torch.inference_mode()
    def run(case: Case, threads: int) -> Times:
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


# ---- measurements -----------------------------------------------------------------------------


def divergence(reference: Tensor, logits: Tensor) -> float:
    """KL(reference || found) of next-token probabilities, nats a token."""
    found = logits.float().log_softmax(-1)
    return float((reference.exp() * (reference - found)).sum(-1).mean())


def compare(name: str, case: Case, mine: Callable[[], Times], peer: Callable[[], Times],
            rounds: int) -> tuple[float, float, float, float]:  # fmt: skip
    """Take turns -> tokens a second of ours and the peer, and both ratios, medians of rounds."""
    n = case.sequences * case.tokens
    pairs = [(mine(), peer()) for _ in range(rounds)]
    middle = statistics.median
    ours_s = middle([middle(a.clock) for a, _ in pairs])
    peer_s = middle([middle(b.clock) for _, b in pairs])
    ratio = middle([middle(b.clock) / middle(a.clock) for a, b in pairs])
    processor = middle([middle(b.processor) / middle(a.processor) for a, b in pairs])
    print(f"  {name}, {case.name}: {ratio:.2f} ({processor:.2f})", file=sys.stderr)
    return n / ours_s, n / peer_s, ratio, processor


def speed(model: Path, peers: list[Peer], scored: Tensor, reference: Tensor,
          options: argparse.Namespace) -> list[Row]:  # fmt: skip
    rows = []
    for threads in options.threads:
        bandwidth = read_bandwidth(threads)
        print(f"{threads} threads read {bandwidth / 1e9:.1f} GB/s", file=sys.stderr)
        for format in options.formats:
            net = rounded(model, format)
            config, n_bytes, step = net.config, weight_bytes(net), native(net, threads)
            _, attend, _ = inputs_of(Case("score", 1, 0, len(scored), 1), config)
            cost = divergence(reference, step(scored, attend, torch.arange(len(scored))))
            for peer, case in itertools.product(peers, CASES):
                # transformers is several times slower: once is enough to say so. OpenVINO answers
                # one prompt at a time here.
                alone = case.sequences == 1 or "OpenVINO" not in peer.name
                if alone and ("llama" in peer.name or threads == max(options.threads)):
                    name = f"{format}, {case.name}, {threads} thread{'s' * (threads > 1)}"
                    mine, theirs, ratio, processor = compare(
                        f"{name} to {peer.name}", case, partial(run_step, step, config, case),
                        partial(peer.run, case, threads), options.rounds,
                    )  # fmt: skip
                    goal = GOALS[case.name] if "llama" in peer.name and threads > 1 else None
                    if "OpenVINO" in peer.name and case.context == 0 and format == "int8":
                        goal = 1.0
                    if goal and format == "fp8":
                        goal = 1.0 if case.name.startswith("decode") else None
                    share = mine * n_bytes / bandwidth if case.name == "decode 1" else None
                    rows.append(
                        Speed(
                            name=name, ours=mine, peer=theirs, peer_name=peer.name,
                            unit="tokens/s", ratio=ratio, ratio_of_processor_time=processor,
                            goal=goal, share_of_bandwidth=share, divergence=cost,
                            peer_divergence=peer.divergence,
                        )
                    )  # fmt: skip
            net = nemo_layers(format)
            n_bytes, step = weight_bytes(net), native(net, threads)
            times = [run_step(step, NEMO_LAYERS, CASES[0]) for _ in range(options.rounds)]
            seconds = statistics.median([statistics.median(t.clock) for t in times])
            reached = n_bytes / seconds
            rows.append(
                Row(
                    name=f"{format}, layers of NeMo, {threads} thread{'s' * (threads > 1)}",
                    ours=reached / 1e9, peer=bandwidth / 1e9, peer_name="read bandwidth",
                    unit="GB/s", ratio=reached / bandwidth, goal=0.85,
                )
            )  # fmt: skip
            print(f"  {rows[-1].name}: {rows[-1].ratio:.0%} of bandwidth", file=sys.stderr)
    return rows


def start_ours(folder: str, threads: int) -> None:
    """In a fresh process: load, say a token, decode 32 sequences; print seconds and peak bytes."""
    torch.set_num_threads(threads)
    start = time.perf_counter()
    with LLM.load(
        folder, config=EngineConfig(n_pages=32 * (CONTEXT // PAGE + 1), n_draft_tokens=0)
    ) as llm:
        llm.complete([1, 2, 3], max_tokens=1, temperature=0).finish()
        seconds = time.perf_counter() - start
        prompts = [[100 + (31 * i + 7 * s) % 40_000 for i in range(CONTEXT)] for s in range(32)]
        replies = [llm.complete(p, max_tokens=8, temperature=0, ignore_eos=True) for p in prompts]
        for reply in replies:
            reply.finish()
    print(json.dumps({"seconds": seconds, "peak": peak_memory()}))


def start_up(model: Path, q8_0: Path, format: str, scratch: Path,
             options: argparse.Namespace) -> list[Row]:  # fmt: skip
    """Loading, and the most memory, each time in a fresh process."""
    folder = scratch / format
    export.quantize(model, folder, format=format)
    threads, mine, theirs = max(options.threads), [], []
    for _ in range(max(3, options.rounds)):
        command = [sys.executable, __file__, "--start", str(folder), "--threads", str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        mine.append(json.loads(done.stdout.splitlines()[-1]))
        peer = Worker("llama_cpp", options.llama_python, q8_0)
        theirs.append(peer.ask(start=threads))
        peer.run(CASES[2], threads)
        theirs[-1]["peak"] = peer.ask(peak=True)["peak"]
        peer.close()
    middle = lambda of, key: statistics.median(x[key] for x in of)  # noqa: E731
    rows = []
    for key, name, unit, scale in (("seconds", "load", "s", 1), ("peak", "peak memory", "MB", 1e6)):
        a, b = middle(mine, key) / scale, middle(theirs, key) / scale
        rows.append(
            Row(
                name=f"{format}, {name}", ours=a, peer=b, peer_name="llama.cpp Q8_0", unit=unit,
                ratio=b / a,
            )
        )  # fmt: skip
    return rows


def show(rows: list[Row]) -> None:
    table = Table("case", "ours", "peer", "", "", "ratio", "goal", "of CPU time", "bandwidth", "KL")
    for row in rows:
        more = []
        if isinstance(row, Speed):
            share = row.share_of_bandwidth
            more = [
                f"{row.ratio_of_processor_time:.2f}", "" if share is None else f"{share:.0%}",
                f"{row.divergence:.4f} to {row.peer_divergence:.4f}",
            ]  # fmt: skip
        table.add_row(
            row.name, f"{row.ours:.1f}", row.peer_name, f"{row.peer:.1f}", row.unit,
            f"{row.ratio:.2f}", f"{row.goal:.2f}" if row.goal else "", *more,
        )  # fmt: skip
    Console(width=140).print(table)


def has(peer: str, python: str, module: str, options: argparse.Namespace) -> bool:
    """Whether a peer was asked for and is there."""
    if peer not in options.peers:
        return False
    probe = [python, "-c", f"import {module}"]
    found = not subprocess.run(probe, capture_output=True, check=False).returncode
    if not found:
        print(f"{peer} is left out: {python} has no {module}", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, help="a .gguf file; by default the built-in model")
    parser.add_argument("--formats", nargs="+", default=["int8", "fp8"], choices=["int8", "fp8"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--peers", nargs="*", default=["llama.cpp", "transformers"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--llama-python", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--openvino-python", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--start", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        start_ours(options.start, options.threads[0])
        return
    model = options.model or locate("smollm2-135m-instruct")
    text = "\n".join(path.read_text("utf-8") for path in sorted(DOCUMENTS.glob("*.md")))
    scored = torch.tensor(load_tokenizer(model).encode(text)[:N_SCORED])
    exact = load(model, dtype=torch.float32)
    with torch.inference_mode():
        reference = exact.output(exact(scored, Packed.of(N_SCORED))).log_softmax(-1)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        scratch, peers = Path(name), []
        q8_0 = scratch / "q8_0.gguf"
        as_q8_0(model, q8_0)
        if has("llama.cpp", options.llama_python, "llama_cpp", options):
            for format in options.formats:
                rows += start_up(model, q8_0, format, scratch, options)
            llama = Worker("llama_cpp", options.llama_python, q8_0)
            llama.ask(start=1)
            cost = divergence(reference, llama.logits(scored.tolist(), scratch))
            peers.append(Peer("llama.cpp Q8_0", llama.run, cost))
        if has("openvino", options.openvino_python, "openvino_genai", options):
            openvino = Worker("openvino", options.openvino_python, q8_0)
            peers.append(Peer("OpenVINO Q8_0", openvino.run, math.nan))
        if "transformers" in options.peers:
            peers.append(Peer("transformers fp32", transformers(model), 0.0))
        rows += speed(model, peers, scored, reference, options)
    show(rows)
    write_rows(rows, options.json)


if __name__ == "__main__":
    main()
