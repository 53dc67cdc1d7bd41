"""What computing a prompt once saves, and whether engine and trainer find the same probabilities.

    python benchmarks/alignment.py [--model smollm2-135m-instruct] [--threads 1] [--rounds 3]
                                   [--formats fp32 int8 fp8 q4_k] [--json FILE]

First a training step on 8 answers of 50 tokens to one prompt of 500, packed with the prompt once
(`Forked`) and once for each answer; then on a pair of answers. The goal is the share that
arithmetic says: of the tokens, of whose products a step consists, but for attention to the prompt.
Steps take turns; the ratio is the median of neighbours' ratios of processor time.

Then answers are drawn from a model that learns in a number format, and the log-probability of every
token under the engine that drew it is compared with what the trainer computes.
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

from opennemo.model.checkpoint import Form, load, open_checkpoint
from opennemo.model.formats import by_name
from opennemo.model.hub import locate
from opennemo.model.quantization import prepare_qat_
from opennemo.model.transformer import Transformer
from opennemo.rollouts import Rollouts
from opennemo.tokenizer import load_tokenizer
from opennemo.tokenizer.chat import encode_chat
from opennemo.train.conversations import Example
from opennemo.train.objectives import head_losses, hidden_of_targets, next_token
from opennemo.train.packing import Batch, collate, pack

PROMPT, ANSWER = 500, 50
ASKED = ["Name three rivers.", "What is 17 + 25?", "Write a line about the sea.", "Say hello."]


def answers(n: int, vocab_size: int) -> list[Example]:
    rng = np.random.default_rng(0)
    prompt = rng.integers(vocab_size, size=PROMPT)
    mask = np.arange(PROMPT + ANSWER) >= PROMPT
    ids = [np.concatenate((prompt, rng.integers(vocab_size, size=ANSWER))) for _ in range(n)]
    return [Example(one.astype(np.uint32), mask) for one in ids]


def seconds(model: Transformer, batch: Batch) -> float:
    """Of the processor, for a loss and its gradients."""
    start = time.process_time()
    loss, _ = next_token(model, batch)
    loss.backward()
    model.zero_grad(set_to_none=True)
    return time.process_time() - start


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
        goal=len(separate.tokens) / len(forked.tokens),
    )  # fmt: skip


@torch.no_grad()
def difference(path: Path, format: str, n: int, max_tokens: int) -> tuple[int, float, float]:
    """Of log-probabilities, engine against trainer: tokens, the mean and the largest."""
    model = load(open_checkpoint(path), form=Form(dtype=torch.float32, tables=False))
    if format != "fp32":
        prepare_qat_(model, by_name(format))
    tokenizer = load_tokenizer(path)
    prompts = [encode_chat(tokenizer, [{"role": "user", "content": text}]) for text in ASKED]
    groups = Rollouts(tokenizer)(
        model, prompts, n=n, max_tokens=max_tokens, seeds=range(len(prompts))
    )
    units = [
        [
            Example(
                np.array(prompt + d.ids, np.uint32),
                np.arange(len(prompt) + len(d.ids)) >= len(prompt),
            )
            for d in group
        ]
        for prompt, group in zip(prompts, groups, strict=True)
    ]
    hidden, targets, _ = hidden_of_targets(model.train(), collate([pack(units)], None))
    computed = -head_losses(model, hidden, targets, reduction="none")
    drawn = torch.tensor([x for group in groups for d in group for x in d.log_probs])
    gap = (computed - drawn).abs()
    return len(gap), float(gap.mean()), float(gap.max())


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--answers", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--formats", nargs="*", default=["fp32", "int8", "fp8", "q4_k"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    path, console = locate(options.model), Console()
    model = load(open_checkpoint(path), form=Form(dtype=torch.float32, tables=False)).train()
    rows = [sharing(model, n, options.rounds) for n in (8, 2)]
    del model
    table = Table("case", "forked, s", "separate, s", "ratio", "by tokens")
    for row in rows:
        figures = (row.ours, row.peer, row.ratio, row.goal)
        table.add_row(row.name, *(f"{x:.2f}" for x in figures))
    console.print(table)
    table = Table("format", "tokens", "mean |difference|", "largest")
    for format in options.formats:
        n, mean, largest = difference(path, format, options.answers, options.max_tokens)
        table.add_row(format, str(n), f"{mean:.1e}", f"{largest:.1e}")
        rows.append(
            Row(
                name=f"log-probabilities, {format}", ours=largest, peer=0.0, peer_name="trainer",
                unit="nats", ratio=1e-4 / largest if largest else float("inf"), goal=1.0,
            )
        )  # fmt: skip
    console.print(table)
    write_rows(rows, options.json)


if __name__ == "__main__":
    main()
