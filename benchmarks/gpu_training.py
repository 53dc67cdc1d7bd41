"""Training on one NVIDIA GPU: FSDP2 in bf16 on one rank, and what learning under rounding costs.

    python benchmarks/gpu_training.py [--steps N] [--toy] [--json FILE]

The trainer's own updates, of a new model of half a billion parameters over random tokens. Three
checks end with an error: losses under FSDP2 equal those without ranks, losses are summed in
float32, and learning under rounding to FP8 works. Two rows compare the speed of FSDP2 with that
without ranks, and of a step under rounding with one without. `--toy` runs a tiny model, here.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from measure import Row, gpu_options, write_rows

from opennemo.model.formats import FORMATS
from opennemo.model.quantization import prepare_qat_
from opennemo.model.transformer import PRESETS, ModelConfig, Transformer
from opennemo.train.objectives import head_losses
from opennemo.train.packing import IGNORED, Batch
from opennemo.train.setup import Setup, initialise_
from opennemo.train.trainer import Trainer

SHAPE = ModelConfig(
    dim=2048, n_layers=8, n_heads=16, n_kv_heads=4, head_dim=128, hidden_dim=7168,
    vocab_size=32_768, max_position_embeddings=4096, tied_embeddings=True,
)  # fmt: skip
SEQUENCES, LENGTH = 8, 1024
SAME = 0.02  # of a loss: the change that bf16 and another order of additions may cause
LEAST = 1 / 1.6  # of the speed without rounding
SUM = 3e-4  # relative error of a sum of losses in bf16


def recipe(steps: int, qat: bool) -> Any:
    """A recipe's tree, without the package that checks recipes."""
    return SimpleNamespace(
        seed=0, steps=steps, objective="text", preference=None, lora=None,
        qat=SimpleNamespace(format="fp8", kv=False, start=0.0, freeze=0.9) if qat else None,
        data=SimpleNamespace(rows=SEQUENCES),
        optim=SimpleNamespace(
            name="adamw", lr=3e-4, schedule="wsd", warmup=0.1, decay=0.0, final=0.0,
            betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, clip=1.0,
        ),
        saving=SimpleNamespace(keep=1),
        parallel=SimpleNamespace(
            data_parallel_replicate=1, data_parallel_shard=-1, tensor_parallel=1,
            context_parallel=1, activation_checkpointing=False, compile=False,
        ),
    )  # fmt: skip


def batch(shape: ModelConfig, length: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(shape.vocab_size, (SEQUENCES, length), generator=generator)
    targets = torch.full((SEQUENCES, length), IGNORED)
    targets[:, :-1] = ids[:, 1:]
    return Batch(
        tokens=ids.flatten(), targets=targets.flatten(), max_seqlen=length, window=None,
        cu_seqlens=torch.arange(0, SEQUENCES * length + 1, length).int(),
        n_units=SEQUENCES * (length - 1),
    )  # fmt: skip


def run(
    shape: ModelConfig,
    length: int,
    steps: int,
    device: torch.device,
    folder: Path,
    qat: bool = False,
) -> tuple[list[float], float]:
    """The losses of some updates of a new model, and seconds of one, the median."""
    model = initialise_(Transformer(shape), 0)
    if qat:
        prepare_qat_(model, FORMATS["fp8"])
    parts: Any = dict.fromkeys(("teacher", "tokenizer", "tokenizer_path", "train", "valid"))
    setup = Setup(model=model, token_bytes=parts["train"], data={}, **parts)
    trainer = Trainer(recipe(steps, qat), folder, setup, device, quiet=True)
    losses, times = [], []
    for step in range(steps):
        start = time.perf_counter()
        values = trainer.update(
            step, [batch(shape, length, seed=step % 2)]
        )  # reads the loss: waits
        times.append(time.perf_counter() - start)
        losses.append(values["loss"])
    return losses, statistics.median(times[min(2, steps - 1) :])


def on_one_rank(
    shape: ModelConfig, length: int, steps: int, device: torch.device, folder: Path
) -> tuple[list[float], float]:
    """The same with FSDP2, on one rank."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = f"file://{folder.resolve()}/store"
    dist.init_process_group(backend, init_method=store, rank=0, world_size=1)
    try:
        return run(shape, length, steps, device, folder)
    finally:
        dist.destroy_process_group()


def error_of_a_sum(shape: ModelConfig, device: torch.device) -> float:
    """The error of summed losses of 4,096 hidden states in bf16, relative to sums in float64."""
    torch.manual_seed(0)
    model = Transformer(shape).to(device, torch.bfloat16)
    hidden = torch.randn(4096, shape.dim, device=device).bfloat16()
    targets = torch.randint(shape.vocab_size, (4096,), device=device)
    with torch.no_grad():
        found = head_losses(model, hidden, targets)
        pairs = zip(hidden.split(512), targets.split(512), strict=True)
        each = [F.cross_entropy(model.output(h).float(), t, reduction="none") for h, t in pairs]
    assert found.dtype == torch.float32, f"losses are summed in {found.dtype}"
    exact = float(torch.cat(each).double().sum())
    return abs(float(found) - exact) / exact


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=10, help="updates of each run")
    if (options := gpu_options(parser)) is None:
        return
    device = torch.device("cpu" if options.toy else "cuda")
    shape, length = (PRESETS["tiny"], 64) if options.toy else (SHAPE, LENGTH)
    rows, n_tokens, inputs = [], SEQUENCES * length, (shape, length, options.steps)

    def row(name: str, ours: float, peer: float, peer_name: str, goal: float | None = None) -> None:
        rows.append(
            Row(
                name=name, ours=n_tokens / ours, peer=n_tokens / peer, peer_name=peer_name,
                ratio=peer / ours, goal=goal,
            )
        )  # fmt: skip
        print(f"{name}: {rows[-1].ours:,.0f} tokens/s, {rows[-1].ratio:.2f} of {peer_name}")
        write_rows(rows, options.json)

    error = error_of_a_sum(shape, device)
    print(f"a sum of losses in bf16 is off by {error:.1e}")
    assert error < SUM, f"a sum of losses is off by {error:.1e}, and {SUM:.0e} is allowed"
    with tempfile.TemporaryDirectory() as folder:
        plain, seconds = run(*inputs, device, Path(folder))
        sharded, with_ranks = on_one_rank(*inputs, device, Path(folder))
        row("a step under FSDP2 on one rank", with_ranks, seconds, "no ranks")
        gaps = [abs(a - b) / b for a, b in zip(sharded, plain, strict=True)]
        print(
            "losses:",
            *(f"{loss:.4f}" for loss in plain),
            "| FSDP2:",
            *(f"{x:.4f}" for x in sharded),
        )
        assert max(gaps) < SAME, (
            f"losses under FSDP2 are off by {max(gaps):.1%}: {sharded}, {plain}"
        )
        assert plain[-1] < plain[0], f"nothing is learned: {plain}"
        rounded, with_qat = run(*inputs, device, Path(folder), True)
        row("a step under rounding to FP8", with_qat, seconds, "no rounding", LEAST)
        assert rounded[-1] < rounded[0], f"nothing is learned under rounding: {rounded}"


if __name__ == "__main__":
    main()
