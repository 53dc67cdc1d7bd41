"""Write a model again, matrix by matrix: in a number format, as GGUF, or with an adapter.

Formats with fixed scales need to know how large things get, so `calibrate` runs the model over real
text once: the inputs of its layers, and its keys and values for a KV cache in FP8. Blocks of codes
lose less where it counts if the size of each input is known (`importance`); for that, one layer
after the other is in memory. `quantize`, `to_gguf` and `merge` then stream the weights, so that a
12B model can be converted where it would not fit.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opennemo.errors import CheckpointError, InvalidRequest
from opennemo.files import new_folder
from opennemo.model import blocks, compressed
from opennemo.model.adapter_files import read_adapter
from opennemo.model.attention import Packed
from opennemo.model.checkpoint import Checkpoint, load, open_checkpoint, write_model
from opennemo.model.companions import copy_companions, take_over_companions
from opennemo.model.formats import FORMATS, SCALED_KV
from opennemo.model.layouts import FolderLayout
from opennemo.model.lora import fold
from opennemo.model.memory import refuse_beyond
from opennemo.model.pages import rounding_of
from opennemo.model.quantization import calibration as record_inputs
from opennemo.model.quantization import quantize_linear
from opennemo.model.transformer import Block, rotary
from opennemo.progress import Progress
from opennemo.tokenizer import load_tokenizer
from opennemo.tokenizer.load import difference_beside

WINDOW = 512  # tokens of each text


# A warning, with the type that weights are stored in.
TWICE = "weights in {} are rounded a second time: begin with 16 bits if you can"


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How large a model's numbers got."""

    largest_inputs: Mapping[str, float]  # of linear layers, by path
    kv_scale: Tensor  # (L, 2) of keys and of values


@dataclass
class _Watched:
    """Attends as `attend` does, and records the largest key and value of each layer."""

    attend: Packed
    largest: Tensor  # (L, 2)

    @property
    def positions(self) -> Tensor:
        return self.attend.positions

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        extremes = torch.stack((k.abs().amax(), v.abs().amax()))
        self.largest[layer] = torch.maximum(self.largest[layer], extremes)
        return self.attend(layer, q, k, v)


@torch.inference_mode()
def calibrate(path: Path, texts: Iterable[str], n_tokens: int) -> Calibration:
    """Run a model over the beginning of some texts, `n_tokens` in all.

    Raises:
        InvalidRequest: there is no text, or not enough memory for the model in float32.
    """
    checkpoint = open_checkpoint(path)
    refuse_beyond(4 * sum(map(math.prod, checkpoint.shapes.values())), f"{path} in float32")
    windows, model = _windows(path, texts, n_tokens), load(checkpoint, dtype=torch.float32)
    largest_kv = torch.zeros(model.config.n_layers, 2)
    with record_inputs(model) as largest_inputs:
        for ids in windows:
            packed = Packed.of(len(ids), window=model.config.sliding_window)
            model(torch.tensor(ids), _Watched(packed, largest_kv))
    rounding = rounding_of(SCALED_KV)
    scales = [rounding.scale(largest).view(()) for largest in largest_kv.view(-1, 1)]
    return Calibration(
        largest_inputs=largest_inputs, kv_scale=torch.stack(scales).view_as(largest_kv)
    )


def _windows(path: Path, texts: Iterable[str], n_tokens: int) -> list[list[int]]:
    """The beginnings of texts as ids, `n_tokens` in all."""
    tokenizer, windows, left = load_tokenizer(path), [], n_tokens
    for text in texts:
        start = [tokenizer.bos_id] if tokenizer.add_bos else []
        if ids := (start + tokenizer.encode(text))[: min(left, WINDOW)]:
            windows.append(ids)
            left -= len(ids)
        if left <= 0:
            break
    if not windows:
        raise InvalidRequest("there is no text to calibrate on")
    return windows


