"""Models on disk: open, load, save and convert the folders and files that they come in.

Whatever its layout, an opened `Checkpoint` is a shape and a way to read one weight at a time, under
Mistral's name and in Mistral's order of channels. Loading reads them into a model, converting
streams them into another folder, in codes if export.py does it; neither holds two copies, and
files are memory-mapped.

Only safetensors and GGUF are read: they hold numbers, and nothing that could run. A folder gets its
name when everything is in it, never before. layouts.py knows the names in each layout,
model_folder.py the files of a folder, companions.py what accompanies the weights, hub.py the hub.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from opennemo.errors import CheckpointError
from opennemo.files import new_folder, read_json, write_json
from opennemo.model import compressed, layouts
from opennemo.model.companions import copy_companions
from opennemo.model.formats import BLOCKS, FORMATS, BlockFormat, Format, plain
from opennemo.model.layouts import FolderLayout, Layout
from opennemo.model.model_folder import FILES, first_five, layout_of, weight_files
from opennemo.model.quantization import (
    QuantizedEmbedding,
    QuantizedLinear,
    quantize_rows,
    replace_module,
)
from opennemo.model.tensor_files import PLAIN, SafetensorFiles, forget_pages, write_safetensors
from opennemo.model.text_part import text_part
from opennemo.model.transformer import ModelConfig, Transformer
from opennemo.progress import Progress

EMBEDDING, HEAD = "tok_embeddings.weight", "output.weight"
MAX_SHARD = 5 * 10**9  # bytes, as on the hub


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model on disk, opened and checked, but not read."""

    layout: Layout
    config: ModelConfig
    format: str | None  # of FORMATS, if the matrices of its blocks are stored in codes
    files: Any  # SafetensorFiles or GGUF, which read alike

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight's shape, as if nothing were stored in codes."""
        return weight_shapes(self.config)

    @cached_property
    def in_blocks(self) -> bool:
        """Whether it is a GGUF file with matrices in blocks."""
        return any(self._blocks_of(name) for name in self.shapes)

    @property
    def unpacked_on_gpu(self) -> bool:
        """Whether a GPU's kernels can multiply with all matrices in blocks."""
        return all(b.unpacked_on_gpu for n in self.shapes if (b := self._blocks_of(n)))

    @property
    def dtype(self) -> torch.dtype:
        """The type of the embedding, which stands for the rest; float32 if it is in blocks."""
        return self.files.dtypes[layouts.spell(EMBEDDING, self.layout)]

    def stored_types(self) -> dict[str, tuple[int, int]]:
        """Types of the tensors, the largest part first: how many, and their bytes."""
        types: dict[str, tuple[int, int]] = {}
        for type, n_bytes in self.files.stored_types():
            n, total = types.get(type, (0, 0))
            types[type] = (n + 1, total + n_bytes)
        return dict(sorted(types.items(), key=lambda item: -item[1][1]))

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor by Mistral's name: a view of the file where that is possible, else a copy."""
        own = layouts.spell(name, self.layout)
        tensor = self.files.read(own, dtype or self.files.dtypes[own])
        # Codes, and scales of rows, move with their rows; scales of a whole matrix stay.
        if self.layout == "hf" and layouts.is_rotated(name) and tensor.numel() > 2:
            turned = layouts.halves_to_pairs(tensor, self.config.head_dim)
            forget_pages(tensor)
            return turned
        return tensor

    def read_linear(self, module: str) -> QuantizedLinear:
        """One matrix in codes, by the path of its module."""
        assert self.format is not None
        format, shape = FORMATS[self.format], self.shapes[f"{module}.weight"]
        parts = compressed.parts(format, self.layout, shape)
        tensors = {suffix: self.read(f"{module}.{suffix}") for suffix in parts}
        return compressed.unpack(format, self.layout, shape, tensors)

    def runs_in(self, name: str, form: "Form") -> Format:
        """What a weight becomes as it is loaded, by Mistral's name; a tied head is one, too."""
        rounded = FORMATS[self.format] if self.format else form.format
        if rounded and compressed.is_stored_in_codes(name):
            return rounded.at_width(self.shapes[name][1])
        stays = form.blocks and (form.head_in_blocks or not self._is_of_head(name))
        if stays and (blocks := self._blocks_of(name)):
            return blocks
        if form.head and name == HEAD:
            return form.head
        kept = plain(form.dtype or self.dtype)
        assert kept is not None, form.dtype
        return kept

    def read_in(self, name: str, format: Format) -> dict[str, Tensor]:
        """One matrix as the tensors of a format in codes: as stored, or rounded while it is read.

        Blocks that no kernel multiplies become q8_0, and a warning says so.
        """
        if self.format and compressed.is_stored_in_codes(name):
            return self.read_linear(name.removesuffix(".weight")).tensors
        own = layouts.spell(self._stored_name(name), self.layout)
        if self.layout == "gguf" and self.files.format_of(own) == format.name:
            return {"weight": self.files.read_codes(own)}
        if self.layout == "gguf" and self.files.is_rare(own):
            rare = self.files.type_of(own)
            message = f"weights in {rare} are rounded to {format.name} as they are read"
            warnings.warn(message, stacklevel=3)
        weight = self.read(self._stored_name(name))
        tensors = quantize_rows(format, weight)
        forget_pages(weight)
        return tensors

    def _is_of_head(self, name: str) -> bool:
        return name == HEAD or (name == EMBEDDING and self.config.tied_embeddings)

    def _stored_name(self, name: str) -> str:
        """A weight's own name, or the embedding's for a head that is tied to it."""
        return name if name in self.shapes else EMBEDDING

    def _blocks_of(self, name: str) -> BlockFormat | None:
        """The format of a matrix of a GGUF file that stays in its blocks; None if it has none."""
        own = layouts.spell(self._stored_name(name), self.layout)
        if self.layout != "gguf" or len(self.files.shapes[own]) != 2:
            return None
        if format := self.files.format_of(own):
            return BLOCKS[format]
        return BLOCKS["q8_0"] if self.files.is_rare(own) else None

    def read_kv_scale(self) -> Tensor | None:
        """Scales (L, 2) of keys and values for a KV cache in FP8, if the model brings them.

        Raises:
            CheckpointError: one of them is not a positive number.
        """
        return compressed.read_kv_scale(self.files, self.config.n_layers, self.layout)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a model folder or `.gguf` file, and check that every weight is there in its shape.

    Raises:
        CheckpointError: not a model, incomplete, damaged, or of a kind that is not supported.
    """
    if path.suffix == ".gguf":
        from opennemo.model.gguf import GGUF  # takes 1 s to import, and most models are folders

        layout, where, files = "gguf", path, GGUF(path)
        if (kind := files.settings.get("general.type", "model")) != "model":
            raise CheckpointError(
                f"{path}: holds {layouts.short(kind)}, not a model; an adapter is merged or served "
                "as the folder that it was made of"
            )
        settings = files.settings
    else:
        layout = layout_of(path)
        where = path / FILES[layout][0]
        settings, files = read_json(where), SafetensorFiles(weight_files(path, layout))
        settings = text_part(settings, layout, files, where)
    # Where settings do not say whether the head is tied, it is tied if the weights have no head.
    head = layouts.spell("output.", layout)
    has_head = any(name.startswith(head) for name in files.shapes)
    settings = {layouts.key("tied_embeddings", layout): not has_head, **settings}
    config, format = layouts.read_settings(settings, layout, where), None
    if layout != "gguf":
        matrices = {layouts.spell(n, "hf").removesuffix(".weight"): shape
                    for n, shape in weight_shapes(config).items()}  # fmt: skip
        format, files = compressed.recognise(settings, where, files, matrices)
    _compare(files, config, layout, format, path)
    return Checkpoint(layout=layout, config=config, format=format, files=files)


def read_config(path: Path) -> ModelConfig:
    """The shape of a model folder or `.gguf` file, checked against the weights in it."""
    return open_checkpoint(path).config


@dataclass(frozen=True, kw_only=True)
class Form:
    """What weights become as they are loaded; `Checkpoint.runs_in` gives it for each."""

    dtype: torch.dtype | None = None  # of weights not in codes; None: the embedding's, as stored
    blocks: bool = False  # matrices in a GGUF file's blocks stay so, unless `format` names another
    format: Format | None = None  # the matrices of the model's blocks are rounded to it
    head: Format | None = None  # the head is rounded to it, if it is not in blocks
    head_in_blocks: bool = True  # whether the head, and an embedding tied to it, stays so, too


def load(
    source: Path | Checkpoint,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    form: Form | None = None,
) -> Transformer:
    """A model folder or `.gguf` file as a model, by default in the type it is stored in.

    Takes the memory of the model and of one weight more. Weights that the file has in the wanted
    type take none: they are mapped, privately, so that training may write to them. So are the
    matrices of a GGUF file in codes, if `form` keeps them; otherwise they are dequantised.

    Args:
        dtype: in place of a `form`, the type of weights that are not in codes.

    Raises:
        CheckpointError: not a model, incomplete, damaged, or of a kind that is not supported.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    form, config = form or Form(dtype=dtype), checkpoint.config
    model = empty_model(config)
    for name in (*checkpoint.shapes, *([HEAD] if config.tied_embeddings else ())):
        format, (module, _, kind) = checkpoint.runs_in(name, form), name.rpartition(".")
        if format.in_codes:
            shape = checkpoint.shapes.get(name, checkpoint.shapes[EMBEDDING])
            tied = config.tied_embeddings and name == HEAD
            if tied and getattr(model.tok_embeddings, "format", None) is format:
                tensors = dict(model.tok_embeddings.named_buffers())  # in memory once
            else:
                tensors = {n: t.to(device) for n, t in checkpoint.read_in(name, format).items()}
            stored: nn.Module = QuantizedLinear(format, shape, tensors)
            if name == EMBEDDING:
                stored = QuantizedEmbedding(format, shape, tensors, form.dtype or checkpoint.dtype)
            replace_module(model, module, stored)
        elif name in checkpoint.shapes:
            weight = checkpoint.read(name, format.weights.dtype).to(device)
            setattr(model.get_submodule(module), kind, nn.Parameter(weight))
        else:
            model.output.weight = model.tok_embeddings.weight
    return model


