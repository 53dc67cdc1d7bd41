"""The decoder's step on a CPU as one native call.

The kernel is called through ctypes: no headers of Python or PyTorch, and other threads run
meanwhile. `build.py` finds it or compiles it. What a step must compute is defined by the model
itself in PyTorch; model/cpu_step.py packs its weights and calls the step.
"""

import ctypes
import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from opennemo.kernels.build import CompilerMissing, available_instructions, build


class CpuFormat(enum.IntEnum):
    """How numbers are stored, numbered as in cpu.cpp; from Q4_0 on, GGUF's blocks."""

    FP32 = 0
    BF16 = 1
    FP8 = 2
    INT8 = 3
    INT4 = 4
    Q4_0 = 5
    Q4_1 = 6
    Q5_0 = 7
    Q5_1 = 8
    Q8_0 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    IQ4_NL = 15
    IQ4_XS = 16

    @property
    def in_blocks(self) -> bool:
        """Whether a row of weights is GGUF's blocks, which have their scales among the codes."""
        return self >= CpuFormat.Q4_0


CACHES = {
    CpuFormat.FP32: torch.float32, CpuFormat.BF16: torch.bfloat16,
    CpuFormat.FP8: torch.float8_e4m3fn, CpuFormat.INT8: torch.int8,
}  # fmt: skip


class Shape(ctypes.Structure):
    """The model's shape, the number of threads, and the scales of queries and rotations."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in (
            "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size",
            "n_threads", "far_original",
        )),
        ("norm_eps", ctypes.c_float),
        ("far_beta", ctypes.c_float),
        ("gain", ctypes.c_double),
    ]  # fmt: skip


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in (
            "n_tokens", "n_sequences", "n_rows", "table_width", "page_size", "kv_format",
        )),
        ("n_pages", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in (
            "tokens", "positions", "slots", "cu_seqlens", "page_table", "rows", "windows",
            "kv_cache", "kv_scale", "logits",
        )),
    ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A weight matrix (O, D) as it is stored."""

    format: CpuFormat
    columns: int  # D
    codes: Tensor  # (O, D); int4 (O, D / 2); blocks (O, bytes of a row)
    scale: Tensor  # (O, 1) or (1, 1); int4 (O, groups); unused by fp32, bf16 and blocks
    input_scale: float = 0.0  # of fp8 inputs; 0 for one a token, taken from the token
    power_of_two: bool = False  # whether that one is
    whole_rows: bool = False  # of int8 inputs: one scale a token, not one for 32


def multiply(
    x: Tensor, weights: Weights, n_threads: int = 1, instructions: str | None = None
) -> Tensor:
    """Inputs x (T, D), rounded to int8 in groups of 32, times blocks (O, D) -> (T, O), in float32.

    Raises:
        CompilerMissing: the kernel cannot be built here.
    """
    assert weights.format.in_blocks and x.shape[-1] == weights.columns
    x, codes = x.float().contiguous(), weights.codes.contiguous()
    y = torch.empty(len(x), len(codes))
    load_library(instructions or available_instructions()[0]).blocks_multiply(
        weights.format, len(codes), weights.columns, codes.data_ptr(), codes.stride(0),
        x.data_ptr(), len(x), y.data_ptr(), n_threads,
    )  # fmt: skip
    return y


def dequantize(
    format: CpuFormat, rows: Tensor, columns: int, instructions: str | None = None
) -> Tensor:
    """Rows of blocks (O, bytes) -> weights (O, D) in float32, on as many threads as PyTorch has.

    Raises:
        CompilerMissing: the kernel cannot be built here.
    """
    rows = rows.contiguous()
    weights = torch.empty(len(rows), columns)
    load_library(instructions or available_instructions()[0]).blocks_rows(
        format, len(rows), columns, rows.data_ptr(), rows.stride(0), weights.data_ptr(),
        min(torch.get_num_threads(), len(rows)),
    )  # fmt: skip
    return weights


