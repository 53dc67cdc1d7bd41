"""A model written as another folder, matrix by matrix: in a number format, or with an adapter.

Formats with fixed scales need to know how large things get, so `calibrate` runs the model over real
text once: the inputs of its layers, and its keys and values for a KV cache in FP8. `quantize` and
`merge` then stream the weights, so that a 12B model is converted where it would not fit.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from opennemo.errors import CheckpointError, InvalidRequest
from opennemo.files import new_folder
from opennemo.model import compressed
from opennemo.model.attention import Packed
from opennemo.model.checkpoint import load, open_checkpoint, write_model
from opennemo.model.companions import copy_companions, take_over_companions
from opennemo.model.formats import FORMATS, SCALED_KV
from opennemo.model.layouts import FolderLayout
from opennemo.model.lora import fold, read_adapter
from opennemo.model.pages import rounding_of
from opennemo.model.quantization import calibration as record_inputs
from opennemo.model.quantization import quantize_linear
from opennemo.progress import Progress
from opennemo.tokenizer import load_tokenizer

WINDOW = 512  # tokens of each text


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How large a model's numbers got."""

    largest_inputs: Mapping[str, float]  # of linear layers, by path
    kv_scale: Tensor  # (L, 2) of keys and of values


@dataclass
class _Watched:
    """Attends as `attend` does, and notes the largest key and value of each layer."""

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
        InvalidRequest: there is no text.
    """
    tokenizer, model = load_tokenizer(path), load(path, dtype=torch.float32)
    left, largest_kv = n_tokens, torch.zeros(model.config.n_layers, 2)
    with record_inputs(model) as largest_inputs:
        for text in texts:
            start = [tokenizer.bos_id] if tokenizer.add_bos else []
            ids = (start + tokenizer.encode(text))[: min(left, WINDOW)]
            if not ids:
                continue
            packed = Packed.of(len(ids), window=model.config.sliding_window)
            model(torch.tensor(ids), _Watched(packed, largest_kv))
            left -= len(ids)
            if left <= 0:
                break
    if left == n_tokens:
        raise InvalidRequest("there is no text to calibrate on")
    rounding = rounding_of(SCALED_KV)
    scales = [rounding.scale(largest).view(()) for largest in largest_kv.view(-1, 1)]
    return Calibration(
        largest_inputs=largest_inputs, kv_scale=torch.stack(scales).view_as(largest_kv)
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
) -> None:
    """Write a model as a folder with the matrices of its blocks in codes, one after the other.

    Needs memory for the matrices that share a scale (at most two of the feed-forward's), however
    large the model is. Embedding, norms and head stay as they are stored.

    Args:
        format: of `formats.names("store")`.
        calibration: what `calibrate` returned; a static format needs it, and so does `kv`.
        kv: whether to write scales for a KV cache in FP8 along.

    Raises:
        CheckpointError: as for `convert`; or the layout or shape does not admit the format.
    """
    source, row = open_checkpoint(src), FORMATS[format]
    if source.format:
        raise CheckpointError(f"{src}: is stored as {source.format} already")
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

    What is a GGUF file becomes a folder of Hugging Face's. A tokenizer or chat template beside the
    adapter that differs from the model's takes its place.

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
        module = name.removesuffix(".weight")
        if module not in parts:
            return source.read(name, wanted)
        return fold(source.read(name, torch.float32), *parts[module]).to(wanted)

    layout = "hf" if source.layout == "gguf" else source.layout
    with new_folder(dst) as partial:
        tensors = {n: (wanted, shape) for n, shape in source.shapes.items()}
        write_model(partial, layout, source.config, tensors, read, progress=progress)
        copy_companions(src, partial, layout=layout)
        rows = source.config.vocab_size
        take_over_companions(adapter, partial, layout=layout, rows=rows)
