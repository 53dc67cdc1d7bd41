"""Number formats: linear layers that learn, are exported and run with one and the same arithmetic.

A `Format` says how weights and how inputs are rounded, and multiplies what was rounded. Training
(`prepare_qat_`), export (`quantize_`) and serving (`QuantizedLinear`) derive from those same
functions, so a model that learned in a format loses nothing when it is stored in it: a test
holds the two outputs equal bit for bit. A new format is a new row in `FORMATS`.

This file knows nothing of files (checkpoint.py names the tensors there) nor of fast kernels
(opennemo.kernels is held against the arithmetic written here).

Sources: OCP 8-bit floating point (E4M3), FP8 formats for deep learning (arXiv:2209.05433),
straight-through gradients (arXiv:1308.3432), the per-token scales of LLM.int8 (arXiv:2208.07339).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opennemo.model.transformer import Attend

Share = int | Literal["row", "tensor"]
# Layers that see the same input. Engines fuse them into one product, with one scale.
FUSED = (("wq", "wk", "wv"), ("w1", "w3"))


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How a tensor (..., D) is rounded: to which numbers, and which of them share a scale."""

    dtype: torch.dtype
    limit: float = 0.0  # the largest code; 0 for a plain cast, which needs no scale
    share: Share = "row"  # one scale a row, for the whole tensor, or for so many columns
    # A scale that is a power of two only moves the exponent. Products of codes and scales are then
    # exact in bf16 too, so training in bf16 and serving in FP8 are the same arithmetic.
    power_of_two: bool = False

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
    """How a linear layer is rounded and multiplied."""

    weights: Rounding
    inputs: Rounding | None = None  # None: inputs stay as they are
    static: bool = False  # inputs have one scale for all tokens, known beforehand

    def matmul(
        self, x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """Codes x (T, D) and w (O, D) with their scales -> (T, O), multiplied in `dtype`."""
        assert self.inputs is not None
        rows = self.inputs.dequantize(x, x_scale, dtype)
        return F.linear(rows, self.weights.dequantize(w, w_scale, dtype)[..., : rows.shape[-1]])

    def linear(self, x: Tensor, w: Tensor, w_scale: Tensor, x_scale: Tensor | None) -> Tensor:
        """x (T, D), which is rounded first, and codes w (O, D) -> (T, O)."""
        if self.inputs is None:
            weight = self.weights.dequantize(w, w_scale, x.dtype)
            return F.linear(x, weight[..., : x.shape[-1]])
        return self.matmul(*self.inputs.quantize(x, x_scale), w, w_scale, x.dtype)

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


def _float8(share: Share) -> Rounding:
    limit = torch.finfo(torch.float8_e4m3fn).max
    return Rounding(dtype=torch.float8_e4m3fn, limit=limit, share=share, power_of_two=True)


def _int8(share: Share) -> Rounding:
    return Rounding(dtype=torch.int8, limit=127, share=share)


FORMATS: dict[str, Format] = {
    "fp32": Format(weights=Rounding(dtype=torch.float32)),
    "bf16": Format(weights=Rounding(dtype=torch.bfloat16)),
    "fp8": Format(weights=_float8("row"), inputs=_float8("row")),
    # What every FP8 engine can run: one scale a tensor, the inputs' from calibration.
    "fp8-static": Format(weights=_float8("tensor"), inputs=_float8("tensor"), static=True),
    "int8": Format(weights=_int8("row"), inputs=_int8(32)),
    "int4": Format(weights=Int4(dtype=torch.uint8, limit=8, share=32)),
}


class QATLinear(nn.Linear):
    """A linear layer that computes as if already rounded, while learning in full precision.

    In a static format it watches its inputs while it trains (`largest`), and stops when `observe`
    is taken back. Watching the same inputs twice changes nothing, so that a pass may be recomputed.
    """

    format: Format
    fused: Sequence[nn.Linear]  # those whose weights share a scale with this one, itself included
    largest: Tensor | None  # (1, 1) magnitude of the inputs so far, in a static format
    observe: bool = True
    rounds: bool = True

    @property
    def input_scale(self) -> Tensor | None:
        """(1, 1) in a static format."""
        if self.largest is None:
            return None
        assert self.format.inputs is not None
        return self.format.inputs.scale(self.largest)

    def forward(self, input: Tensor) -> Tensor:
        if self.largest is not None and self.training and self.observe:
            assert self.format.inputs is not None
            with torch.no_grad():
                largest = self.format.inputs.largest(input.detach())
                self.largest.copy_(torch.maximum(self.largest, largest))
        if not self.rounds:
            return super().forward(input)
        return self.format.fake_linear(
            input,
            self.weight,
            _shared_scale(self.format, (linear.weight.detach() for linear in self.fused)),
            self.input_scale,
        )


class KVRounding(nn.Module):
    """Keys and values as a KV cache in FP8 holds them, with a scale a layer for each.

    A model from `prepare_qat_(..., kv=True)` has one as `kv_rounding`. Mistral's checkpoints in FP8
    have a fake quantiser for queries, too; ours have none, for no engine of ours rounds those.
    """

    largest: Tensor  # (L, 2) magnitudes of keys and of values so far
    observe: bool = True
    rounds: bool = True
    rounding = _float8("tensor")

    def __init__(self, n_layers: int, device: torch.device):
        super().__init__()
        self.register_buffer("largest", torch.zeros(n_layers, 2, device=device))

    @property
    def scale(self) -> Tensor:
        """(L, 2)."""
        scales = [self.rounding.scale(one).view(()) for one in self.largest.flatten()]
        return torch.stack(scales).view_as(self.largest)

    def forward(self, layer: int, *kv: Tensor) -> list[Tensor]:
        """Keys and values (T, K, H) of a layer, rounded."""
        rounded = []
        for part, x in enumerate(kv):
            largest = self.largest[layer, part]
            if self.training and self.observe:
                with torch.no_grad():
                    largest.copy_(torch.maximum(largest, x.detach().float().abs().amax()))
            scale = self.rounding.scale(largest)
            rounded.append(self.rounding.fake_quantize(x, scale) if self.rounds else x)
        return rounded


class RoundedKV:
    """Attends as `attend` does, to rounded keys and values."""

    def __init__(self, attend: Attend, rounding: KVRounding):
        self.attend, self.rounding, self.positions = attend, rounding, attend.positions

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = self.rounding(layer, k, v)
        return self.attend(layer, q, k, v)


def fake_kv(model: nn.Module, attend: Attend) -> Attend:
    """The way to attend while a model trains: through rounded keys and values if it has them."""
    rounding = getattr(model, "kv_rounding", None)
    return attend if rounding is None else RoundedKV(attend, rounding)


class QuantizedLinear(nn.Module):
    """A linear layer as it is stored: codes and scales, and no gradient."""

    weight: Tensor  # (O, D) codes
    scale: Tensor  # (O, groups of D), or (1, 1)
    input_scale: Tensor | None  # (1, 1), if the format is static

    def __init__(
        self, format: Format, weight: Tensor, scale: Tensor, input_scale: Tensor | None = None
    ):
        super().__init__()
        if format.static and input_scale is None:
            raise ValueError("a static format needs the scale of the inputs: calibrate first")
        self.format = format
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("input_scale", input_scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.format.linear(x, self.weight, self.scale, self.input_scale)


@contextmanager
def calibration(model: nn.Module) -> Iterator[dict[str, float]]:
    """While it is open, record the largest magnitude of each block's linear inputs, by path."""
    largest: dict[str, float] = {}
    handles = []
    for path, linear in _linears(model):

        def record(_: nn.Module, inputs: tuple[Tensor], path: str = path) -> None:
            largest[path] = max(largest.get(path, 0.0), float(inputs[0].detach().abs().max()))

        handles.append(linear.register_forward_pre_hook(record))
    try:
        yield largest
    finally:
        for handle in handles:
            handle.remove()


def prepare_qat_(
    model: nn.Module,
    format: Format,
    largest_inputs: Mapping[str, float] | None = None,
    *,
    kv: bool = False,
) -> None:
    """Make every linear layer of the blocks learn as if rounded; its parameters stay the same.

    In a static format layers watch their inputs as they train, from `largest_inputs` on if there
    are any (`calibration` records them). With `kv`, keys and values are rounded, too (`fake_kv`).
    """
    replaced: dict[str, QATLinear] = {}
    for path, linear in _linears(model):
        qat = QATLinear(linear.in_features, linear.out_features, bias=False, device="meta")
        qat.weight, qat.format = linear.weight, format
        largest = torch.full((1, 1), (largest_inputs or {}).get(path, 0.0))
        qat.register_buffer("largest", largest.to(linear.weight.device) if format.static else None)
        replaced[path] = qat
    for path, qat in replaced.items():
        qat.fused = tuple(replaced[p] for p in _fused_paths(path))
        replace_module(model, path, qat)
    if kv:
        device = next(model.parameters()).device
        model.kv_rounding = KVRounding(len(list(model.get_submodule("layers").children())), device)


def observers(model: nn.Module) -> dict[str, Tensor]:
    """What static scales follow, by path: buffers that ranks may bring together, and forget by."""
    return {name: b for name, b in model.named_buffers() if name.rpartition(".")[2] == "largest"}


def set_qat_(model: nn.Module, *, rounds: bool = True, observe: bool = True) -> None:
    """Whether a prepared model rounds (or only watches), and whether static scales still follow."""
    for module in model.modules():
        if isinstance(module, QATLinear | KVRounding):
            module.rounds, module.observe = rounds, observe


def quantize_(
    model: nn.Module,
    format: Format,
    largest_inputs: Mapping[str, float] | None = None,
    head: Format | None = None,
) -> None:
    """Replace every linear layer of the blocks by its stored form, one after the other.

    A model from `prepare_qat_` gives what it learned to give, bit for bit. The embedding and the
    norms keep their precision, and so does the output head unless `head` names a format for it.

    Raises:
        ValueError: the format is static, and a layer was neither calibrated nor trained.
    """
    linears = dict(_linears(model))
    for group in {_fused_paths(path): None for path in linears}:
        scale = _shared_scale(format, (linears[path].weight.detach() for path in group))
        for path in group:
            linear = linears.pop(path)
            if isinstance(linear, QATLinear) and linear.largest is not None:
                largest_inputs = {**(largest_inputs or {}), path: float(linear.largest)}
            input_scale = _input_scale(format, path, largest_inputs)
            codes, used = format.weights.quantize(linear.weight.detach(), scale)
            replace_module(model, path, QuantizedLinear(format, codes, used, input_scale))
    if head is not None:
        quantize_head_(model, head)


def quantize_head_(model: nn.Module, format: Format) -> None:
    """Replace the output head by its stored form; a tied embedding keeps its precision."""
    weight = model.get_parameter("output.weight").detach()
    # In parts, which stay in the processor's cache and keep temporaries small; rows are rounded
    # one by one in every format that a head can have.
    assert format.weights.share != "tensor"
    parts = [format.weights.quantize(rows) for rows in weight.split(1024)]
    codes, scale = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    model.output = QuantizedLinear(format, codes, scale)


def quantize_linear(
    format: Format,
    path: str,
    weight_of: Callable[[str], Tensor],
    largest_inputs: Mapping[str, float] | None = None,
) -> QuantizedLinear:
    """One layer of a model that is not in memory; `weight_of` reads a weight by module path.

    Raises:
        ValueError: the format is static, and the layer was not calibrated.
    """
    scale = _shared_scale(format, map(weight_of, _fused_paths(path)))
    codes, used = format.weights.quantize(weight_of(path), scale)
    return QuantizedLinear(format, codes, used, _input_scale(format, path, largest_inputs))


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for path, module in model.get_submodule("layers").named_modules(prefix="layers"):
        if isinstance(module, nn.Linear):
            yield path, module


def _fused_paths(path: str) -> tuple[str, ...]:
    parent, _, name = path.rpartition(".")
    return tuple(
        f"{parent}.{sibling}" for sibling in next((g for g in FUSED if name in g), (name,))
    )


def _shared_scale(format: Format, fused: Iterable[Tensor]) -> Tensor | None:
    """One scale for the weights of layers that engines fuse, if the format has one a tensor."""
    if format.weights.share != "tensor":
        return None
    return torch.stack([format.weights.scale(weight) for weight in fused]).amax(0)


def _input_scale(
    format: Format, path: str, largest_inputs: Mapping[str, float] | None
) -> Tensor | None:
    if not format.static:
        return None
    assert format.inputs is not None
    largest = (largest_inputs or {}).get(path)
    if not largest:
        raise ValueError(f"{path}: a static format needs the scale of its inputs: calibrate first")
    return format.inputs.scale(torch.tensor([[largest]]))


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module in the place of the one at this path."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