class Search(ctypes.Structure):
    """The numbers that a type of block has, and where the search for its scales begins."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in (
            "n", "n_groups", "has_min", "free_min", "n_values", "n_starts", "n_alternations",
        )),
        *((name, ctypes.c_float) for name in ("low", "high", "least", "most")),
        ("values", ctypes.c_float * 16), ("starts", ctypes.c_float * 16),
    ]  # fmt: skip


def fit(
    weights: Tensor, importance: Tensor, search: Search, instructions: str | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Blocks (B, n) -> codes (B, n) uint8, units and those of minima (B,), and by group (B, G).

    Raises:
        CompilerMissing: the kernel cannot be built here.
    """
    weights, importance = weights.float().contiguous(), importance.float().contiguous()
    n_blocks, n_groups = len(weights), weights.numel() // search.n
    units, of_groups = (torch.zeros(2, n) for n in (n_blocks, n_groups))
    codes = torch.empty(weights.shape, dtype=torch.uint8)
    tensors = (codes, *units, *of_groups)
    to = (ctypes.c_void_p * 5)(*(tensor.data_ptr() for tensor in tensors))
    load_library(instructions or available_instructions()[0]).blocks_fit(
        ctypes.byref(search), n_groups, weights.data_ptr(), importance.data_ptr(), to
    )
    scales, minima = (part.view(n_blocks, -1) for part in of_groups)
    return codes, units[0], units[1], scales, minima


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """A block's matrices; those that see the same input are packed as one."""

    attention_norm: Tensor
    qkv: Sequence[Weights]  # wq, wk, wv
    out: Weights
    ffn_norm: Tensor
    up: Sequence[Weights]  # w1, w3
    down: Weights


def load_library(instructions: str) -> ctypes.CDLL:
    """The kernel for these instructions, compiled if needed; after an error it is not retried."""
    library = _load(instructions)
    if isinstance(library, CompilerMissing):
        raise library
    return library


@cache
def _load(instructions: str) -> ctypes.CDLL | CompilerMissing:
    try:
        library = ctypes.CDLL(str(build(instructions)))
    except CompilerMissing as error:
        return error
    except OSError as error:  # damaged, or on a file system without execution
        reason = f"{error}; remove it, or name another folder in XDG_CACHE_HOME"
        return CompilerMissing(f"the CPU kernels cannot be loaded: {reason}")
    pointer, number = ctypes.c_void_p, ctypes.c_int
    library.model_new.restype = pointer
    library.model_new.argtypes = [pointer, pointer, pointer, number, ctypes.c_int64]
    library.model_norm.argtypes = [pointer, number, pointer]
    library.model_free.argtypes = [pointer]
    library.matrix_shape.argtypes = [pointer, *[number] * 4, ctypes.c_float, *[number] * 2]
    library.matrix_pack.argtypes = [pointer, number, pointer, ctypes.c_int64, pointer, number]
    library.blocks_multiply.argtypes = [
        *[number] * 3, pointer, ctypes.c_int64, pointer, number, pointer, number,
    ]  # fmt: skip
    library.blocks_rows.argtypes = [
        *[number] * 3, pointer, ctypes.c_int64, pointer, number,
    ]  # fmt: skip
    library.blocks_panel.restype = ctypes.c_int64
    library.blocks_fit.argtypes = [pointer, ctypes.c_int64, pointer, pointer, pointer]
    library.model_multiply.argtypes = [pointer, number, pointer, number, pointer]
    library.model_step.argtypes = [pointer, pointer]
    return library


