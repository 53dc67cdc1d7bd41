"""Does FP8 lose nothing after quantisation-aware training? Files read back, against full precision.

    python benchmarks/qat.py --texts TRAIN... --valid HELD_OUT... [--model smollm2-135m-instruct]
                             [--steps 150] [--held-out en fr code] [--scratch DIR] [--json FILE]

Texts are JSON lines of `text` and `lang`. Two cases; data and seeds are the same for all arms:

    continued   a real model. (a) itself, (b) rounded to FP8 as it is, (c) trained on under
                rounding to give its own full-precision probabilities back (distillation, so that
                learning the texts is no part of the gain), and exported.
    scratch     a small new model. (a) trained in full precision, (b) that one rounded
                afterwards, (c) trained under rounding from a tenth of the steps on, and exported.

Every arm is measured by its written file: loss in nats per token against (a) with the standard
error over windows, divergence KL(a || arm), and how often the likeliest token is the same. Beside
them are (a) in bf16, whose noise is commonly accepted, and (a) in INT8 with fixed scales, which
proves that the measure can detect damage. FP8 is lossless here if (c) is no further from (a) than
bf16 is, plus two standard errors. A small new model without a gap proves nothing.
"""

import argparse
import gc
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import Row, write_rows
from rich.console import Console
from rich.table import Table
from torch import Tensor

from opennemo.model import export
from opennemo.model.attention import Packed
from opennemo.model.checkpoint import load, save
from opennemo.model.companions import copy_companions
from opennemo.model.formats import FORMATS, Format, Rounding
from opennemo.model.hub import locate
from opennemo.model.quantization import quantize_
from opennemo.model.transformer import Transformer
from opennemo.texts import Texts
from opennemo.tokenizer import load_tokenizer
from opennemo.train.config import parse_recipe
from opennemo.train.run import train

FORMAT = "fp8-static"  # every engine for FP8 can run it
INT8 = Format(
    name="int8-static",
    weights=FORMATS["int8"].weights,
    inputs=Rounding(dtype=torch.int8, limit=127, share="tensor"),
    static=True,
)
WINDOW, N_WINDOWS = 512, 12  # held out, of each kind of text
CALIBRATION = 4096  # tokens, of the training texts
SCRATCH = {
    "dim": 256, "n_layers": 6, "n_heads": 4, "n_kv_heads": 2, "head_dim": 48, "hidden_dim": 768,
    "vocab_size": 32768, "max_position_embeddings": 2048, "tied_embeddings": True,
}  # fmt: skip


class Score(NamedTuple):
    """One arm on one kind of text; a number for each window."""

    loss: Tensor
    kl: Tensor
    same: Tensor

    def row(self, name: str, against: "Score") -> list[str]:
        gap, error = mean_and_error(self.loss - against.loss)
        kl, kl_error = mean_and_error(self.kl)
        loss, same = float(self.loss.mean()), float(self.same.mean())
        return [
            name, f"{loss:.4f}", f"{gap:+.4f} ± {error:.4f}", f"{math.expm1(gap):+.2%}",
            f"{kl:.4f} ± {kl_error:.4f}", f"{same:.1%}",
        ]  # fmt: skip


def mean_and_error(x: Tensor) -> tuple[float, float]:
    return float(x.mean()), float(x.std() / len(x) ** 0.5)


def held_out(paths: list[Path], kinds: list[str], tokenizer: Any) -> dict[str, list[Tensor]]:
    """Windows of ids by kind; `code` stands for every kind whose name begins with it."""
    found: dict[str, list[Tensor]] = {}
    for kind in kinds:
        texts = (t for language, t in Texts(paths) if language.partition("-")[0] == kind)
        windows = []
        for text in texts:
            ids = torch.tensor([tokenizer.bos_id, *tokenizer.encode(text)])
            windows += list(ids.split(WINDOW))[:2]  # of many texts rather than much of one
        found[kind] = [w for w in windows if len(w) == WINDOW][:N_WINDOWS]
        if len(found[kind]) < 3:
            raise SystemExit(f"too few held-out texts of {kind}")
    return found


