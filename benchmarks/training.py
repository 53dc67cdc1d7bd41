"""A training step against transformers' (Trainer and a plain loop) and litgpt's: same shapes.

    python benchmarks/training.py [--shapes 15m 54m] [--peers transformers trainer litgpt]
                                  [--compile] [--threads 1] [--json FILE]

Four sequences of 256 random tokens a step, forward, loss, backward, AdamW, in float32 on a CPU; the
head is tied. Ours and a peer take turns, step by step (the Trainer, which cannot be stopped between
steps, block by block). Numbers are tokens a second of processor time, the median over steps; a
ratio is the median of neighbours' ratios. MFU is the share of what a large matrix product of this
machine reaches, in the same process and time. Two more rows: the extra cost of a step under FP8's
rounding, and the share of it that waits for data.

litgpt is left out where it is not installed (`pip install litgpt==0.5.9 --no-deps` and lightning).
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import Row, write_rows
from rich.console import Console
from rich.table import Table

from opennemo.model.formats import FORMATS
from opennemo.model.parallel import shard_
from opennemo.model.quantization import prepare_qat_
from opennemo.model.transformer import ModelConfig, Transformer
from opennemo.train.config import Optim
from opennemo.train.metrics import matmul_flops
from opennemo.train.objectives import next_token
from opennemo.train.optim import clip, optimizers
from opennemo.train.packing import IGNORED, Batch
from opennemo.train.setup import initialise_

SEQUENCES, LENGTH = 4, 256
TOKENS = SEQUENCES * LENGTH
SHAPES = {
    "15m": ModelConfig(
        dim=288, n_layers=6, n_heads=6, n_kv_heads=6, head_dim=48, hidden_dim=768,
        vocab_size=32000, max_position_embeddings=1024, tied_embeddings=True,
    ),
    "54m": ModelConfig(
        dim=512, n_layers=12, n_heads=8, n_kv_heads=4, head_dim=64, hidden_dim=1792,
        vocab_size=32768, max_position_embeddings=1024, tied_embeddings=True,
    ),
}  # fmt: skip
# Against transformers' Trainer; and how much longer a step under rounding may take.
GOALS = {("15m", "trainer"): 1.3, ("54m", "trainer"): 1.15}
MAX_QAT = 1.6
Step = Callable[[], float]  # does one, gives its seconds of processor time


def timed(step: Callable[[], Any]) -> Step:
    def run() -> float:
        start = time.process_time()
        step()
        return time.process_time() - start

    return run


def batches(vocab_size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocab_size, (SEQUENCES, LENGTH), generator=generator) for _ in range(8)]


def ours(shape: ModelConfig, compiled: bool, format: str | None = None) -> Step:
    """The trainer's own step, without its record."""
    model = initialise_(Transformer(shape), 0).train()
    if format:
        prepare_qat_(model, FORMATS[format])
    shard_(model, None, compile=compiled)
    found = optimizers(model, Optim())
    parameters = list(model.parameters())
    cu_seqlens = torch.arange(0, TOKENS + 1, LENGTH).int()
    ready = []
    for ids in batches(shape.vocab_size):
        targets = torch.full((SEQUENCES, LENGTH), IGNORED)
        targets[:, :-1] = ids[:, 1:]
        ready.append(
            Batch(
                tokens=ids.flatten(), targets=targets.flatten(), cu_seqlens=cu_seqlens,
                max_seqlen=LENGTH, window=None, n_units=TOKENS - SEQUENCES,
            )
        )  # fmt: skip
    done = 0

    def step() -> None:
        nonlocal done
        batch, done = ready[done % len(ready)], done + 1
        loss, _ = next_token(model, batch)
        (loss / batch.n_units).backward()
        clip(parameters, 1.0)
        for optimizer in found:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return timed(step)


def huggingface(shape: ModelConfig) -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(
        MistralConfig(
            hidden_size=shape.dim, num_hidden_layers=shape.n_layers,
            num_attention_heads=shape.n_heads, num_key_value_heads=shape.n_kv_heads,
            head_dim=shape.head_dim, intermediate_size=shape.hidden_dim,
            vocab_size=shape.vocab_size, tie_word_embeddings=True, sliding_window=None,
            max_position_embeddings=shape.max_position_embeddings,
        )
    ).train()  # fmt: skip