def save(model: Transformer, folder: Path, *, layout: FolderLayout = "hf") -> None:
    """Write a model's settings and weights; `copy_companions` adds the tokenizer.

    Raises:
        CheckpointError: the folder is not empty, or cannot be written.
    """
    weights = dict(model.named_parameters())
    dtype = model.tok_embeddings.weight.dtype
    with new_folder(folder) as partial:
        tensors = {n: (dtype, shape) for n, shape in weight_shapes(model.config).items()}
        read = lambda n: weights[n].detach().to("cpu", dtype)  # noqa: E731
        write_model(partial, layout, model.config, tensors, read)


def convert(
    src: Path,
    dst: Path,
    *,
    to: FolderLayout,
    dtype: torch.dtype | None = None,
    progress: Progress = lambda done, total: None,
) -> None:
    """Write any model as a folder in a layout, tokenizer included, weight by weight.

    Args:
        progress: called with the bytes of weights that are written, and of all.

    Raises:
        CheckpointError: as for `load` and `save`; or the model is stored in codes.
    """
    source = open_checkpoint(src)
    if source.format:
        raise CheckpointError(f"{src}: is stored as {source.format}; convert what it was made from")
    dtype = dtype or source.dtype
    with new_folder(dst) as partial:
        tensors = {n: (dtype, shape) for n, shape in source.shapes.items()}
        read = lambda n: source.read(n, dtype)  # noqa: E731
        write_model(partial, to, source.config, tensors, read, progress=progress)
        copy_companions(src, partial, layout=to)


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every weight of a model, a tied head left out: name -> shape."""
    return {name: tuple(w.shape) for name, w in empty_model(config).named_parameters()}


def empty_model(config: ModelConfig) -> Transformer:
    """A model on the meta device: every shape, no memory."""
    with torch.device("meta"), _Uninitialised():
        return Transformer(config)


class _Uninitialised(TorchFunctionMode):
    """Skips initial values, which on the meta device only import sympy: 2 s."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (nn.init.normal_, nn.init.kaiming_uniform_):
            return kwargs["tensor"]
        return func(*args, **kwargs)