@torch.inference_mode()
def logits(model: Transformer, windows: list[Tensor]) -> Iterator[Tensor]:
    for ids in windows:
        hidden = model(ids, Packed.of(len(ids), window=model.config.sliding_window))
        yield model.output(hidden)[:-1].float().log_softmax(-1)


def scores(
    arms: dict[str, Callable[[], Transformer]], texts: dict[str, list[Tensor]], scratch: Path
) -> dict[str, dict[str, Score]]:
    """Measures every arm on every kind of text; the others are compared with the first arm."""
    found: dict[str, dict[str, Score]] = {}
    reference = scratch / "reference.bin"  # log-probabilities of the first arm, too many to keep
    for i, (name, make) in enumerate(arms.items()):
        model = make().eval()
        with reference.open("wb" if i == 0 else "rb") as file:
            for kind, windows in texts.items():
                numbers = []
                for ids, found_here in zip(windows, logits(model, windows), strict=True):
                    if i == 0:
                        file.write(found_here.numpy().tobytes())
                        aim = found_here
                    else:
                        raw = bytearray(file.read(found_here.nbytes))
                        aim = torch.frombuffer(raw, dtype=torch.float32).view_as(found_here)
                    loss = -found_here.gather(-1, ids[1:, None]).mean()
                    kl = (aim.exp() * (aim - found_here)).sum(-1).mean()
                    same = (aim.argmax(-1) == found_here.argmax(-1)).float().mean()
                    numbers.append((float(loss), float(kl), float(same)))
                columns = (torch.tensor(c) for c in zip(*numbers, strict=True))
                found.setdefault(kind, {})[name] = Score(*columns)
        del model
        gc.collect()
        print(f"  measured {name}", file=sys.stderr)
    return found


def recipe(objective: str, model: dict[str, Any], shards: Path, steps: int, lr: float, rows: int,
           qat: dict[str, Any] | None = None) -> Any:  # fmt: skip
    return parse_recipe(
        {
            "objective": objective, "steps": steps, "device": "cpu", "model": model,
            "data": {"train": [{"path": str(shards)}], "window": WINDOW, "rows": rows,
                     "micro_rows": 2},
            "optim": {"lr": lr, "schedule": "cosine", "warmup": 0.05, "final": 0.05,
                      "weight_decay": 0.0 if objective == "distil" else 0.1},
            "qat": qat, "saving": {"every": 50, "keep": 1}, "evaluation": {"every": 0},
        },
        "benchmark",
    )  # fmt: skip


def int8_control(folder: Path, largest: Any) -> Transformer:
    model = load(folder, dtype=torch.float32)
    quantize_(model, INT8, largest)
    return model


def case(
    name: str, full: Path, trained: Path, texts: list[Path], kinds: dict[str, list[Tensor]],
    scratch: Path,
) -> dict[str, dict[str, Score]]:  # fmt: skip
    """Round the full model, and measure it, the trained one and the controls."""
    calibration = export.calibrate(full, (t for _, t in Texts(texts)), CALIBRATION)
    rounded = scratch / f"{name}-rounded"
    if not rounded.exists():
        export.quantize(full, rounded, format=FORMAT, calibration=calibration)
    arms: dict[str, Callable[[], Transformer]] = {
        "(a) full precision": lambda: load(full, dtype=torch.float32),
        "(b) rounded afterwards": lambda: load(rounded, dtype=torch.float32),
        "(c) trained under rounding": lambda: load(trained, dtype=torch.float32),
        "(a) in bf16": lambda: load(full, dtype=torch.bfloat16),
        "(a) in INT8, fixed scales": lambda: int8_control(full, calibration.largest_inputs),
    }
    return scores(arms, kinds, scratch)


