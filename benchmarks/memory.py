"""Memory that training steps take, against the estimates of `opennemo plan`, on a CPU.

    python benchmarks/memory.py         one layer at 131,072 tokens, and a quarter for two ranks
    python benchmarks/memory.py --nemo  an adapter's step of two layers as wide as NeMo's, too

Each step runs in a process of its own, and Linux reports its peak. 131,072 tokens take ten minutes
or more, since attention is quadratic.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from measure import peak_memory

from opennemo.model.lora import add_lora_
from opennemo.model.parallel import data_rank, make_mesh, shard_
from opennemo.model.transformer import PRESETS, ModelConfig, Transformer
from opennemo.planning.estimate import plan
from opennemo.planning.machines import GIB, Card, Machines
from opennemo.train.config import parse_recipe
from opennemo.train.objectives import next_token
from opennemo.train.optim import optimizers
from opennemo.train.packing import Batch

# One layer with heads apart from the width, as in NeMo, and a feed-forward of 3.5 times it.
NARROW = ModelConfig(
    dim=320, n_layers=1, n_heads=4, n_kv_heads=1, head_dim=64, hidden_dim=1120, vocab_size=4096
)
CONFIGS = {"narrow": NARROW, "nemo": replace(PRESETS["mistral-nemo-12b"], n_layers=2)}


def step(case: dict[str, Any]) -> dict[str, float]:
    """Take two steps, in this process, and report the memory that it took and that was planned."""
    config, recipe = CONFIGS[case["config"]], parse_recipe(case["recipe"], "benchmark")
    parallel = recipe.parallel
    mesh = make_mesh("cpu", context_parallel=parallel.context_parallel)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device="cpu")
    for weight in model.parameters():
        weight.data.fill_(1.0 if weight.dim() == 1 else 0.001)
    if recipe.lora:
        generator = torch.Generator().manual_seed(0)
        add_lora_(model, rank=recipe.lora.rank, alpha=recipe.lora.alpha, generator=generator)
    shard_(model, mesh, activation_checkpointing=parallel.activation_checkpointing)
    used = optimizers(model, recipe.optim)
    n = recipe.data.window
    tokens = torch.randint(0, config.vocab_size, (n,), generator=torch.Generator().manual_seed(0))
    batch = Batch(
        tokens=tokens, targets=tokens.roll(-1), cu_seqlens=torch.tensor([0, n]).int(),
        max_seqlen=n, window=None, n_units=n,
    )  # fmt: skip
    before, start = peak_memory(), time.perf_counter()
    for _ in range(case["steps"]):
        loss, _ = next_token(model, batch, mesh)
        (loss / n).backward()
        for optimizer in used:
            optimizer.step()
            optimizer.zero_grad()
    card = Card(memory=64 * GIB, flops=1e11, link=1e9, network=1e9, overhead=0.7 * GIB, bytes=4)
    machines = Machines("cpu", card, case["ranks"], 1)
    planned = plan(recipe, config, machines).total
    assert data_rank(mesh) == (0, 1)
    return {
        "peak": peak_memory(), "before": before, "planned": planned,
        "seconds": time.perf_counter() - start,
    }  # fmt: skip


def measure(name: str, case: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, "--rank", str(rank), "--store", f"file://{folder}/store",
                 "--case", json.dumps(case)],
                stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            for rank in range(case["ranks"])
        ]  # fmt: skip
        told = [json.loads(process.communicate()[0].splitlines()[-1]) for process in processes]
    peak = max(one["peak"] for one in told)
    planned, seconds = told[0]["planned"], told[0]["seconds"] / case["steps"]
    print(
        f"{name:<58}{peak / GIB:8.2f}{planned / GIB:9.2f}{peak / planned:8.2f}{seconds:9.0f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--nemo", action="store_true", help="takes 9 GB")
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        case = json.loads(options.case)
        if case["ranks"] > 1:
            dist.init_process_group(
                "gloo", init_method=options.store, rank=options.rank, world_size=case["ranks"]
            )
        print(json.dumps(step(case)))
        return
    print(
        f"{'GiB, of the rank that takes most':<58}{'peak':>8}{'planned':>9}{'':>8}{'s a step':>9}"
    )
    data: dict[str, Any] = {"train": [{"path": "x"}], "rows": 1, "micro_rows": 1}
    base = {"steps": 1, "model": {"path": "x"}}
    for name, n, parallel in (
        ("", options.tokens, {}),
        (", activations recomputed", options.tokens, {"activation_checkpointing": True}),
        ("", options.tokens // 4, {}),
        (", shared by two ranks", options.tokens // 4, {"context_parallel": 2}),
    ):
        recipe = base | {"data": data | {"window": n}, "parallel": parallel}
        case = {"config": "narrow", "recipe": recipe, "steps": 1,
                "ranks": parallel.get("context_parallel", 1)}  # fmt: skip
        measure(f"one layer, {n:,} tokens{name}", case)
    if options.nemo:
        data = data | {"window": 1024}
        for name, parallel in (
            ("", {}), (", activations recomputed", {"activation_checkpointing": True}),
        ):  # fmt: skip
            recipe = base | {"data": data, "lora": {}, "parallel": parallel}
            case = {"config": "nemo", "recipe": recipe, "steps": 2, "ranks": 1}
            measure(f"two layers of NeMo, adapted, 1,024 tokens{name}", case)


if __name__ == "__main__":
    main()