def _compare(
    files: Any, config: ModelConfig, layout: Layout, format: str | None, path: Path
) -> None:
    stored, shapes, odd = files.shapes, {}, []
    for name, shape in weight_shapes(config).items():
        parts = {"weight": (None, shape)}
        if format and compressed.is_stored_in_codes(name):
            parts = compressed.parts(FORMATS[format], layout, shape)
        for suffix, (dtype, size) in parts.items():
            own = layouts.spell(f"{name.removesuffix('weight')}{suffix}", layout)
            # The one scale of a matrix may be written as a number or as a list of one.
            one = math.prod(size) == 1 and stored.get(own) in ((), (1,), (1, 1))
            shapes[own] = stored[own] if one else size
            kind = files.dtypes.get(own)
            if kind not in (None, dtype, *PLAIN.values()):
                odd.append(f"{own} in {str(kind).removeprefix('torch.')}")
    # Tensors that may be stored though they are not needed: a tied head, in old files RoPE's
    # angles, and the scales of a KV cache in FP8.
    ignored = (
        layouts.spell(HEAD, layout), "rotary_emb.inv_freq", "rope_freqs.weight",
        *(name for pair in compressed.KV_SCALES[layout] for name in pair),
    )  # fmt: skip
    problems = {
        "in codes that the settings do not explain": odd,
        "missing": [name for name in shapes if name not in stored],
        "unexpected": [
            layouts.short(n) for n in stored if n not in shapes and not n.endswith(ignored)
        ],
        "of another shape than the settings ask for": [
            f"{name} is {layouts.short(stored[name])}, not {shape}"
            for name, shape in shapes.items()
            if stored.get(name, shape) != shape
        ],
    }
    for problem, weights in problems.items():
        if weights:
            raise CheckpointError(f"{path}: weights {problem}: {first_five(weights)}")


