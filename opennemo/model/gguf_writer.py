"""Any model written as one `.gguf` file, in 16 or 32 bits or in blocks of codes.

The head is written by the `gguf` package; then the tensors follow as they are read, some rows at a
time, so that a file is made in little memory however large the model is. Tensors that the source
has in the wanted type already are copied byte for byte.

`MIXTURES` says which type each matrix gets. As in llama.cpp, matrices that matter more have more
bits: the head, and in some layers the values and the second matrix of the feed-forward.

Specification: docs/gguf.md of ggml; mixtures: `llama-quant.cpp` of llama.cpp.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from opennemo.errors import CheckpointError
from opennemo.files import open_whole, remove_partials
from opennemo.model import blocks, layouts
from opennemo.model.adapter_files import read_adapter
from opennemo.model.checkpoint import Checkpoint
from opennemo.model.companions import GGUF_SAMPLING, read_generation_config
from opennemo.model.gguf import PLAIN
from opennemo.model.transformer import ModelConfig
from opennemo.progress import Progress
from opennemo.tokenizer import load_tokenizer
from opennemo.tokenizer.gguf_head import read_metadata
from opennemo.tokenizer.gguf_saving import gguf_fields

ALIGNMENT = 32
CHUNK = 2**22  # weights that are read at a time
# The type in layer i of n, or None for that of most matrices.
InLayer = Callable[[int, int], str | None]


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Types of the matrices of a file: of most, and of those that matter more."""

    number: int  # in the file's head
    most: str
    head: str = "q6_k"
    embedding: str | None = None
    values: InLayer = lambda i, n: None  # of attention.wv
    shared_values: str | None = None  # the same where 4 heads or more share keys and values
    out: str | None = None  # of attention.wo
    down: InLayer = lambda i, n: None  # of feed_forward.w2

    def types(self, shapes: Mapping[str, tuple[int, ...]], config: ModelConfig) -> dict[str, str]:
        """The type of every weight, by Mistral's name; norms stay in float32."""
        return {name: self._type(name, shape, config) for name, shape in shapes.items()}

    def _type(self, name: str, shape: tuple[int, ...], config: ModelConfig) -> str:
        if len(shape) != 2:
            return "f32"
        type, n_layers = None, config.n_layers
        if name == "output.weight" or (name == "tok_embeddings.weight" and config.tied_embeddings):
            type = self.head
        elif name == "tok_embeddings.weight":
            type = self.embedding
        elif ".wv." in name:
            shared = config.n_heads >= 4 * config.n_kv_heads
            type = (shared and self.shared_values) or self.values(_layer(name), n_layers)
        elif ".wo." in name:
            type = self.out
        elif ".w2." in name:
            type = self.down(_layer(name), n_layers)
        return blocks.at_width(type or self.most, shape[1])


def _layer(name: str) -> int:
    return int(name.split(".")[1])


def _six_in_some(i: int, n: int) -> str | None:
    """The first and the last eighth of the layers, and every third between."""
    return "q6_k" if i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2 else None


def _five_at_first(i: int, n: int) -> str | None:
    return "q5_k" if i < n // 8 else None


MIXTURES = {
    "q4_k_m": Mixture(number=15, most="q4_k", values=_six_in_some, down=_six_in_some),
    "q4_k_s": Mixture(
        number=14, most="q4_k", down=_five_at_first,
        values=lambda i, n: "q5_k" if i < 4 else None,
    ),
    "q5_k_m": Mixture(number=17, most="q5_k", values=_six_in_some, down=_six_in_some),
    "q5_k_s": Mixture(number=16, most="q5_k"),
    "q6_k": Mixture(number=18, most="q6_k"),
    "q8_0": Mixture(number=7, most="q8_0", head="q8_0"),
    "iq4_xs": Mixture(number=30, most="iq4_xs", shared_values="q5_k", down=_five_at_first),
    "iq4_nl": Mixture(number=25, most="iq4_nl", shared_values="q5_k", down=_five_at_first),
    "q4_0": Mixture(number=2, most="q4_0"),
    "q4_1": Mixture(number=3, most="q4_1"),
    "q5_0": Mixture(number=8, most="q5_0"),
    "q5_1": Mixture(number=9, most="q5_1"),
    "q3_k_m": Mixture(
        number=12, most="q3_k", out="q4_k", values=lambda i, n: "q5_k" if i < 2 else "q4_k",
        down=lambda i, n: "q5_k" if i < n // 16 else "q4_k",
    ),
    "q2_k": Mixture(
        number=10, most="q2_k", out="q3_k", shared_values="q4_k", values=lambda i, n: "q3_k",
        down=lambda i, n: "q3_k",
    ),
}  # fmt: skip


