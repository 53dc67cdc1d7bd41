"""A run as a folder: begun, resumed, and turned into models.

    recipe.json    every setting          metrics.jsonl  a line a step     tensorboard/   the same
    data.json      what it learns from    samples.jsonl  answers on the way
    checkpoints/   to go on from          model/ or adapter/, and the format of quantisation-aware
                                          training (fp8-static/, q4_k.gguf): what came out, and a
                                          model card

The same command resumes a run that was stopped or killed. Models are written once, at the end.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from opennemo.errors import InvalidRequest
from opennemo.files import new_folder, read_json, write_whole
from opennemo.model.checkpoint import save
from opennemo.model.companions import copy_companions
from opennemo.model.export import Calibration, quantize, to_gguf
from opennemo.model.formats import BLOCKS
from opennemo.model.lora import save_adapter
from opennemo.model.memory import open_device
from opennemo.model.parallel import whole
from opennemo.model.quantization import KVRounding, observers
from opennemo.model.transformer import Transformer
from opennemo.tokenizer.saving import save_huggingface
from opennemo.tokenizer.tekken import Tekken
from opennemo.tokenizer.tokenizer import Tokenizer
from opennemo.train.card import write_card
from opennemo.train.config import Recipe, differences, parse_recipe, to_json
from opennemo.train.practice import Rollout
from opennemo.train.setup import Setup, same_data
from opennemo.train.trainer import Sample, Trainer

MakeRollout = Callable[[Tokenizer], Rollout]


def train(
    recipe: Recipe, run: Path, *, sample: Sample | None = None,
    rollout: MakeRollout | None = None, quiet: bool = False,
) -> dict[str, Path]:  # fmt: skip
    """Begin a run in a folder, or resume it, and write the results; returns their folders.

    Raises: as `begin`, `Trainer.train`.
    """
    trainer = begin(recipe, run, sample=sample, rollout=rollout, quiet=quiet)
    trainer.train()
    return finish(trainer)


def begin(
    recipe: Recipe, run: Path, *, sample: Sample | None = None,
    rollout: MakeRollout | None = None, quiet: bool = False,
) -> Trainer:  # fmt: skip
    """The trainer of a run, at its first step or at that of the last checkpoint.

    `rollout` is called with the tokenizer where the model is to draw answers.

    Raises:
        InvalidRequest: the folder holds another run, or other files.
    """
    open_run(recipe, run)
    device = torch.device(open_device(None if recipe.device == "auto" else recipe.device))
    setup = Setup.make(recipe, device)
    if _is_first():
        same_data(run / "data.json", setup.data)
    draw = rollout(setup.tokenizer) if rollout is not None and recipe.draws else None
    return Trainer(recipe, run, setup, device, sample=sample, rollout=draw, quiet=quiet)


def finish(trainer: Trainer) -> dict[str, Path]:
    """Write the results of a run at its last step; returns their folders."""
    gather_(trainer.model)
    return export(trainer.recipe, trainer.run, trainer.setup) if _is_first() else {}


def open_run(recipe: Recipe, run: Path) -> None:
    """Make the folder of a run, or check that it is one of this recipe.

    Raises:
        InvalidRequest: it is not; the settings that differ are named.
    """
    saved = run / "recipe.json"
    if saved.exists():
        before = parse_recipe(read_json(saved), str(saved))
        if differing := differences(before, recipe):
            raise InvalidRequest(
                f"{run}: holds a run of another recipe ({'; '.join(differing[:5])}); choose "
                "another folder, or resume with the same settings"
            )
        return
    if not _is_first():
        return
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise InvalidRequest(f"{run}: exists, and holds no run; choose another name")
    try:
        run.mkdir(parents=True, exist_ok=True)
        write_whole(saved, to_json(recipe).encode())
    except OSError as error:
        raise InvalidRequest(f"{run}: cannot be written: {error.strerror}") from None


def gather_(model: Transformer) -> None:
    """Give the first rank the whole of divided weights; the other ranks free theirs."""
    gathered: dict[int, nn.Parameter] = {}  # a tied head is the embedding
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if isinstance(weight, DTensor):
                if id(weight) not in gathered:
                    full = whole(weight.detach()).cpu()
                    gathered[id(weight)] = nn.Parameter(full if _is_first() else full.new_empty(0))
                module.register_parameter(name, gathered[id(weight)])


def export(recipe: Recipe, run: Path, setup: Setup) -> dict[str, Path]:
    """Write a run's results: a model folder or an adapter, and the model in its number format."""
    if recipe.lora is not None:
        if not (adapter := run / "adapter").exists():
            with new_folder(adapter) as folder:
                save_adapter(setup.model, folder, base_model_name=recipe.model.path or "")
                write_card(recipe, run, folder)
        return {"adapter": adapter}
    made = {"model": run / "model"}
    if not made["model"].exists():
        with new_folder(made["model"]) as folder:
            save_model(setup, folder)
            write_card(recipe, run, folder)
    if recipe.qat is not None:
        format = recipe.qat.format
        coded = run / (f"{format}.gguf" if format in BLOCKS else format)
        made[format] = coded
        if format in BLOCKS and not coded.exists():
            to_gguf(made["model"], coded, format=format, pure=True)
        elif not coded.exists():
            with new_folder(coded) as folder:
                quantize(
                    made["model"], folder, format=format, kv=recipe.qat.kv,
                    calibration=learned_scales(setup.model),
                )  # fmt: skip
                write_card(recipe, run, folder, stored=format)
    return made


def save_model(setup: Setup, folder: Path) -> None:
    """A model folder with its tokenizer, in Hugging Face's layout, in float32."""
    save(setup.model, folder)
    path = setup.tokenizer_path
    if path.exists() and (path.is_dir() or path.suffix == ".gguf"):
        copy_companions(path, folder, layout="hf")
    else:  # a tokenizer by itself
        if isinstance(setup.tokenizer, Tekken):
            setup.tokenizer.save(folder / "tekken.json")
        save_huggingface(setup.tokenizer, folder)


def learned_scales(model: Transformer) -> Calibration:
    """The static scales that quantisation-aware training found."""
    seen = observers(model)
    kv = getattr(model, "kv_rounding", None)
    return Calibration(
        largest_inputs={
            name.removesuffix(".largest"): float(largest)
            for name, largest in seen.items()
            if largest.numel() == 1
        },
        kv_scale=kv.scale.cpu() if isinstance(kv, KVRounding) else torch.ones(0, 2),
    )


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0