@torch.inference_mode()
def importance(
    path: Path,
    texts: Iterable[str],
    n_tokens: int,
    progress: Progress = lambda done, total: None,
) -> dict[str, Tensor]:
    """The mean square of each input (D,) of every matrix, by path of the module, over some texts.

    Takes the memory of one layer in float32 and its inputs, however many layers the model has.

    Args:
        progress: called with the layers that are done, and all.

    Raises:
        CheckpointError: as for `load`.
        InvalidRequest: there is no text.
    """
    source, windows = open_checkpoint(path), _windows(path, texts, n_tokens)
    config = source.config
    attend = Packed.of(*map(len, windows), window=config.sliding_window)
    tokens = torch.tensor([id for ids in windows for id in ids])
    x = source.read("tok_embeddings.weight", source.dtype)[tokens].float()
    rope = rotary(attend.positions, config)
    squares: dict[str, Tensor] = {}
    for i in range(config.n_layers):
        progress(i, config.n_layers)
        with torch.device("meta"):
            layer = Block(config, i)
        prefix = f"layers.{i}."
        for name, _ in list(layer.named_parameters()):
            module, _, kind = name.rpartition(".")
            weight = nn.Parameter(_read(source, f"{prefix}{name}"), requires_grad=False)
            setattr(layer.get_submodule(module), kind, weight)
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(_record_squares(squares, f"{prefix}{name}"))
        x = layer(x, rope, attend)
    progress(config.n_layers, config.n_layers)
    norm = source.read("norm.weight", torch.float32)
    head = "tok_embeddings" if config.tied_embeddings else "output"
    squares[head] = F.rms_norm(x, norm.shape, norm, config.norm_eps).square().mean(0)
    return squares


def _read(source: Checkpoint, name: str) -> Tensor:
    """A weight in float32, also of a folder in codes."""
    module = name.removesuffix(".weight")
    if source.format and compressed.is_stored_in_codes(name):
        return source.read_linear(module).dequantize(torch.float32)
    return source.read(name, torch.float32)


def _record_squares(squares: dict[str, Tensor], path: str) -> Callable[..., None]:
    def record(_: nn.Module, inputs: tuple[Tensor]) -> None:
        squares[path] = inputs[0].square().mean(0)

    return record


def to_gguf(
    src: Path,
    dst: Path,
    *,
    format: str | None = None,
    pure: bool = False,
    dtype: torch.dtype | None = None,
    importance: Mapping[str, Tensor] | None = None,
    progress: Progress = lambda done, total: None,
    say: Callable[[str], None] = warnings.warn,
) -> None:
    """Write a model as one GGUF file: in a mixture of blocks, in a plain type, or as it is stored.

    Args:
        format: of `gguf_writer.MIXTURES`.
        pure: the format is one of `formats.BLOCKS`, in which all matrices of the layers are
            written, as they are while a model learns in it.
        dtype: of the matrices, where no format is given.
        importance: of inputs, as the function of that name returns it.
        progress: called with the bytes of weights that are written, and of all.
        say: called with each warning, one line.

    Raises:
        CheckpointError: as for `write_gguf`; or the model is stored in codes other than blocks.
    """
    from opennemo.model import gguf_writer as writer

    source = open_checkpoint(src)
    if source.format:
        raise CheckpointError(
            f"{src}: is stored as {source.format}; write GGUF from what it was made from"
        )
    stored = writer.stored_types(source) if source.layout == "gguf" else {}
    if format is not None:
        mixture = writer.pure(format) if pure else writer.MIXTURES[format]
        types, number = mixture.types(source.shapes, source.config), mixture.number
        coarse = {stored[n] for n, t in types.items() if stored.get(n) in blocks.TYPES.keys() - {t}}
        if coarse:
            say(TWICE.format(", ".join(sorted(coarse))))
    elif dtype is None and stored:
        types, number = stored, source.files.settings.get("general.file_type", 1024)
    else:
        types, number = writer.plain_types(source.shapes, dtype or source.dtype)
    writer.write_gguf(
        dst, src, source, types=types, file_type=number, importance=importance, progress=progress
    )


