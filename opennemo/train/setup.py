"""Makes what a recipe names: the model and the rows that it learns from.

Nothing here trains; the order matters, and is in `Setup.make`: weights first, then adapters or
rounding on top of them, then data that fits the vocabulary.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from opennemo.errors import InvalidRequest
from opennemo.files import write_whole
from opennemo.model.adapter_files import read_adapter
from opennemo.model.checkpoint import Checkpoint, Form, load, open_checkpoint, weight_shapes
from opennemo.model.compressed import misfit
from opennemo.model.formats import BlockRounding, by_name
from opennemo.model.hub import locate
from opennemo.model.lora import add_lora_, start_from_
from opennemo.model.quantization import prepare_qat_
from opennemo.model.transformer import Transformer
from opennemo.tokenizer.load import open_tokenizer
from opennemo.tokenizer.rank_files import OWN
from opennemo.tokenizer.tokenizer import Tokenizer
from opennemo.train.conversations import BadLine, read_examples, read_pairs, read_tasks
from opennemo.train.corpus import Corpus, vocabulary_hash
from opennemo.train.packing import ExampleRows, PackedRows, TextRows
from opennemo.train.practice import TaskRows
from opennemo.train.rewards import Judge

if TYPE_CHECKING:  # pydantic is only needed for reading recipes
    from opennemo.train.config import Recipe, Source


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A model before its first step, and its data."""

    model: Transformer
    teacher: Transformer | None  # whose probabilities are learned, or kept close to
    tokenizer: Tokenizer
    tokenizer_path: Path
    train: PackedRows | TaskRows
    valid: PackedRows | TaskRows | None
    judge: Judge | None  # of answers that the model draws, with the objective "rl"
    token_bytes: np.ndarray  # (V,) bytes of text that each id stands for
    data: dict[str, Any]  # what the rows are made of, for the run's folder

    @classmethod
    def make(cls, recipe: "Recipe", device: torch.device) -> "Setup":
        """Everything that a recipe names; the model still on the CPU, the teacher on the device.

        Raises:
            CheckpointError: a model or a folder of shards cannot be used.
            InvalidRequest: the named parts do not fit together.
        """
        judge = Judge(recipe.rl.rewards, recipe.rl.timeout) if recipe.objective == "rl" else None
        at = None if recipe.model.path is None else locate(recipe.model.path)
        tokenizer_path = at or Path(recipe.model.tokenizer or "")
        if at is None and recipe.model.tokenizer != OWN:
            tokenizer_path = locate(recipe.model.tokenizer or "")
        tokenizer = open_tokenizer(tokenizer_path)
        # Frozen weights, most of the memory, stay as stored where bf16 is fast.
        frozen = recipe.lora is not None and device.type == "cuda"
        model = make_model(recipe, at, None if frozen else torch.float32)
        if tokenizer.vocab_size > model.config.vocab_size:
            raise InvalidRequest(
                f"model.tokenizer has {tokenizer.vocab_size:,} ids, and the model only "
                f"{model.config.vocab_size:,} rows for them"
            )
        # Before anything is put on top of the weights.
        teacher = make_teacher(recipe, at, tokenizer)
        if teacher is not None:
            teacher = teacher.to(device).requires_grad_(False).eval()
        change_weights_(model, recipe)
        train, data = _rows(recipe, recipe.data.train, tokenizer, judge)
        valid, valid_data = None, {}
        if recipe.data.valid:
            valid, valid_data = _rows(recipe, recipe.data.valid, tokenizer, judge)
        sizes = [len(tokenizer.token_bytes(id)) for id in range(tokenizer.vocab_size)]
        token_bytes = np.zeros(model.config.vocab_size, np.int64)
        token_bytes[: len(sizes)] = sizes
        token_bytes[list(tokenizer.control.values())] = 0  # they stand for no text
        return cls(
            model=model, teacher=teacher, tokenizer=tokenizer,
            tokenizer_path=tokenizer_path, train=train, valid=valid, judge=judge,
            token_bytes=token_bytes, data={"train": data, "valid": valid_data},
        )  # fmt: skip


