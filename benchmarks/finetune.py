"""A step of LoRA against peft on transformers: speed and memory, same shapes, same targets.

    python benchmarks/finetune.py [--model smollm2-135m-instruct] [--tokens 1024] [--rounds 8]
                                  [--threads 2] [--json FILE]

Rank 16 on all seven linear layers of each block, float32 on a CPU: forward, loss, backward, AdamW;
every third token is a target, as in chats, where the assistant says a third or less. Two cases: one
sequence of that many tokens, and eight conversations whose lengths are quantiles of a chat file's.
Those are packed here; peft takes them one after the other and adds up gradients, which on a CPU is
faster for it than padding them to the longest.

Each side runs in a process of its own, so that its peak of memory is its own, and they take turns,
step by step; ratios are medians of neighbours' ratios. Two amounts of memory are compared: the part
on top of the loaded model, and the whole.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import Row, peak_memory, write_rows
from rich.console import Console
from rich.table import Table

from opennemo.model.hub import locate

RANK, ALPHA = 16, 32
# The middles of eight equal parts of 296 conversations without tools, by SmolLM2's tokenizer.
CONVERSATIONS = (52, 70, 97, 128, 162, 210, 304, 755)
GOAL_SPEED, GOAL_MEMORY = 1.5, 1 / 0.7


def ids_and_targets(n_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(1000, 40_000, (n_tokens,), generator=torch.Generator().manual_seed(0))
    targets = torch.where(torch.arange(n_tokens) % 3 == 0, ids, -100)  # itself to be predicted
    return ids, targets


def ours(model: str, lengths: Sequence[int]) -> Callable[[], Any]:
    from opennemo.model.checkpoint import load
    from opennemo.model.lora import add_lora_
    from opennemo.train.config import Optim
    from opennemo.train.objectives import next_token
    from opennemo.train.optim import clip, optimizers
    from opennemo.train.packing import Batch

    net = load(locate(model), dtype=torch.float32).train()
    add_lora_(net, rank=RANK, alpha=ALPHA, generator=torch.Generator().manual_seed(0))
    ids, targets = zip(*map(ids_and_targets, lengths), strict=True)
    end = torch.tensor([-100])
    shifted = torch.cat([torch.cat((t[1:], end)) for t in targets])
    batch = Batch(
        tokens=torch.cat(ids), targets=shifted,
        cu_seqlens=torch.tensor([0, *itertools.accumulate(lengths)]).int(),
        max_seqlen=max(lengths), window=None, n_units=int((shifted != -100).sum()),
    )  # fmt: skip
    found = optimizers(net, Optim())
    parameters = [p for p in net.parameters() if p.requires_grad]

    def step() -> None:
        loss, _ = next_token(net, batch)
        (loss / batch.n_units).backward()
        clip(parameters, 1.0)
        for optimizer in found:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def peft(model: str, lengths: Sequence[int]) -> Callable[[], Any]:
    from peft import LoraConfig, get_peft_model  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM

    path = locate(model)
    net = AutoModelForCausalLM.from_pretrained(
        str(path.parent if path.is_file() else path), dtype=torch.float32,
        gguf_file=path.name if path.is_file() else None,
    )  # fmt: skip
    names = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    net = get_peft_model(net, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names)).train()
    ids, targets = zip(*map(ids_and_targets, lengths), strict=True)
    batches = [{"input_ids": i[None], "labels": t[None]} for i, t in zip(ids, targets, strict=True)]
    n_targets = sum(int((t[1:] != -100).sum()) for t in targets)
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 3e-4, fused=True)

    def step() -> None:
        for batch in batches:
            net(**batch, num_items_in_batch=n_targets).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


SIDES = {"ours": ours, "peft": peft}


def worker(side: str, model: str, lengths: Sequence[int], threads: int) -> None:
    """Reads a line, does a step, reports its time and memory."""
    torch.set_num_threads(threads)
    step = SIDES[side](model, lengths)
    status = Path("/proc/self/status").read_text("utf-8")
    loaded = 1024 * int(status.split("VmRSS:")[1].split()[0])
    print(json.dumps({"loaded": loaded}), flush=True)
    for _ in sys.stdin:
        clock, processor = time.perf_counter(), time.process_time()
        step()
        found = {
            "clock": time.perf_counter() - clock, "processor": time.process_time() - processor,
            "peak": peak_memory(),
        }  # fmt: skip
        print(json.dumps(found), flush=True)


class Worker:
    def __init__(self, side: str, lengths: Sequence[int], options: argparse.Namespace):
        command = [sys.executable, __file__, "--worker", side, "--model", options.model]
        command += ["--lengths", *map(str, lengths), "--threads", str(options.threads)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.loaded = self._answer()["loaded"]

    def step(self) -> dict[str, float]:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict[str, float]:
        assert self.process.stdout
        while not (line := self.process.stdout.readline()).startswith("{"):
            if not line:
                raise SystemExit("a side ended; is peft installed?")
        return json.loads(line)


def compare(name: str, lengths: Sequence[int], options: argparse.Namespace) -> list[Row]:
    sides = {side: Worker(side, lengths, options) for side in SIDES}
    for side in sides.values():
        side.step()
    rounds = [{side: w.step() for side, w in sides.items()} for _ in range(options.rounds)]
    for side in sides.values():
        side.close()
    rows, n_tokens = [], sum(lengths)
    for what in ("clock", "processor"):
        mine, theirs = ([r[side][what] for r in rounds] for side in SIDES)
        rows.append(
            Row(
                name=f"{name}, by the {what}",
                ours=n_tokens / statistics.median(mine),
                peer=n_tokens / statistics.median(theirs), peer_name="peft",
                ratio=statistics.median(b / a for a, b in zip(mine, theirs, strict=True)),
                goal=GOAL_SPEED,
            )
        )  # fmt: skip
    peak = {side: rounds[-1][side]["peak"] for side in SIDES}
    for name_of, less in (("peak memory", 0), ("peak memory over the model", 1)):
        mine, theirs = (peak[s] - less * sides[s].loaded for s in SIDES)
        rows.append(
            Row(name=f"{name}, {name_of}", ours=mine / 1e6, peer=theirs / 1e6, peer_name="peft",
                unit="MB", ratio=theirs / mine, goal=GOAL_MEMORY)
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--lengths", nargs="+", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.model, options.lengths, options.threads)
        return
    rows = compare(f"one sequence of {options.tokens:,}", [options.tokens], options)
    rows += compare("eight conversations", CONVERSATIONS, options)
    table = Table("case", "ours", "peft", "", "ratio", "goal")
    for r in rows:
        table.add_row(
            r.name, f"{r.ours:,.0f}", f"{r.peer:,.0f}", r.unit, f"{r.ratio:.2f}", f"{r.goal:.2f}"
        )
    Console().print(table)
    write_rows(rows, options.json)


if __name__ == "__main__":
    main()
