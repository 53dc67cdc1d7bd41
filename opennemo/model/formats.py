"""Number formats: one table that says everything about each of them.

A row of `FORMATS` says how weights and inputs are rounded and multiplied, what the format may be
used for, what keys and values in a cache look like, and what others call it. Training
(`prepare_qat_`), export (`quantize_`) and serving (`QuantizedLinear`) derive from the same few
functions, so a model that learned in a format loses nothing when it is stored in it: a test checks
that both outputs are equal bit for bit. All other modules read the table; to add a format, add a
row.

`Rounding` is the arithmetic of one tensor. `Format` owns the storage of a matrix: it names the
tensors that stand for it, makes them, turns them back and multiplies with them. A format whose
codes lie in another way (blocks, minima) is a subclass that overrides those four methods.

This module does not read files (compressed.py names the tensors there), and its arithmetic is the
definition that the kernels are tested against.

Sources: OCP 8-bit floating point (E4M3), FP8 formats for deep learning (arXiv:2209.05433),
straight-through gradients (arXiv:1308.3432), the per-token scales of LLM.int8 (arXiv:2208.07339).
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from opennemo.kernels.cpu import CompilerMissing, CpuFormat, dequantize
from opennemo.model import blocks

Share = int | Literal["row", "tensor"]
# Weights are rounded as a model is loaded; a model learns under the rounding; folders are written
# in it; a KV cache may be asked for in it.
Use = Literal["load", "train", "store", "cache"]
Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # a tensor's name -> its type and shape


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How a tensor (..., D) is rounded: to which numbers, and which of them share a scale."""

    dtype: torch.dtype
    limit: float = 0.0  # the largest code; 0 for a plain cast, which needs no scale
    share: Share = "row"  # one scale a row, for the whole tensor, or for this many columns
    # A scale that is a power of two only moves the exponent. Products of codes and scales are then
    # exact in bf16 too, so training in bf16 and serving in FP8 are the same arithmetic.
    power_of_two: bool = False

    @property
    def bits(self) -> int:
        """Bytes of a code."""
        return 8 * self.dtype.itemsize

    def scales_in_row(self, columns: int) -> int:
        """How many scales a row of this many numbers has for itself."""
        if not self.limit or self.share == "tensor":
            return 0
        return 1 if self.share == "row" else -(-columns // self.share)

    def row_bytes(self, columns: int) -> float:
        """Bytes of a row of this many numbers, with its scales in float32."""
        return columns * self.bits / 8 + 4 * self.scales_in_row(columns)

    def largest(self, x: Tensor) -> Tensor:
        """The largest magnitude among the numbers of x (..., D) that share a scale."""
        if self.share == "tensor":
            return x.float().abs().amax().reshape(1, 1)
        return self.grouped(x.float()).abs().amax(-1)

    def scale(self, x: Tensor) -> Tensor:
        """The finest scale with which no number of x (..., D) exceeds the limit: float32."""
        scale = self.largest(x).clamp(min=1e-12) / self.limit
        if self.power_of_two:
            mantissa, exponent = torch.frexp(scale)
            scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
        return scale

    def quantize(self, x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (..., D) -> codes (..., D) and scales, (..., groups of D), with x ~ codes * scales."""
        if not self.limit:
            return x.to(self.dtype), torch.ones((1, 1), device=x.device)
        scale = self.scale(x) if scale is None else scale
        ratio = (self.grouped(x.float()) / scale[..., None]).clamp(-self.limit, self.limit)
        codes = ratio.flatten(-2)[..., : x.shape[-1]]
        return (codes if self.dtype.is_floating_point else codes.round()).to(self.dtype), scale

    def dequantize(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Undo `quantize`, up to its rounding."""
        if not self.limit:
            return codes.to(dtype)
        values = self.grouped(codes.float()) * scale[..., None]
        return values.flatten(-2)[..., : codes.shape[-1]].to(dtype)

    def grouped(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., groups, columns that share a scale), the last filled with zeros."""
        if not isinstance(self.share, int):
            return x[..., None, :]
        return F.pad(x, (0, -x.shape[-1] % self.share)).unflatten(-1, (-1, self.share))

    def fake_quantize(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Round x as `quantize` would; the gradient passes as if it had not."""
        return _StraightThrough.apply(x, self, scale)  # pyright: ignore[reportReturnType]


@dataclass(frozen=True, kw_only=True)
class Int4(Rounding):
    """Sixteen levels, two codes a byte: the extreme of a group is always a code, -8."""

    @property
    def bits(self) -> int:
        return 4

    def scale(self, x: Tensor) -> Tensor:
        """Signed, so that the extreme falls on the side that has one level more."""
        groups = self.grouped(x.float())
        extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
        return torch.where(extreme == 0, 1e-12, extreme) / -8

    def quantize(self, x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (..., D) -> codes (..., ceil(D / 2)), the even column in the low half, and scales."""
        scale = self.scale(x) if scale is None else scale
        ratio = (self.grouped(x.float()) / scale[..., None]).flatten(-2)[..., : x.shape[-1]]
        codes = (ratio.round().clamp(-8, 7) + 8).to(torch.uint8)
        low, high = F.pad(codes, (0, x.shape[-1] % 2), value=8).unflatten(-1, (-1, 2)).unbind(-1)
        return low | high << 4, scale

    def dequantize(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Undo `quantize`, up to its rounding; an odd D comes back with one zero more."""
        pairs = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
        return super().dequantize(pairs.float() - 8, scale, dtype)


@dataclass(frozen=True, kw_only=True)
class BlockRounding(Rounding):
    """To a type of GGUF's blocks, which hold scales and minima with the codes."""

    type: str
    limit: float = 1.0  # says only that it is in codes

    @property
    def width(self) -> int:
        """Bytes of a row, which is whole blocks."""
        return blocks.TYPES[self.type].n_weights

    def row_bytes(self, columns: int) -> float:
        return blocks.TYPES[self.type].row_bytes(columns)

    def quantize(self, x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (O, D) -> rows of bytes (O, B); blocks find their scales themselves."""
        if scale is not None:
            raise ValueError(f"{self.type} has no scale to be given")
        return blocks.quantize(self.type, x), torch.ones((1, 1), device=x.device)

    def dequantize(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        return blocks.dequantize(self.type, codes).to(dtype)


class _StraightThrough(torch.autograd.Function):
    """Round and scale back inside one node.

    Between two nodes the codes would carry the gradient in their own dtype, and in E4M3 without a
    scale nearly all of it is zero (measured with torchao 0.18: 98 to 100 % at gradients of 0.01).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounding: Rounding, scale: Tensor | None) -> Tensor:
        codes, used = rounding.quantize(x, scale)
        # Only a given scale can be too small for x; numbers that were clipped do not learn.
        ctx.clipped = None if scale is None else x.abs() > scale * rounding.limit
        return rounding.dequantize(codes, used, x.dtype)[..., : x.shape[-1]]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        return (grad if ctx.clipped is None else grad.masked_fill(ctx.clipped, 0)), None, None


@dataclass(frozen=True, kw_only=True)
class Format:
    """A row of the table: how linear layers are rounded, stored and multiplied, and where."""

    name: str
    weights: Rounding
    inputs: Rounding | None = None  # None: inputs stay as they are
    static: bool = False  # inputs have one scale for all tokens, from calibration
    kv: Rounding | None = None  # keys and values in a cache; shared by "tensor": a scale a layer
    uses: tuple[Use, ...] = ()
    kernel: CpuFormat | None = None  # None: a CPU computes it in PyTorch, as it is defined here
    tensor_cores: bool = False  # whether its product is that of a GPU's FP8 units
    unpacked_on_gpu: bool = False  # whether a GPU's kernel multiplies with such weights
    fused_kv: bool = False  # whether the GPU's kernels write and read such keys and values
    mistral: Mapping[str, str] | None = None  # "quantization" in Mistral's params.json
    # How config.json may say it besides compressed-tensors' way, which follows from the roundings.
    others: tuple[Mapping[str, str], ...] = ()

    @property
    def in_codes(self) -> bool:
        """Whether weights are more than cast to a type."""
        return bool(self.weights.limit)

    def at_width(self, columns: int) -> "Format":
        """The format of a matrix of this many columns, since not all fit this one."""
        return self

    @property
    def dtype_name(self) -> str:
        """PyTorch's name of a plain type, else the format's own."""
        return self.name if self.in_codes else str(self.weights.dtype).removeprefix("torch.")

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of a stored matrix, without scales of the whole matrix."""
        return round(rows * self.weights.row_bytes(columns))

    def packed_bytes(self, rows: int, columns: int) -> int:
        """The same in the CPU kernel's layout."""
        n_bytes = self.nbytes(rows, columns)
        if not isinstance(self.weights, BlockRounding):
            return n_bytes
        kind = blocks.TYPES[self.weights.type]
        return n_bytes // kind.n_bytes * (kind.in_panels or kind.n_bytes)

    def quantize(self, weight: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        """A matrix (O, D) -> the tensors that stand for it; `scale` if it is not its own."""
        codes, used = self.weights.quantize(weight, scale)
        return {"weight": codes, "scale": used}

    def dequantize(self, tensors: Mapping[str, Tensor], columns: int, dtype: torch.dtype) -> Tensor:
        """Undo `quantize`, up to its rounding: (O, D), where D is `columns`."""
        weight = self.weights.dequantize(tensors["weight"], tensors["scale"], dtype)
        return weight[..., :columns]

    def linear(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """x (T, D), which is rounded first, times a stored matrix (O, D) -> (T, O)."""
        if self.inputs is not None:
            codes, scale = self.inputs.quantize(x, tensors.get("input_scale"))
            x = self.inputs.dequantize(codes, scale, x.dtype)
        return F.linear(x, self.dequantize(tensors, x.shape[-1], x.dtype))

    def fake_linear(
        self,
        x: Tensor,
        weight: Tensor,
        w_scale: Tensor | None = None,
        x_scale: Tensor | None = None,
    ) -> Tensor:
        """The same from weights not rounded yet, (O, D), and differentiable in both."""
        if self.inputs is not None:
            x = self.inputs.fake_quantize(x, x_scale)
        return F.linear(x, self.weights.fake_quantize(weight, w_scale))


@dataclass(frozen=True, kw_only=True)
class BlockFormat(Format):
    """A type of GGUF's blocks: one tensor stands for a matrix, rows of bytes."""

    def at_width(self, columns: int) -> "BlockFormat":
        return BLOCKS[blocks.at_width(self.name, columns)]

    def quantize(self, weight: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        return {"weight": self.weights.quantize(weight, scale)[0]}

    def dequantize(self, tensors: Mapping[str, Tensor], columns: int, dtype: torch.dtype) -> Tensor:
        rows = tensors["weight"]
        if rows.device.type == "cpu" and self.kernel is not None:
            try:  # a tenth of the time
                return dequantize(self.kernel, rows, columns).to(dtype)
            except CompilerMissing as error:
                warnings.warn(f"{error}; blocks are decoded in PyTorch instead", stacklevel=2)
        return blocks.dequantize(self.name, rows).to(dtype)


def _cast(dtype: torch.dtype) -> Rounding:
    return Rounding(dtype=dtype)


def _float8(share: Share, power_of_two: bool = True) -> Rounding:
    kind = torch.float8_e4m3fn
    limit = torch.finfo(kind).max
    return Rounding(dtype=kind, limit=limit, share=share, power_of_two=power_of_two)


def _int8(share: Share) -> Rounding:
    return Rounding(dtype=torch.int8, limit=127, share=share)


_ROWS = (
    Format(
        name="fp32", weights=_cast(torch.float32), kv=_cast(torch.float32),
        uses=("load", "cache"), kernel=CpuFormat.FP32, fused_kv=True,
    ),
    Format(
        name="bf16", weights=_cast(torch.bfloat16), kv=_cast(torch.bfloat16),
        uses=("load", "cache"), kernel=CpuFormat.BF16, fused_kv=True,
    ),
    # For a model in float16 on a GPU; it is not chosen by name.
    Format(name="fp16", weights=_cast(torch.float16), kv=_cast(torch.float16), fused_kv=True),
    Format(
        name="fp8", weights=_float8("row"), inputs=_float8("row"), kv=_float8("tensor"),
        uses=("load", "train", "store", "cache"), kernel=CpuFormat.FP8, tensor_cores=True,
        fused_kv=True,
    ),
    # Every FP8 engine can run it: one scale a tensor, the inputs' from calibration.
    Format(
        name="fp8-static", weights=_float8("tensor"), inputs=_float8("tensor"), static=True,
        uses=("train", "store"), kernel=CpuFormat.FP8, tensor_cores=True,
        mistral={"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"},
        # AutoFP8, which made the first FP8 folders of Mistral NeMo, and NVIDIA's ModelOpt.
        others=(
            {"quant_method": "fp8", "activation_scheme": "static"},
            {"quant_method": "modelopt", "quant_algo": "FP8"},
        ),
    ),
    Format(
        name="int8", weights=_int8("row"), inputs=_int8(32), kv=_int8("row"),
        uses=("load", "train", "store", "cache"), kernel=CpuFormat.INT8, fused_kv=True,
        unpacked_on_gpu=True,
    ),
    Format(
        name="int4", weights=Int4(dtype=torch.uint8, limit=8, share=32),
        uses=("load", "train", "store"), kernel=CpuFormat.INT4, unpacked_on_gpu=True,
    ),
    # FP8 as other engines compute it: scales of largest / 448, for inputs too.
    Format(
        name="fp8-dynamic", weights=_float8("row", False), inputs=_float8("row", False),
        uses=("train", "store"), kernel=CpuFormat.FP8, tensor_cores=True,
    ),
    # Other engines' int8: inputs with one scale a token, which lose more than groups.
    Format(
        name="w8a8", weights=_int8("row"), inputs=_int8("row"), uses=("train", "store"),
        kernel=CpuFormat.INT8,
    ),
)  # fmt: skip
FORMATS: dict[str, Format] = {format.name: format for format in _ROWS}
# The types of GGUF files: inputs become int8 in groups of 32.
BLOCKS: dict[str, BlockFormat] = {
    name: BlockFormat(
        name=name, weights=BlockRounding(dtype=torch.uint8, type=name), inputs=_int8(32),
        uses=("load", "train") if name == "q4_k" else ("train",), kernel=CpuFormat[name.upper()],
        # Types of two and three bits, and those that look their codes up, are not for a GPU yet.
        unpacked_on_gpu=name[:2] in ("q4", "q5", "q6", "q8"),
    )
    for name in blocks.TYPES
}  # fmt: skip
# A KV cache whose scales come with the model, or from calibration.
SCALED_KV = "fp8"


def names(use: Use) -> tuple[str, ...]:
    """The formats that may be used in this way, in the order of the table."""
    return tuple(name for name, format in {**FORMATS, **BLOCKS}.items() if use in format.uses)


def by_name(name: str) -> Format:
    """The format of this name, from FORMATS or BLOCKS. Raises: KeyError."""
    return FORMATS[name] if name in FORMATS else BLOCKS[name]


def plain(dtype: torch.dtype) -> Format | None:
    """The format of plain numbers of this type."""
    rows = (f for f in FORMATS.values() if not f.in_codes and f.weights.dtype == dtype)
    return next(rows, None)