def make_model(
    recipe: "Recipe", path: Path | None, dtype: torch.dtype | None = torch.float32
) -> Transformer:
    """The model as it is before training, on the CPU; None for the type that it is stored in."""
    wanted = {
        name: value
        for name in ("rope_theta", "max_position_embeddings")
        if (value := getattr(recipe.model, name)) is not None
    }
    checkpoint = None if path is None else open_checkpoint(path)
    shape = checkpoint.config if checkpoint else recipe.model.new_shape
    assert shape is not None
    positions = wanted.get("max_position_embeddings", shape.max_position_embeddings)
    if recipe.data.window > positions:
        raise InvalidRequest(
            f"data.window is {recipe.data.window:,}, and the model has {positions:,} positions; "
            "model.max_position_embeddings raises them, with model.rope_theta for a longer context"
        )
    if checkpoint is None:
        return initialise_(Transformer(replace(shape, **wanted)), recipe.seed)
    if checkpoint.format and recipe.lora is None:
        raise InvalidRequest(
            f"model.path is stored as {checkpoint.format}, whose codes cannot learn: adapt it "
            "with a [lora] table, or name what it was made from"
        )
    model = load(checkpoint, form=form_of_base(recipe, checkpoint, dtype))
    model.config = replace(model.config, **wanted)
    return model


def form_of_base(recipe: "Recipe", checkpoint: Checkpoint, dtype: torch.dtype | None) -> Form:
    """What stored weights become where a recipe's model learns; a `dtype` of None: as stored.

    An adapter alone learns over blocks of a GGUF file as they are, except the head's, which the
    loss multiplies in parts.
    """
    lora = recipe.lora
    if lora is not None and lora.dtype != "auto":
        return Form(dtype=getattr(torch, lora.dtype), blocks=False)
    blocks = lora is not None and recipe.qat is None and checkpoint.in_blocks
    if blocks and dtype is None:
        dtype = torch.bfloat16  # blocks do not determine the type of the rest
    return Form(dtype=dtype, blocks=blocks, head_in_blocks=False)


def make_teacher(recipe: "Recipe", at: Path | None, tokenizer: Tokenizer) -> Transformer | None:
    """The teacher, or the model that reinforcement learning stays close to; None for neither.

    Raises:
        InvalidRequest: the objective needs one and none is named, or its vocabulary differs.
    """
    if recipe.objective == "rl" and recipe.rl.kl and recipe.lora is None:
        return make_model(recipe, at)  # at first; with an adapter it is below that
    if recipe.objective != "distil":
        return None
    if recipe.distil.teacher is None:
        if at is None:
            raise InvalidRequest(
                "objective is distil, which needs a teacher: give distil.teacher or model.path"
            )
        return make_model(recipe, at)
    path = locate(recipe.distil.teacher)
    if not tokenizer.has_vocabulary_of(open_tokenizer(path)):
        raise InvalidRequest(f"distil.teacher: {path} has another vocabulary than the model")
    return load(open_checkpoint(path), form=Form(dtype=torch.float32, head_in_blocks=False))


def initialise_(model: Transformer, seed: int) -> Transformer:
    """Give a new model its weights, the same on any device: normal with 0.02, and smaller for
    matrices that write into the residual stream, the more layers there are (GPT-2)."""
    generator = torch.Generator().manual_seed(seed)
    into_stream = 0.02 / (2 * model.config.n_layers) ** 0.5
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            std = into_stream if name.endswith(("wo.weight", "w2.weight")) else 0.02
            with torch.no_grad():
                parameter.normal_(0, std, generator=generator)
    return model