def pure(type: str) -> Mixture:
    """One type for all matrices of the layers; embedding and head in eight bits."""
    return Mixture(number=gguf.LlamaFileType.GUESSED, most=type, head="q8_0", embedding="q8_0")


def plain_types(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> tuple[dict[str, str], int]:
    """Matrices in a plain type, norms in float32; and the number in the head."""
    name = {each: type.name.lower() for type, each in PLAIN.items()}[dtype]
    types = {key: name if len(shape) == 2 else "f32" for key, shape in shapes.items()}
    return types, {"f32": 0, "f16": 1, "bf16": 32}[name]


def stored_types(source: Checkpoint) -> dict[str, str]:
    """Every weight of a GGUF file in the type that it has there."""
    return {n: source.files.type_of(layouts.spell(n, "gguf")).lower() for n in source.shapes}


def write_gguf(
    dst: Path,
    src: Path,
    source: Checkpoint,
    *,
    types: Mapping[str, str],
    file_type: int,
    importance: Mapping[str, Tensor] | None = None,
    read: Callable[[str], Tensor] | None = None,
    progress: Progress = lambda done, total: None,
) -> None:
    """Write the opened model `source` of the path `src` as a file, whole or not at all.

    Args:
        types: of every weight, by Mistral's name: "f32", "f16", "bf16" or one of `blocks.TYPES`.
        file_type: llama.cpp's number for the types, for the head.
        importance: of the inputs of matrices (D,), by the path of the module.
        read: gives a weight in place of the source's own, as when an adapter is folded in.
        progress: called with the bytes of weights that are written, and of all.

    Raises:
        CheckpointError: the file exists or cannot be written, a width is not in whole blocks,
            weights are not finite, or the vocabulary has no place in such a file.
    """
    tensors = {}
    for name, shape in source.shapes.items():
        type = Type[types[name].upper()]
        n, n_bytes = gguf.GGML_QUANT_SIZES[type]
        if shape[-1] % n:
            needs = f"{types[name]} needs widths in multiples of {n}"
            raise CheckpointError(f"{src}: {needs}, {name} is {shape}")
        tensors[name] = Place(shape, type, math.prod(shape) // n * n_bytes)
    fields = head_fields(src, source) | {
        "general.file_type": file_type, "general.quantization_version": 2,
    }  # fmt: skip
    fields.setdefault("general.name", dst.stem)

    if (factors := layouts.rope_factors(source.config)) is not None:
        tensors["rope_freqs.weight"] = Place((len(factors),), Type.F32, 4 * len(factors))

    def parts(name: str) -> Iterator[Tensor]:
        if factors is not None and name == "rope_freqs.weight":
            return iter([factors.view(torch.uint8)])
        weight = (importance or {}).get(name.removesuffix(".weight"))
        return _parts(src, source, name, types[name], weight, read)

    _write(dst, fields, tensors, parts, progress)


def write_adapter(dst: Path, adapter: Path, config: ModelConfig) -> None:
    """Write a LoRA that PEFT saved as a file that llama.cpp adds to a model.

    Raises:
        CheckpointError: as for `read_adapter`, or the file exists or cannot be written.
    """
    parts = read_adapter(adapter, config)
    # llama.cpp multiplies by alpha / rank: one alpha for all modules, whose scales may differ.
    alpha = max(scale * len(a) for scale, a, _ in parts.values())
    halves = {}
    for module, (scale, a, b) in parts.items():
        halves[f"{module}.weight.lora_a"] = a
        halves[f"{module}.weight.lora_b"] = b * (scale * len(a) / alpha)
    fields = {
        "general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": alpha,
        "general.name": dst.stem,
    }  # fmt: skip
    tensors = {n: Place(tuple(t.shape), Type.F32, 4 * t.numel()) for n, t in halves.items()}
    bytes_of = lambda name: iter([halves[name].contiguous().view(torch.uint8).flatten()])  # noqa: E731
    _write(dst, fields, tensors, bytes_of)


class Place(NamedTuple):
    """The head's entry for a tensor."""

    shape: tuple[int, ...]
    type: Type
    n_bytes: int


def _write(
    dst: Path,
    fields: Mapping[str, Any],
    tensors: Mapping[str, Place],
    parts: Callable[[str], Iterator[Tensor]],
    progress: Progress = lambda done, total: None,
) -> None:
    """A file of fields and tensors, by Mistral's names, whole or not at all."""
    if dst.exists():
        raise CheckpointError(f"{dst}: exists; choose another name")
    done, total = 0, sum(place.n_bytes for place in tensors.values())
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        remove_partials(dst.parent, escape(dst.name))
        with open_whole(dst) as file:
            head = gguf.GGUFWriter(file.name, fields.get("general.architecture", "llama"))
            for key, value in fields.items():
                if key != "general.architecture":
                    _add(head, key, value)
            for name, place in tensors.items():
                module, kind, half = name.partition(".weight")
                own = layouts.spell(f"{module}{kind}", "gguf") + half
                n_bytes = place.n_bytes
                head.add_tensor_info(own, place.shape, np.dtype(np.float32), n_bytes, place.type)
            head.write_header_to_file()
            head.write_kv_data_to_file()
            head.write_ti_data_to_file()
            head.close()
            file.seek(0, os.SEEK_END)
            for name, place in tensors.items():
                file.write(bytes(-file.tell() % ALIGNMENT))
                end = file.tell() + place.n_bytes
                for part in parts(name):
                    file.write(part.numpy().data)
                    progress(done := done + part.numel(), total)
                assert file.tell() == end, name
            file.write(bytes(-file.tell() % ALIGNMENT))
    except OSError as error:
        raise CheckpointError(f"{dst}: cannot be written: {error}") from error


def head_fields(src: Path, source: Checkpoint) -> dict[str, Any]:
    """The fields of the file besides its weights: settings, vocabulary, sampling."""
    fields: dict[str, Any] = {"general.type": "model"}
    settings = layouts.write_settings(source.config, "gguf")
    if source.layout == "gguf":
        kept = ("general.", "tokenizer.")
        fields |= {k: v for k, v in read_metadata(src).items() if k.startswith(kept)}
        for key in ("general.alignment", "general.architecture"):
            fields.pop(key, None)
        return fields | settings
    generation = read_generation_config(src)
    fields |= {key: generation[name] for name, key in GGUF_SAMPLING.items() if name in generation}
    try:
        tokenizer = load_tokenizer(src)
        vocabulary = gguf_fields(tokenizer, source.config.vocab_size)
    except ValueError as error:
        raise CheckpointError(f"{src}: its vocabulary cannot be written: {error}") from error
    for id in generation.get("eos_token_ids", []):
        if id != tokenizer.eos_id:
            vocabulary.setdefault("tokenizer.ggml.eot_token_id", id)
    return fields | settings | vocabulary


def _add(head: Any, key: str, value: Any) -> None:
    """A key of the type that llama.cpp expects for such values."""
    match value:
        case bool():
            head.add_bool(key, value)
        case int():
            (head.add_uint32 if 0 <= value < 2**32 else head.add_int64)(key, value)
        case float():
            head.add_float32(key, value)
        case str():
            head.add_string(key, value)
        case _:
            head.add_array(key, value)


def _parts(
    src: Path,
    source: Checkpoint,
    name: str,
    type: str,
    importance: Tensor | None,
    read: Callable[[str], Tensor] | None,
) -> Iterator[Tensor]:
    """The bytes of one weight in a type, some rows at a time."""
    own, shape = layouts.spell(name, source.layout), source.shapes[name]
    n_rows = max(1, CHUNK // shape[-1])
    stored = source.files.type_of(own).lower() if source.layout == "gguf" else None
    if read is None and stored == type and Type[type.upper()] not in PLAIN:
        yield from (rows.flatten() for rows in source.files.read_codes(own).split(n_rows))
        return
    if read is None and stored in blocks.TYPES and len(shape) == 2:
        for codes in source.files.read_codes(own).split(n_rows):
            yield _bytes(src, name, blocks.dequantize(stored, codes), type, importance)
        return
    weight = read(name) if read else source.read(name, source.files.dtypes[own])
    for rows in (weight if len(shape) == 2 else weight[None]).split(n_rows):
        yield _bytes(src, name, rows, type, importance)


def _bytes(src: Path, name: str, rows: Tensor, type: str, importance: Tensor | None) -> Tensor:
    if not torch.isfinite(rows).all():
        raise CheckpointError(f"{src}: {name} has numbers that are not finite")
    plain = PLAIN.get(Type[type.upper()])
    if plain is None:
        return blocks.quantize(type, rows, importance).flatten()
    return rows.to(plain).contiguous().view(torch.uint8).flatten()
