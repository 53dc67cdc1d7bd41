"""The decoder's step on a CPU as one native call, compiled on the machine that runs it.

`cpu.cpp` is built once by whatever C++ compiler there is, for the instructions that this processor
has, and kept in the user's cache folder under a name made of its text and those instructions. It
is called through ctypes: no headers of Python or PyTorch, and the interpreter runs on meanwhile.
What a step must compute is defined by the model itself in PyTorch; model/cpu_step.py packs its
weights and calls the step.
"""

import ctypes
import enum
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

# Instruction sets, best first: what the processor must offer, and its flags for the compiler.
INSTRUCTIONS = {
    "avx512": (
        {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx2", "fma"},
        ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mavx2", "-mfma",
         "-mtune=native"],
    ),
    "avx2": ({"avx2", "fma"}, ["-mavx2", "-mfma", "-mtune=native"]),
    "portable": (set(), []),
}  # fmt: skip
FLAGS = ["-std=c++20", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
         "-shared", "-fPIC", "-pthread"]  # fmt: skip
COLS = 32  # of a panel


class CpuFormat(enum.IntEnum):
    """How numbers are stored, numbered as in cpu.cpp."""

    FP32 = 0
    BF16 = 1
    FP8 = 2
    INT8 = 3
    INT4 = 4


EMBEDDINGS = {CpuFormat.FP32: torch.float32, CpuFormat.BF16: torch.bfloat16}
CACHES = EMBEDDINGS | {CpuFormat.FP8: torch.float8_e4m3fn, CpuFormat.INT8: torch.int8}


class CompilerMissing(Exception):
    """There is no C++ compiler, or it does not understand the source; says which."""


class Shape(ctypes.Structure):
    """The model's shape, and how many threads to use."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in (
            "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size",
            "n_threads",
        )),
        ("norm_eps", ctypes.c_float),
    ]  # fmt: skip


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in (
            "n_tokens", "n_sequences", "n_rows", "table_width", "page_size", "window", "kv_format",
        )),
        ("n_pages", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in (
            "tokens", "positions", "slots", "cu_seqlens", "page_table", "rows", "kv_cache",
            "kv_scale", "logits",
        )),
    ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A weight matrix (O, D) as it is stored."""

    format: CpuFormat
    columns: int  # D
    codes: Tensor  # (O, D); int4 (O, D / 2)
    scale: Tensor  # (O, 1) or (1, 1); int4 (O, groups); unused by fp32 and bf16
    input_scale: float = 0.0  # of fp8 inputs; 0 for one a token, taken from the token
    power_of_two: bool = False  # whether that one is


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """A block's matrices; those that see the same input are packed as one."""

    attention_norm: Tensor
    qkv: Sequence[Weights]  # wq, wk, wv
    out: Weights
    ffn_norm: Tensor
    up: Sequence[Weights]  # w1, w3
    down: Weights