def report(name: str, found: dict[str, dict[str, Score]]) -> list[Row]:
    rows = []
    for kind, arms in found.items():
        table = Table(
            "arm", "loss", "against (a), nats", "perplexity", "KL(a || arm)", "same token",
            title=f"{name}, {kind}, {N_WINDOWS} windows of {WINDOW}", title_justify="left",
        )  # fmt: skip
        (_, against), *_ = arms.items()
        for arm, score in arms.items():
            table.add_row(*score.row(arm, against))
        Console().print(table)
        gaps = {arm: mean_and_error(score.loss - against.loss) for arm, score in arms.items()}
        gap, error = gaps["(c) trained under rounding"]
        before, noise = gaps["(b) rounded afterwards"][0], abs(gaps["(a) in bf16"][0])
        allowed = noise + 2 * error
        verdict = "within" if gap <= allowed else "MORE than"
        print(f"(c) is {gap:+.4f} from (a), {verdict} the noise and 2 s.e., {allowed:.4f}; "
              f"(b) was {before:+.4f}\n")  # fmt: skip
        rows.append(
            Row(
                name=f"{name}, {kind}: loss over full precision", ours=gap, peer=before,
                peer_name="rounded afterwards", unit="nats", ratio=before / max(gap, 1e-9),
            )
        )  # fmt: skip
    return rows


def tokenized(texts: list[Path], tokenizer: str, out: Path, languages: list[str]) -> Path:
    keep = [argument for language in languages for argument in ("--language", language)]
    command = [sys.executable, "-m", "opennemo", "tokenize", *map(str, texts)]
    if not (out / "index.json").exists():
        subprocess.run(
            [*command, "--tokenizer", tokenizer, "--out", str(out), *keep], check=True,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--texts", type=Path, nargs="+", required=True)
    parser.add_argument("--valid", type=Path, nargs="+", required=True)
    parser.add_argument("--held-out", nargs="+", default=["en", "fr", "code"])
    parser.add_argument("--languages", nargs="*", default=[], help="of the training texts")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--cases", nargs="+", default=["continued", "scratch"])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rows", type=int, default=2, help=f"of {WINDOW} tokens, a step")
    parser.add_argument("--lr", type=float, default=2e-5, help="of the continued model")
    parser.add_argument("--scratch", type=Path, help="keep runs here, and go on with them")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        scratch = options.scratch or Path(temporary)
        scratch.mkdir(parents=True, exist_ok=True)
        if "continued" in options.cases:
            source = locate(options.model)
            shards = tokenized(options.texts, options.model, scratch / "shards", options.languages)
            full = scratch / "full"
            if not full.exists():  # as a folder in float32, which every arm begins with
                save(load(source, dtype=torch.float32), full)
                copy_companions(source, full, layout="hf")
            made = train(
                recipe("distil", {"path": str(full)}, shards, options.steps, options.lr,
                       options.rows, {"format": FORMAT, "freeze": 0.8}),
                scratch / "continued",
            )  # fmt: skip
            kinds = held_out(options.valid, options.held_out, load_tokenizer(full))
            found = case("continued", full, made[FORMAT], options.texts, kinds, scratch)
            rows += report("continued", found)
        if "scratch" in options.cases:
            own = "opennemo-tekken-32k"
            shards = tokenized(options.texts, own, scratch / "shards-own", options.languages)
            model = {"shape": SCRATCH, "tokenizer": own}
            arms = {"plain": None, "rounding": {"format": FORMAT, "start": 0.1, "freeze": 0.9}}
            made = {
                arm: train(
                    recipe("text", model, shards, options.steps, 2e-3, 4 * options.rows, qat),
                    scratch / f"scratch-{arm}",
                )
                for arm, qat in arms.items()
            }
            full = made["plain"]["model"]
            kinds = held_out(options.valid, options.held_out, load_tokenizer(full))
            found = case("scratch", full, made["rounding"][FORMAT], options.texts, kinds, scratch)
            rows += report("scratch", found)
    write_rows(rows, options.json)


if __name__ == "__main__":
    main()
