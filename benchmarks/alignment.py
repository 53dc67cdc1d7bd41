"""What computing a prompt once saves, and whether engine and trainer find the same probabilities.

    python benchmarks/alignment.py [--model smollm2-135m-instruct] [--threads 1] [--rounds 3]
                                   [--formats fp32 int8 fp8 int4 q4_1] [--json FILE]

First a training step on 8 answers of 50 tokens to one prompt of 500, packed with the prompt once
(`Forked`) and once for each answer; then on a pair of answers. The goal follows from arithmetic:
products with the blocks' weights for every token, with the head for learned tokens, attention for
visible pairs. The model has 15 million weights. Steps take turns; the ratio is the median of
neighbours' ratios of processor time.

Then answers are drawn from a model that learns in a number format, and the log-probability of every
token under the engine that drew it is compared with the trainer's. The order of additions differs,
and decides numbers on the border of two codes; for comparison, the trainer's own numbers are
computed with sums in float64, with the same roundings to codes.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from measure import Row, write_rows
from rich.console import Console
from rich.table import Table
from torch import Tensor

from opennemo.model.checkpoint import Form, load, open_checkpoint
from opennemo.model.formats import by_name
from opennemo.model.hub import locate
from opennemo.model.quantization import prepare_qat_
from opennemo.model.transformer import ModelConfig, Transformer
from opennemo.rollouts import Rollouts
from opennemo.tokenizer import load_tokenizer
from opennemo.tokenizer.chat import encode_chat
from opennemo.train.conversations import Example
from opennemo.train.objectives import head_losses, hidden_of_targets, next_token
from opennemo.train.packing import Batch, collate, pack
from opennemo.train.setup import initialise_

PROMPT, ANSWER = 500, 50
SMALL = ModelConfig(
    dim=288, n_layers=6, n_heads=6, n_kv_heads=6, head_dim=48, hidden_dim=768, vocab_size=32000,
    max_position_embeddings=1024, tied_embeddings=True,
)  # fmt: skip
ASKED = ["Name three rivers.", "What is 17 + 25?", "Write a line about the sea.", "Say hello."]


def example(prompt: list[int], answer: list[int]) -> Example:
    ids = np.array([*prompt, *answer], np.uint32)
    return Example(ids, np.arange(len(ids)) >= len(prompt))


def answers(n: int, vocab_size: int) -> list[Example]:
    rng = np.random.default_rng(0)
    prompt = rng.integers(vocab_size, size=PROMPT).tolist()
    return [example(prompt, rng.integers(vocab_size, size=ANSWER).tolist()) for _ in range(n)]


def seconds(model: Transformer, batch: Batch) -> float:
    """Processor seconds for a loss and its gradients."""
    start = time.process_time()
    loss, _ = next_token(model, batch)
    loss.backward()
    model.zero_grad(set_to_none=True)
    return time.process_time() - start


def operations(model: Transformer, batch: Batch) -> float:
    """The cost of a step, in multiply-adds of one forward pass."""
    config, blocks = model.config, sum(p.numel() for p in model.layers.parameters())
    head = config.vocab_size * config.dim * batch.n_units
    width = config.n_layers * config.n_heads * config.head_dim
    return blocks * len(batch.tokens) + head + 2 * width * batch.n_seen


def sharing(model: Transformer, n: int, rounds: int) -> Row:
    examples = answers(n, model.config.vocab_size)
    forked, separate = (
        collate([pack([examples])], None),
        collate([pack([[e]]) for e in examples], None),
    )
    pairs = [(seconds(model, forked), seconds(model, separate)) for _ in range(rounds + 1)][1:]
    ours, peer = (statistics.median(x) for x in zip(*pairs, strict=True))
    return Row(
        name=f"{n} answers of {ANSWER} to a prompt of {PROMPT}", ours=ours, peer=peer,
        peer_name="separate", unit="s a step", ratio=statistics.median(b / a for a, b in pairs),
        goal=operations(model, separate) / operations(model, forked),
    )  # fmt: skip


@torch.no_grad()
def differences(path: Path, format: str, n: int, max_tokens: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities (T',): engine against trainer, and trainer in float32 and float64."""
    model = load(open_checkpoint(path), form=Form(dtype=torch.float32))
    if format != "fp32":
        prepare_qat_(model, by_name(format))
    tokenizer = load_tokenizer(path)
    prompts = [encode_chat(tokenizer, [{"role": "user", "content": text}]) for text in ASKED]
    groups = Rollouts(tokenizer)(
        model, prompts, n=n, max_tokens=max_tokens, seeds=range(len(prompts))
    )
    units = [
        [example(prompt, answer.ids) for answer in group]
        for prompt, group in zip(prompts, groups, strict=True)
    ]
    batch = collate([pack(units)], None)

    def computed() -> Tensor:
        hidden, targets, _ = hidden_of_targets(model.train(), batch)
        return -head_losses(model, hidden, targets, reduction="none")

    ours = computed()
    drawn = torch.tensor([x for group in groups for answer in group for x in answer.log_probs])
    model.double()
    return (ours - drawn).abs(), (ours - computed()).abs()


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--answers", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--formats", nargs="*", default=["fp32", "int8", "fp8", "int4", "q4_1"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    path, console = locate(options.model), Console()
    model = initialise_(Transformer(SMALL), 0).train()
    rows = [sharing(model, n, options.rounds) for n in (8, 2)]
    table = Table("case", "forked, s", "separate, s", "ratio", "by arithmetic")
    for row in rows:
        figures = (row.ours, row.peer, row.ratio, row.goal)
        table.add_row(row.name, *(f"{x:.2f}" for x in figures))
    console.print(table)
    table = Table(
        "format", "tokens", "below 1e-5", "mean", "largest", "in float64: mean", "largest"
    )
    for format in options.formats:
        gap, noise = differences(path, format, options.answers, options.max_tokens)
        figures = (gap.mean(), gap.max(), noise.mean(), noise.max())
        share = f"{float((gap < 1e-5).float().mean()):.0%}"
        table.add_row(format, str(len(gap)), share, *(f"{float(x):.1e}" for x in figures))
        rows.append(
            Row(
                name=f"log-probabilities, {format}", ours=float(gap.mean()),
                peer=float(noise.mean()), peer_name="trainer in float64", unit="nats",
                ratio=float(noise.mean() / gap.mean().clamp(min=1e-9)),
            )
        )  # fmt: skip
    console.print(table)
    write_rows(rows, options.json)


if __name__ == "__main__":
    main()