def transformers(shape: ModelConfig, compiled: bool) -> Step:
    """A plain loop around transformers' model."""
    model = huggingface(shape)
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, fused=True)
    ready, done = batches(shape.vocab_size), 0

    def step() -> None:
        nonlocal done
        ids, done = ready[done % len(ready)], done + 1
        forward(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return timed(step)


def litgpt(shape: ModelConfig, compiled: bool) -> Step:
    from litgpt.config import Config  # pyright: ignore[reportMissingImports]
    from litgpt.model import GPT  # pyright: ignore[reportMissingImports]

    model = GPT(
        Config(
            n_embd=shape.dim, n_layer=shape.n_layers, n_head=shape.n_heads,
            n_query_groups=shape.n_kv_heads, head_size=shape.head_dim, bias=False,
            intermediate_size=shape.hidden_dim, vocab_size=shape.vocab_size,
            padded_vocab_size=shape.vocab_size, block_size=LENGTH, rotary_percentage=1.0,
            parallel_residual=False, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP",
        )
    ).train()  # fmt: skip
    model.lm_head.weight = model.transformer.wte.weight
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, fused=True)
    ready, done = batches(shape.vocab_size), 0

    def step() -> None:
        nonlocal done
        ids, done = ready[done % len(ready)], done + 1
        logits = forward(ids)[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return timed(step)


def trainer(shape: ModelConfig, compiled: bool, n_steps: int) -> list[float]:
    """Seconds of each step of transformers' Trainer, from the end of one to the end of the next."""
    import tempfile

    from transformers import Trainer, TrainerCallback, TrainingArguments

    ends: list[float] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.process_time())

    rows = [ids for batch in batches(shape.vocab_size) for ids in batch]
    data = [{"input_ids": ids, "labels": ids} for ids in rows * (n_steps + 4)]
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, per_device_train_batch_size=SEQUENCES, max_steps=n_steps + 2, use_cpu=True,
            report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
            optim="adamw_torch_fused", torch_compile=compiled,
        )  # fmt: skip
        Trainer(huggingface(shape), settings, train_dataset=data, callbacks=[Watch()]).train()  # pyright: ignore
    return [b - a for a, b in itertools.pairwise(ends[1:])]


PEERS = {"transformers": transformers, "litgpt": litgpt}


def flops(shape: ModelConfig) -> float:
    weights = sum(p.numel() for p in Transformer(shape).parameters() if p.dim() == 2)
    attention = 12.0 * shape.n_layers * shape.n_heads * shape.head_dim * SEQUENCES * LENGTH**2 / 2
    return 6.0 * weights * TOKENS + attention


def pairs(mine: Step, theirs: Step, rounds: int) -> tuple[list[float], list[float]]:
    """In turns, after two steps each that do not count."""
    for _ in range(2):
        mine()
        theirs()
    seconds = [(mine(), theirs()) for _ in range(rounds)]
    return [a for a, _ in seconds], [b for _, b in seconds]


def row(name: str, peer: str, mine: list[float], theirs: list[float], goal: float | None) -> Row:
    ratio = statistics.median(b / a for a, b in zip(mine, theirs, strict=True))
    speed = [TOKENS / statistics.median(seconds) for seconds in (mine, theirs)]
    return Row(name=name, ours=speed[0], peer=speed[1], peer_name=peer, ratio=ratio, goal=goal)


def measured(name: str, options: argparse.Namespace) -> list[Row]:
    shape, rounds, rows = SHAPES[name], options.rounds, []
    how = "compiled" if options.compile else "eager"
    step = ours(shape, options.compile)
    for peer in options.peers:
        label, goal = f"{name}, {how}", GOALS.get((name, peer))
        if peer == "trainer":
            mine, theirs = [], []
            for _ in range(2):
                [step() for _ in range(2)]
                theirs += trainer(shape, options.compile, rounds // 2)
                mine += [step() for _ in range(len(theirs) - len(mine))]
            rows.append(row(label, "transformers' Trainer", mine, theirs, goal))
            continue
        try:
            theirs_step = PEERS[peer](shape, options.compile)
        except ImportError as error:
            print(f"{peer} is left out: {error}")
            continue
        rows.append(row(label, peer, *pairs(step, theirs_step, rounds), goal))
    seconds = [step() for _ in range(rounds)]
    reached = flops(shape) / statistics.median(seconds)
    most = matmul_flops(torch.device("cpu"), torch.float32) / options.threads
    rows.append(
        Row(
            name=f"{name}, {how}, MFU", ours=reached / 1e9, peer=most / 1e9,
            peer_name="a large product", unit="GFLOPS a core", ratio=reached / most,
            goal=0.75 if name == "54m" else None,
        )
    )  # fmt: skip
    rounded = ours(shape, options.compile, "fp8-static")
    mine, plain = pairs(rounded, step, rounds)
    rows.append(row(f"{name}, {how}, under FP8's rounding", "without", mine, plain, 1 / MAX_QAT))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--peers", nargs="*", default=["transformers", "trainer", "litgpt"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [row for name in options.shapes for row in measured(name, options)]
    table = Table("case", "ours", "peer", "", "", "ratio", "goal")
    for r in rows:
        goal = "" if r.goal is None else f"{r.goal:.2f}"
        table.add_row(
            r.name, f"{r.ours:,.0f}", r.peer_name, f"{r.peer:,.0f}", r.unit, f"{r.ratio:.2f}", goal
        )
    Console().print(table)
    write_rows(rows, options.json)


if __name__ == "__main__":
    main()
