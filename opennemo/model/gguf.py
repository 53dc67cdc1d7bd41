"""Read `.gguf`, the one-file format of llama.cpp: settings, and tensors as codes or dequantised.

The header is read by the tokenizer's cursor, which cannot leave the file. (`GGUFReader` of the
`gguf` package takes 5 s for SmolLM2's, and does not end on a forged array length.) Types of blocks
that formats.py has can stay as they are; that package decodes the others.

A model may be split into files NAME-00001-of-00003.gguf and so on, the first of which has the
settings; all of them stand for the model.

Specification: docs/gguf.md of ggml, versions 2 and 3, little-endian.
"""

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from opennemo.errors import CheckpointError
from opennemo.model.formats import BLOCKS
from opennemo.model.layouts import short
from opennemo.model.tensor_files import converted, forget_pages
from opennemo.tokenizer.gguf_head import PART, Cursor, read_head

PLAIN = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}
FORMATS = {Type[name.upper()]: name for name in BLOCKS}
# Types that are dequantised, and may be rounded to q8_0, as there is no kernel for them.
RARE = [
    Type.IQ1_S, Type.IQ1_M, Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S, Type.IQ3_XXS, Type.IQ3_S,
    Type.TQ1_0, Type.TQ2_0,
]  # fmt: skip
# Weights dequantised at a time: 512 KiB of float32 stays in a core's cache, which is four times as
# fast as a whole matrix.
CHUNK = 2**17
MAX_PARTS = 1000


class Entry(NamedTuple):
    """Where a tensor lies and how it is written."""

    shape: tuple[int, ...]
    type: Type
    start: int
    n_bytes: int
    part: int = 0  # of a split model


class _Unsupported(Exception):
    """A valid file with something in it that we cannot run."""