def available_instructions() -> list[str]:
    """Names of `INSTRUCTIONS` that this processor can run, best first."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    flags = set(next((line for line in lines if line.startswith("flags")), "").split())
    return [name for name, (needed, _) in INSTRUCTIONS.items() if needed <= flags]


def build(instructions: str) -> Path:
    """Compile the kernel, unless that was done before, and return the shared library.

    Raises:
        CompilerMissing: no compiler was found ($CXX, c++, g++, clang++), or it failed.
    """
    source = Path(__file__).with_suffix(".cpp")
    options = FLAGS + INSTRUCTIONS[instructions][1]
    name = hashlib.sha256(source.read_bytes() + repr((sys.platform, options)).encode()).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "opennemo"
    library = folder / f"cpu-{instructions}-{name[:16]}.so"
    if library.exists():
        return library
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    compiler = next((path for n in names if n and (path := shutil.which(n))), None)
    if compiler is None:
        raise CompilerMissing("no C++ compiler found (tried $CXX, c++, g++ and clang++)")
    print(f"Compiling the CPU kernels ({instructions}), once ...", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = Path(scratch) / library.name
        command = [compiler, *options, str(source), "-o", str(built)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CompilerMissing(f"{compiler} failed:\n{done.stderr.strip()[-2000:]}")
        # Renamed when whole: another process sees all of it or nothing.
        built.replace(library)
    return library


@cache
def load_library(instructions: str) -> ctypes.CDLL:
    library = ctypes.CDLL(str(build(instructions)))
    pointer, number = ctypes.c_void_p, ctypes.c_int
    library.model_new.restype = pointer
    library.model_new.argtypes = [pointer, pointer, pointer, number]
    library.model_norm.argtypes = [pointer, number, pointer]
    library.model_free.argtypes = [pointer]
    library.matrix_shape.argtypes = [pointer, *[number] * 4, ctypes.c_float, number]
    library.matrix_pack.argtypes = [
        pointer, *[number] * 4, pointer, ctypes.c_int64, pointer, number,
    ]  # fmt: skip
    library.model_step.argtypes = [pointer, pointer]
    return library


class CpuModel:
    """A decoder whose weights lie packed for the kernel; `step` is one pass through all of it."""

    _model: int | None = None  # until it is made: the kernel may not be there

    def __init__(
        self, shape: Shape, frequencies: Tensor, embedding: Weights, norm: Tensor,
        layers: Iterable[LayerWeights], head: Weights, instructions: str | None = None,
    ):  # fmt: skip
        """Pack the weights. The embedding is kept and read in place, the rest is copied.

        `frequencies` (H/2,) float64 are the angles of one position. A layer is read only when its
        turn comes, so `layers` may make them as it is walked.

        Raises:
            CompilerMissing: the kernel cannot be built here.
        """
        assert EMBEDDINGS[embedding.format] == embedding.codes.dtype
        self._library = load_library(instructions or available_instructions()[0])
        self._shape, self._embedding = shape, embedding.codes.detach().contiguous()
        self._model = self._library.model_new(
            ctypes.byref(shape), frequencies.double().contiguous().data_ptr(),
            self._embedding.data_ptr(), embedding.format,
        )  # fmt: skip
        for i, layer in enumerate(layers):
            self._norm(2 * i, layer.attention_norm)
            self._norm(2 * i + 1, layer.ffn_norm)
            self._pack(4 * i, layer.qkv)
            self._pack(4 * i + 1, [layer.out])
            self._pack(4 * i + 2, layer.up, alternate=True)
            self._pack(4 * i + 3, [layer.down])
        self._norm(2 * shape.n_layers, norm)
        self._pack(4 * shape.n_layers, [head])

    def __del__(self) -> None:
        if self._model is not None:
            self._library.model_free(self._model)

    def step(
        self, tokens: Tensor, positions: Tensor, slots: Tensor, cu_seqlens: Tensor,
        page_table: Tensor, rows: Tensor, kv_cache: Tensor, kv_format: CpuFormat,
        kv_scale: Tensor | None = None, window: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Compute new tokens (T,), write their keys and values -> logits (R, V) of `rows` (R,).

        Everything else as in attention.Paged: positions and slots (T,), cu_seqlens (S + 1,),
        page_table (S, pages); kv_cache and kv_scale are codes and scale of pages.Pages.

        Raises:
            ValueError: a token, position, slot, page or row does not exist, or the cache is not
                one of this model's. Nothing was computed.
        """
        shape = self._shape
        n_layers, two, n_pages, page_size, n_kv_heads, head_dim = kv_cache.shape
        expected = (shape.n_layers, 2, shape.n_kv_heads, shape.head_dim)
        if (n_layers, two, n_kv_heads, head_dim) != expected or not kv_cache.is_contiguous():
            raise ValueError(f"a KV cache of shape {tuple(kv_cache.shape)} is not this model's")
        if kv_cache.dtype != CACHES.get(kv_format):
            raise ValueError(f"a KV cache in {kv_cache.dtype} as {kv_format!r}")
        scales = {
            CpuFormat.FP8: kv_cache.shape[:2], CpuFormat.INT8: kv_cache.shape[:-1],
        }.get(kv_format)  # fmt: skip
        if (None if kv_scale is None else kv_scale.shape) != scales:
            raise ValueError(f"a KV cache in {kv_cache.dtype} needs scales {scales}")
        assert kv_scale is None or (kv_scale.dtype == torch.float32 and kv_scale.is_contiguous())
        logits = torch.empty(len(rows), shape.vocab_size)
        # Named, so that converted copies live as long as the call.
        ints = [x.int().contiguous() for x in (tokens, positions, cu_seqlens, page_table, rows)]
        places = slots.long().contiguous()
        tokens, positions, cu_seqlens, page_table, rows = ints
        step = _Step(
            n_tokens=len(tokens), n_sequences=len(cu_seqlens) - 1, n_rows=len(rows),
            table_width=page_table.shape[1], page_size=page_size, window=window or 0,
            kv_format=kv_format, n_pages=n_pages,
            tokens=tokens.data_ptr(), positions=positions.data_ptr(), slots=places.data_ptr(),
            cu_seqlens=cu_seqlens.data_ptr(), page_table=page_table.data_ptr(),
            rows=rows.data_ptr(), kv_cache=kv_cache.data_ptr(),
            kv_scale=None if kv_scale is None else kv_scale.data_ptr(), logits=logits.data_ptr(),
        )  # fmt: skip
        if self._library.model_step(self._model, ctypes.byref(step)):
            raise ValueError("a token, position, slot, page or row is out of range")
        return logits

    def _norm(self, index: int, gains: Tensor) -> None:
        gains = gains.detach().float().contiguous()
        self._library.model_norm(self._model, index, gains.data_ptr())

    def _pack(self, index: int, parts: Sequence[Weights], alternate: bool = False) -> None:
        """Lay matrices with the same input into one: after each other, or a panel each in turn."""
        head = parts[0]
        if any((w.format, w.input_scale) != (head.format, head.input_scale) for w in parts):
            raise ValueError("layers that share an input must share its format and scale")
        rows = [len(w.codes) for w in parts]
        total = len(parts) * -(-rows[0] // COLS) * COLS if alternate else sum(rows)
        self._library.matrix_shape(
            self._model, index, head.format, total, head.columns, head.input_scale,
            head.power_of_two,
        )  # fmt: skip
        first = 0
        for weights, n_rows in zip(parts, rows, strict=True):
            codes = weights.codes.detach().contiguous()
            scale = weights.scale.float().expand(n_rows, -1).contiguous()
            self._library.matrix_pack(
                self._model, index, first, len(parts) if alternate else 1, n_rows,
                codes.data_ptr(), codes.stride(0) * codes.element_size(),
                scale.data_ptr(), scale.shape[1],
            )  # fmt: skip
            first += COLS if alternate else n_rows
