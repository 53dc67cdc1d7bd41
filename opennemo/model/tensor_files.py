"""Read and write safetensors, one tensor at a time.

The files of a folder act as one: `shapes` and `dtypes` list the tensors, `read` maps one. The
library checks a header against its file (sizes, gaps, overlaps) before anything else. It can only
write tensors that are all in memory, so writing is done here: a length, a JSON header, the bytes.

Specification: https://github.com/huggingface/safetensors#format
"""

import ctypes
import json
import math
import mmap
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from opennemo.errors import CheckpointError
from opennemo.model.field_values import short

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
QUANTIZED = {
    "F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64,
    "U8": torch.uint8,
}  # fmt: skip
DTYPES = PLAIN | QUANTIZED
# Other types in the state of a run.
STATE = {"BOOL": torch.bool, "F64": torch.float64}
CODES = {dtype: code for code, dtype in (DTYPES | STATE).items()}


class SafetensorFiles:
    """Some open `.safetensors` files: their tensors' shapes and types, and the tensors."""

    bytes_to_decode = 0  # of a weight, while it is read

    def __init__(self, paths: Mapping[Path, Collection[str] | None]):
        """Open the files and check their headers.

        Args:
            paths: with the names of the tensors that are read from each, or None for all.

        Raises:
            CheckpointError: a file is damaged or truncated, holds an unknown type, or lacks a
                tensor that is to be read from it.
        """
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._files: dict[str, tuple[Any, str]] = {}  # the file, and the name in it
        for path, names in paths.items():
            try:
                file = safe_open(path, framework="pt")
                wanted = file.keys() if names is None else names
                if missing := sorted({*wanted} - {*file.keys()}):
                    raise CheckpointError(
                        f"{path}: the index names tensors that are not in this file: "
                        + ", ".join(map(short, missing[:5]))
                    )
                parts = {name: file.get_slice(name) for name in wanted}
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{path}: damaged, truncated, or not safetensors ({error}); fetch it again"
                ) from error
            for name, part in parts.items():
                if (code := part.get_dtype()) not in DTYPES:
                    supported = ", ".join(DTYPES)
                    raise CheckpointError(
                        f"{path}: {short(name)} is of type {code}; supported: {supported}"
                    )
                self._files[name] = file, name
                self.shapes[name], self.dtypes[name] = tuple(part.get_shape()), DTYPES[code]

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor; a view of the file, without a copy, where it is stored as `dtype`."""
        file, own = self._files[name]
        stored = file.get_tensor(own)
        return stored if dtype is None else converted(stored, dtype)

    def choose(self, names: Mapping[str, str]) -> None:
        """Forget all tensors but these, and give those other names."""
        self.shapes = {new: self.shapes[old] for old, new in names.items()}
        self.dtypes = {new: self.dtypes[old] for old, new in names.items()}
        self._files = {new: self._files[old] for old, new in names.items()}

    def stored_types(self) -> Iterator[tuple[str, int]]:
        """The type of each tensor, and its bytes."""
        for name, dtype in self.dtypes.items():
            n_bytes = math.prod(self.shapes[name]) * dtype.itemsize
            yield str(dtype).removeprefix("torch."), n_bytes


def forget_pages(tensor: Tensor) -> None:
    """Free the memory pages that lie wholly inside a tensor.

    Its numbers are lost, unless it is a view of a file, from which they are read again. A file
    stays mapped as long as one of its tensors lives, and its pages in memory count as ours: loading
    would seem to take, and in a container would take, twice the model.
    """
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    length = (tensor.data_ptr() + tensor.nbytes) // page * page - start
    if length > 0 and hasattr(mmap, "MADV_DONTNEED") and tensor.is_contiguous():
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED
        )


def converted(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """A view of a file as numbers of a type; the pages of the file that were read are freed."""
    tensor = stored.to(dtype)
    if tensor is not stored:
        forget_pages(stored)
    return tensor


def write_safetensors(
    path: Path,
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors of these types and shapes, asking `read` for each when its turn comes."""
    # transformers looks for the format.
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that tensors are aligned, and can be mapped
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, shape) in tensors.items():
            tensor = read(name)
            assert tensor.shape == shape and tensor.dtype == dtype, name
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