def change_weights_(model: Transformer, recipe: "Recipe") -> None:
    """Put rounding, and then adapters, on top of the weights, as the recipe says."""
    qat, lora = recipe.qat, recipe.lora
    if qat is not None:
        format = by_name(qat.format)
        if problem := misfit(format, weight_shapes(model.config)):
            raise InvalidRequest(f"qat.format: {problem}")
        if isinstance(format.weights, BlockRounding) and qat.kv:
            raise InvalidRequest(f"qat.kv: a GGUF file in {format.name} has no scales for it")
        prepare_qat_(model, format, kv=qat.kv)
    if lora is not None:
        generator = torch.Generator().manual_seed(recipe.seed)
        add_lora_(
            model, rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout, layers=lora.layers,
            generator=generator,
        )  # fmt: skip
        if lora.start is not None:
            keep = recipe.objective == "rl" and recipe.rl.kl > 0
            start_from_(model, read_adapter(Path(lora.start), model.config), keep=keep)


def _rows(
    recipe: "Recipe", sources: Sequence["Source"], tokenizer: Tokenizer, judge: Judge | None
) -> tuple[PackedRows | TaskRows, dict[str, Any]]:
    width, seed = recipe.data.window, recipe.seed
    paths = [source.path for source in sources]
    if recipe.draws:
        return _tasks(recipe, paths, tokenizer, judge)
    if recipe.objective in ("text", "distil"):
        weights = [source.weight for source in sources]
        corpus = Corpus(
            paths, window=width, seed=seed, weights=weights, verify=True,
            tokenizer_hash=vocabulary_hash(tokenizer),
        )  # fmt: skip
        return TextRows(corpus), corpus.describe()
    read = read_pairs if recipe.objective == "preference" else read_examples
    units, report = read(paths, tokenizer, max_tokens=width)
    if not recipe.data.skip_bad:
        report.refuse_bad_lines()
    if not units:
        raise InvalidRequest(f"{', '.join(map(str, paths))}: there is nothing to learn from")
    rows = ExampleRows(units, width, seed)
    return rows, {
        "files": [str(path) for path in paths], "conversations": report.n_conversations,
        "tokens": report.n_tokens, "trained_tokens": report.n_trained_tokens, "rows": len(rows),
        "left_out": [str(line) for line in report.bad],
    }  # fmt: skip


def _tasks(
    recipe: "Recipe", paths: Sequence[Path], tokenizer: Tokenizer, judge: Judge | None
) -> tuple[TaskRows, dict[str, Any]]:
    room = recipe.data.window - recipe.drawing.max_tokens
    tasks, report = read_tasks(paths, tokenizer, max_tokens=room)
    reasons = {task.place: judge and judge.check(task) for task in tasks}
    for task in tasks:
        if reason := reasons[task.place]:
            file, _, line = task.place.rpartition(", line ")
            report.bad.append(BadLine(file, int(line), reason))
    if not recipe.data.skip_bad:
        report.refuse_bad_lines()
    tasks = [task for task in tasks if not reasons[task.place]]
    if not tasks:
        raise InvalidRequest(f"{', '.join(map(str, paths))}: there is nothing to answer")
    content = [[task.ids, task.reference, task.row] for task in tasks]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return TaskRows(tasks, recipe.seed), {
        "files": [str(path) for path in paths], "prompts": len(tasks), "sha256": digest,
        "tokens": report.n_tokens, "left_out": [str(line) for line in report.bad],
    }  # fmt: skip


def same_data(before: Path, now: dict[str, Any]) -> None:
    """Refuse to resume a run on other data than it began with; else record the data.

    Raises:
        InvalidRequest: the data changed.
    """
    text = json.dumps(now, indent=1, ensure_ascii=False, default=str)
    if not before.exists():
        write_whole(before, text.encode())
    elif before.read_text("utf-8") != text:
        raise InvalidRequest(
            f"{before.parent}: its data changed since the run began (see {before.name})"
        )