def write_model(
    folder: Path,
    layout: FolderLayout,
    config: ModelConfig,
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    read: Callable[[str], Tensor],
    more_settings: Mapping[str, Any] | None = None,
    progress: Progress = lambda done, total: None,
    extra: Mapping[str, Tensor] | None = None,
) -> None:
    """Write settings and weights into a folder, asking `read` for each tensor when its turn comes.

    `extra` are small tensors under the layout's own names, `more_settings` go into the settings.
    """
    content, given = layouts.write_settings(config, layout), read
    if layout == "mistral" and config.tied_embeddings:  # mistral-inference reads a head in any case
        tensors = {**tensors, "output.weight": tensors["tok_embeddings.weight"]}
        read = lambda n: given("tok_embeddings.weight" if n == "output.weight" else n)  # noqa: E731
    own_names = {layouts.spell(name, layout): name for name in tensors}
    sizes = {
        layouts.spell(name, layout): math.prod(shape) * dtype.itemsize
        for name, (dtype, shape) in tensors.items()
    }
    total, done = sum(sizes.values()), 0
    extra = extra or {}

    def tensor(name: str) -> Tensor:
        nonlocal done
        if name in extra:
            return extra[name]
        done += sizes[name]
        progress(done, total)
        own = own_names[name]
        tensor = read(own)
        if layout == "hf" and layouts.is_rotated(own) and tensor.numel() > 2:
            return layouts.pairs_to_halves(tensor, config.head_dim)
        return tensor

    settings, stem = FILES[layout]
    shards, room = [], 0
    for name, size in sizes.items():
        if size > room:
            shards.append({})
            room = MAX_SHARD if layout == "hf" else total
        shards[-1][name] = tensors[own_names[name]]
        room -= size
    shards[-1] |= {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in extra.items()}
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        number = f"-{i:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        write_safetensors(folder / f"{stem}{number}.safetensors", shard, tensor)
        weight_map |= dict.fromkeys(shard, f"{stem}{number}.safetensors")
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / f"{stem}.safetensors.index.json", index)
    dtype = tensors[EMBEDDING][0]
    stored_as = {"torch_dtype": str(dtype).removeprefix("torch.")} if layout == "hf" else {}
    write_json(folder / settings, content | stored_as | dict(more_settings or {}))