class GGUF:
    """An open model: its settings, its tensors' shapes and types, and the tensors."""

    bytes_to_decode = 4  # of a weight, while it is read

    def __init__(self, path: Path):
        """Map the file or files and check their headers.

        Raises:
            CheckpointError: not GGUF, damaged, truncated, incomplete or of a type not supported.
        """
        # Private mappings: tensors may be written to, files are not.
        self._data: list[np.ndarray] = []
        self._entries: dict[str, Entry] = {}
        self.settings: dict[str, Any] = {}
        match = PART.fullmatch(path.name)
        n_parts = min(int(match[3]), MAX_PARTS) if match else 1
        for i in range(n_parts):
            part = path.with_name(f"{match[1]}-{i + 1:05}-of-{match[3]}.gguf") if match else path
            if match and not part.exists():
                raise CheckpointError(f"{part} is missing: {path.name} is one of {n_parts} files")
            settings, entries = self._open(part)
            if (settings.get("split.no", i), settings.get("split.count", n_parts)) != (i, n_parts):
                raise CheckpointError(f"{part}: says that it is part "
                    f"{short(settings.get('split.no'))} (from 0) of "
                    f"{short(settings.get('split.count'))}: files of a split model are named "
                    "NAME-00001-of-00003.gguf and lie in one folder")  # fmt: skip
            self.settings = self.settings or settings
            for name, entry in entries.items():
                if name in self._entries:
                    raise CheckpointError(f"{part}: tensor {short(name)} is in another file, too")
                self._entries[name] = entry._replace(part=i)
        self.settings.pop("split.count", None)
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}
        # Numbers in blocks become float32, unless they stay in codes.
        self.dtypes = {n: PLAIN.get(e.type, torch.float32) for n, e in self._entries.items()}
        # Facts from tensors that fields may lack: the size of the vocabulary, and Llama 3's RoPE.
        if "token_embd.weight" in self.shapes:
            self.settings.setdefault("llama.vocab_size", self.shapes["token_embd.weight"][0])
        if "rope_freqs.weight" in self.shapes:
            factors = self.read("rope_freqs.weight", torch.float32)
            self.settings["llama.rope.factors"] = factors.flatten()[: 2**12].tolist()

    def _open(self, path: Path) -> tuple[dict[str, Any], dict[str, Entry]]:
        try:
            self._data.append(np.memmap(path, np.uint8, mode="c"))
            return _read_entries(self._data[-1].data)
        except _Unsupported as error:
            raise CheckpointError(f"{path}: {error}") from error
        except (OSError, ValueError, struct.error, RecursionError) as error:
            raise CheckpointError(f"{path}: damaged, or not GGUF: {error}") from error

    def stored_types(self) -> Iterator[tuple[str, int]]:
        """The type of each tensor, by ggml's name, and its bytes."""
        for entry in self._entries.values():
            yield entry.type.name, entry.n_bytes

    def type_of(self, name: str) -> str:
        """The type of a tensor, by ggml's name."""
        return self._entries[name].type.name

    def format_of(self, name: str) -> str | None:
        """The name in BLOCKS of a tensor's type, if it can stay so."""
        shape, type, *_ = self._entries[name]
        return FORMATS.get(type) if len(shape) == 2 else None

    def is_rare(self, name: str) -> bool:
        """Whether a tensor is in blocks that no kernel here multiplies."""
        return self._entries[name].type in RARE

    def read_codes(self, name: str) -> Tensor:
        """A matrix (O, D) in blocks as rows of bytes (O, B): a view of the file."""
        return torch.from_numpy(self._stored(name)).view(self.shapes[name][0], -1)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """One tensor; a view of the file, without a copy, where it is stored as `dtype`."""
        shape, type, _, n_bytes, _ = self._entries[name]
        stored = self._stored(name)
        if type in PLAIN:
            return converted(torch.from_numpy(stored).view(PLAIN[type]).view(shape), dtype)
        block, block_bytes = gguf.GGML_QUANT_SIZES[type]
        step, floats = CHUNK // block * block_bytes, np.empty(math.prod(shape), np.float32)
        for i in range(-(-n_bytes // step)):
            codes = stored[i * step : (i + 1) * step].reshape(1, -1)
            floats[i * CHUNK : (i + 1) * CHUNK] = gguf.dequantize(codes, type)[0]
        forget_pages(torch.from_numpy(stored))
        return torch.from_numpy(floats).view(shape).to(dtype)

    def _stored(self, name: str) -> np.ndarray:
        _, _, start, n_bytes, part = self._entries[name]
        return self._data[part][start : start + n_bytes]


def _read_entries(data: memoryview) -> tuple[dict[str, Any], dict[str, Entry]]:
    """The settings, and where in the file each tensor lies."""
    cursor = Cursor(data)
    settings, n_tensors = read_head(cursor)
    entries = dict(_read_entry(cursor) for _ in range(n_tensors))
    alignment = settings.get("general.alignment", 32)
    if alignment not in [2**n for n in range(3, 17)]:
        raise ValueError(f"tensors are aligned to {short(alignment)}")
    first = -(-cursor.at // alignment) * alignment
    for name, entry in entries.items():
        start, end = first + entry.start, first + entry.start + entry.n_bytes
        if start % alignment or end > len(data):
            place = f"byte {start:,} to {end:,} of {len(data):,}: truncated?"
            raise ValueError(f"tensor {short(name)} would be at {place}")
        entries[name] = entry._replace(start=start)
    return settings, entries


def _read_entry(cursor: Cursor) -> tuple[str, Entry]:
    """A tensor's name, and its place counted from where the tensors begin."""
    name, n_dims = cursor.texts(1)[0], cursor.number("I")
    if not 1 <= n_dims <= 4:
        raise ValueError(f"tensor {short(name)} has {n_dims:,} dimensions")
    shape = cursor.numbers("Q", n_dims)[::-1]  # the file has the innermost first
    number, start = cursor.number("I"), cursor.number("Q")
    if number not in (*PLAIN, *FORMATS, *RARE):
        type = Type(number).name if number in [*Type] else f"type {number}"
        supported = ", ".join(kind.name for kind in (*PLAIN, *FORMATS, *RARE))
        raise _Unsupported(f"tensor {short(name)} is in {type}; supported: {supported}")
    type = Type(number)
    block, block_bytes = gguf.GGML_QUANT_SIZES[type]
    if shape[-1] % block:
        raise ValueError(f"tensor {short(name)}: {shape[-1]:,} is not a multiple of {block}")
    return name, Entry(shape, type, start, math.prod(shape) // block * block_bytes)
