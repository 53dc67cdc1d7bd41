"""Read `.gguf`, the one-file format of llama.cpp: settings, and tensors dequantised on the way.

The header is read by the tokenizer's cursor, which cannot leave the file. (`GGUFReader` of the
`gguf` package takes 5 s for SmolLM2's, and does not end on a forged array length.) What the bytes
of a quantised block mean is left to that package.

Specification: docs/gguf.md of ggml, versions 2 and 3, little-endian.
"""

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from opennemo.errors import CheckpointError
from opennemo.model.layouts import short
from opennemo.tokenizer.gguf_head import Cursor, read_head

PLAIN = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}
BLOCKS = [Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0]
BLOCKS += [Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K]
# Weights dequantised at a time: 512 KiB of float32 stays in a core's cache, which is four times as
# fast as a whole matrix.
CHUNK = 2**17


class Entry(NamedTuple):
    """Where a tensor lies and how it is written."""

    shape: tuple[int, ...]
    type: Type
    start: int
    n_bytes: int


class GGUF:
    """An open `.gguf` file: its settings, its tensors' shapes and types, and the tensors."""

    def __init__(self, path: Path):
        """Map the file and check its header.

        Raises:
            CheckpointError: not GGUF, damaged, truncated, or quantised in a way not supported.
        """
        try:
            # A private mapping: tensors may be written to, the file is not.
            self._data = np.memmap(path, np.uint8, mode="c")
            self.settings, self._entries = _read_entries(self._data.data)
        except (OSError, ValueError, struct.error, RecursionError) as error:
            raise CheckpointError(f"{path}: damaged, or not GGUF: {error}") from error
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}
        # Numbers in blocks become float32.
        self.dtypes = {n: PLAIN.get(e.type, torch.float32) for n, e in self._entries.items()}
        # What the tensors say and the fields may not: the vocabulary, and Llama 3's RoPE.
        if "token_embd.weight" in self.shapes:
            self.settings.setdefault("llama.vocab_size", self.shapes["token_embd.weight"][0])
        if "rope_freqs.weight" in self.shapes:
            self.settings["llama.rope.scaling.type"] = "llama3"

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """One tensor; a view of the file, without a copy, where it is stored as `dtype`."""
        shape, type, start, n_bytes = self._entries[name]
        stored = self._data[start : start + n_bytes]
        if type in PLAIN:
            return torch.from_numpy(stored).view(PLAIN[type]).view(shape).to(dtype)
        block, block_bytes = gguf.GGML_QUANT_SIZES[type]
        step, floats = CHUNK // block * block_bytes, np.empty(math.prod(shape), np.float32)
        for i in range(-(-n_bytes // step)):
            codes = stored[i * step : (i + 1) * step].reshape(1, -1)
            floats[i * CHUNK : (i + 1) * CHUNK] = gguf.dequantize(codes, type)[0]
        return torch.from_numpy(floats).view(shape).to(dtype)


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
    name, n_dims = cursor.text(), cursor.number("I")
    if not 1 <= n_dims <= 4:
        raise ValueError(f"tensor {short(name)} has {n_dims:,} dimensions")
    shape = cursor.numbers("Q", n_dims)[::-1]  # the file has the innermost first
    type, start = Type(cursor.number("I")), cursor.number("Q")
    if type not in (*PLAIN, *BLOCKS):
        supported = ", ".join(kind.name for kind in (*PLAIN, *BLOCKS))
        raise ValueError(f"tensor {short(name)} is in {type.name}; supported: {supported}")
    block, block_bytes = gguf.GGML_QUANT_SIZES[type]
    if shape[-1] % block:
        raise ValueError(f"tensor {short(name)}: {shape[-1]:,} is not a multiple of {block}")
    return name, Entry(shape, type, start, math.prod(shape) // block * block_bytes)