def quantize(
    src: Path,
    dst: Path,
    *,
    format: str,
    to: FolderLayout = "hf",
    calibration: Calibration | None = None,
    kv: bool = False,
    progress: Progress = lambda done, total: None,
    say: Callable[[str], None] = warnings.warn,
) -> None:
    """Write a model as a folder with the matrices of its blocks in codes, one after the other.

    Needs memory for the matrices that share a scale (at most two of the feed-forward's), however
    large the model is. Embedding, norms and head stay as they are stored.

    Args:
        format: of `formats.names("store")`.
        calibration: what `calibrate` returned; a static format needs it, and so does `kv`.
        kv: whether to write scales for a KV cache in FP8 along.
        say: called with a warning.

    Raises:
        CheckpointError: as for `convert`; or the layout or shape does not admit the format.
    """
    source, row = open_checkpoint(src), FORMATS[format]
    if source.format:
        raise CheckpointError(f"{src}: is stored as {source.format} already")
    if source.in_blocks:
        say(TWICE.format("blocks"))
    try:
        settings = compressed.describe(row, to, kv)
    except ValueError as error:
        raise CheckpointError(f"{dst}: {error}") from None
    shapes = source.shapes
    if problem := compressed.misfit(row, shapes):
        raise CheckpointError(f"{src}: {problem}")
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if not compressed.is_stored_in_codes(name):
            tensors[name] = (source.dtype, shape)
            continue
        module = name.removesuffix("weight")
        parts = compressed.parts(row, to, shape)
        tensors |= {f"{module}{suffix}": part for suffix, part in parts.items()}
    largest = calibration.largest_inputs if calibration else None
    packed: dict[str, Tensor] = {}  # of the matrix in progress

    def read(name: str) -> Tensor:
        module = name.rpartition(".")[0]
        if name in shapes and not compressed.is_stored_in_codes(name):
            return source.read(name, source.dtype)
        if name not in packed:
            packed.clear()
            weight_of = lambda m: source.read(f"{m}.weight", source.dtype)  # noqa: E731
            linear = quantize_linear(row, module, weight_of, largest)
            stored = compressed.pack(row, to, linear)
            packed.update({f"{module}.{suffix}": tensor for suffix, tensor in stored.items()})
        return packed[name]

    extra: dict[str, Tensor] = {}
    if kv and calibration is None:
        raise ValueError("scales for keys and values come from text: calibrate first")
    for i, pair in enumerate(calibration.kv_scale if kv and calibration else ()):
        extra |= zip(compressed.kv_scale_names(i, to), pair.split(1), strict=True)
    with new_folder(dst) as partial:
        write_model(partial, to, source.config, tensors, read, settings, progress, extra)
        copy_companions(src, partial, layout=to)


def merge(
    src: Path,
    adapter: Path,
    dst: Path,
    *,
    dtype: torch.dtype | None = None,
    progress: Progress = lambda done, total: None,
) -> None:
    """Write a model with an adapter folded into its weights, in the layout that it has.

    What is a GGUF file becomes a folder of Hugging Face's; if `dst` is called `.gguf`, anything
    becomes such a file. In a folder, a tokenizer or chat template beside the adapter that differs
    from the model's takes its place.

    Args:
        adapter: a folder that PEFT or `save_adapter` wrote.
        dtype: of the weights, by default as they are stored.

    Raises:
        CheckpointError: as for `convert` and `read_adapter`; or the model is stored in codes.
    """
    source = open_checkpoint(src)
    if source.format:
        raise CheckpointError(
            f"{src}: is stored as {source.format}, and the sum is nothing that those codes could "
            "hold; merge into what it was made from, then quantize"
        )
    parts = read_adapter(adapter, source.config)
    wanted = dtype or source.dtype

    def read(name: str) -> Tensor:
        module, weight = name.removesuffix(".weight"), source.read(name, torch.float32)
        return (fold(weight, *parts[module]) if module in parts else weight).to(wanted)

    if dst.suffix == ".gguf":
        from opennemo.model import gguf_writer as writer

        if difference := difference_beside(adapter, load_tokenizer(src)):
            raise CheckpointError(
                f"{adapter}: {difference}; merge into a folder, which takes it over, then convert"
            )
        types, number = writer.plain_types(source.shapes, wanted)
        writer.write_gguf(
            dst, src, source, types=types, file_type=number, read=read, progress=progress
        )
        return
    layout = "hf" if source.layout == "gguf" else source.layout
    with new_folder(dst) as partial:
        tensors = {n: (wanted, shape) for n, shape in source.shapes.items()}
        write_model(partial, layout, source.config, tensors, read, progress=progress)
        copy_companions(src, partial, layout=layout)
        rows = source.config.vocab_size
        take_over_companions(adapter, partial, layout=layout, rows=rows)