class CpuModel:
    """A decoder whose weights lie packed for the kernel; `step` is one pass through all of it."""

    _model: int | None = None  # until it is made: the kernel may be missing

    def __init__(
        self, shape: Shape, frequencies: Tensor, embedding: Weights, norm: Tensor,
        layers: Iterable[LayerWeights], head: Weights, instructions: str | None = None,
    ):  # fmt: skip
        """Pack the weights; the embedding is kept and read in place.

        `frequencies` (H/2,) float64 are the angles of one position. A layer is read only when its
        turn comes, so `layers` may be a generator.

        Raises:
            CompilerMissing: the kernel cannot be built here.
        """
        assert embedding.format in (CpuFormat.FP32, CpuFormat.BF16) or embedding.format.in_blocks
        self._library = load_library(instructions or available_instructions()[0])
        self._shape = shape
        self._table = table = embedding.codes.detach().contiguous()  # read in place
        self._model = self._library.model_new(
            ctypes.byref(shape), frequencies.double().contiguous().data_ptr(),
            table.data_ptr(), embedding.format, table.stride(0) * table.element_size(),
        )  # fmt: skip
        for i, layer in enumerate(layers):
            self._norm(2 * i, layer.attention_norm)
            self._norm(2 * i + 1, layer.ffn_norm)
            for j, same_input in enumerate((layer.qkv, [layer.out], layer.up, [layer.down])):
                self._pack(7 * i + (0, 3, 4, 6)[j], same_input)
        self._norm(2 * shape.n_layers, norm)
        self._pack(7 * shape.n_layers, [head])

    def __del__(self) -> None:
        if self._model is not None:
            self._library.model_free(self._model)

    def step(
        self, tokens: Tensor, positions: Tensor, slots: Tensor, cu_seqlens: Tensor,
        page_table: Tensor, rows: Tensor, kv_cache: Tensor, kv_format: CpuFormat,
        kv_scale: Tensor | None = None, windows: Sequence[int | None] = (),
    ) -> Tensor:  # fmt: skip
        """Compute new tokens (T,), write their keys and values -> logits (R, V) of `rows` (R,).

        Everything else as in attention.Paged: positions and slots (T,), cu_seqlens (S + 1,),
        page_table (S, pages); kv_cache and kv_scale are codes and scale of pages.Pages. `windows`
        are those of all layers, if any has one.

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
        of_layers = (ctypes.c_int32 * shape.n_layers)(*(window or 0 for window in windows))
        step = _Step(
            n_tokens=len(tokens), n_sequences=len(cu_seqlens) - 1, n_rows=len(rows),
            table_width=page_table.shape[1], page_size=page_size,
            kv_format=kv_format, n_pages=n_pages, windows=ctypes.addressof(of_layers),
            tokens=tokens.data_ptr(), positions=positions.data_ptr(), slots=places.data_ptr(),
            cu_seqlens=cu_seqlens.data_ptr(), page_table=page_table.data_ptr(),
            rows=rows.data_ptr(), kv_cache=kv_cache.data_ptr(),
            kv_scale=None if kv_scale is None else kv_scale.data_ptr(), logits=logits.data_ptr(),
        )  # fmt: skip
        if self._library.model_step(self._model, ctypes.byref(step)):
            raise ValueError("a token, position, slot, page or row is out of range")
        return logits

    def multiply(self, index: int, x: Tensor, n_rows: int) -> Tensor:
        """Inputs x (T, D) times the matrix (O, D) of this index, O being `n_rows` -> (T, O)."""
        x = x.float().clone(memory_format=torch.contiguous_format)  # it may be rounded in place
        y = torch.empty(len(x), n_rows)
        self._library.model_multiply(self._model, index, x.data_ptr(), len(x), y.data_ptr())
        return y

    def _norm(self, index: int, gains: Tensor) -> None:
        gains = gains.detach().float().contiguous()
        self._library.model_norm(self._model, index, gains.data_ptr())

    def _pack(self, first: int, matrices: Sequence[Weights]) -> None:
        """Lay out matrices that take the same input, the first of this index."""
        # The inputs of fp8 are rounded in place: nothing else can take them.
        if len({w.input_scale if w.format == CpuFormat.FP8 else None for w in matrices}) > 1:
            raise ValueError("layers that share an input must share its format and scale")
        for index, weights in enumerate(matrices, first):
            n_rows = len(weights.codes)
            codes = weights.codes.detach().contiguous()
            scale = weights.scale.float().expand(n_rows, -1).contiguous()
            self._library.matrix_shape(
                self._model, index, weights.format, n_rows, weights.columns,
                weights.input_scale, weights.power_of_two, weights.whole_rows,
            )  # fmt: skip
            self._library.matrix_pack(
                self._model, index, codes.data_ptr(), codes.stride(0) * codes.element_size(),
                scale.data_ptr(), scale.shape[1],
            )  # fmt: skip
