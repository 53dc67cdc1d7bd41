"""Linear layers and caches that learn, are stored and run in a number format.

`prepare_qat_` makes layers learn as if rounded, `quantize_` replaces them by their stored form, and
both use the arithmetic of formats.py. Static formats need to know how large inputs get:
`calibration` records it, or the layers watch as they train.

This module does not read files (checkpoint.py names the tensors there).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from opennemo.model.formats import FORMATS, SCALED_KV, Format
from opennemo.model.transformer import Attend

# Layers that see the same input. Engines fuse them into one product, with one scale.
FUSED = (("wq", "wk", "wv"), ("w1", "w3"))
PART = 2**18  # weights that are rounded at a time


class QATLinear(nn.Linear):
    """A linear layer that computes as if already rounded, while learning in full precision.

    In a static format it watches its inputs while it trains (`largest`), until `observe` is set to
    false. Watching the same inputs twice changes nothing, so that a pass may be recomputed.
    """

    format: Format
    fused: Sequence[nn.Linear]  # those whose weights share a scale with this one, itself included
    largest: Tensor | None  # (1, 1) magnitude of the inputs so far, in a static format
    observe: bool = True
    rounds: bool = True

    def __init__(self, weight: nn.Parameter, format: Format, largest: Tensor | None):
        """Takes over the parameter; `link_fused_` sets `fused` when all layers exist."""
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight, self.format = weight, format
        self.register_buffer("largest", largest)

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
    """Keys and values as a KV cache in FP8 stores them, with one scale a layer for each.

    A model from `prepare_qat_(..., kv=True)` has one as `kv_rounding`. Mistral's checkpoints in FP8
    have a fake quantiser for queries, too; ours have none, since our engine does not round those.
    """

    largest: Tensor  # (L, 2) magnitudes of keys and of values so far
    observe: bool = True
    rounds: bool = True

    def __init__(self, n_layers: int, device: torch.device):
        super().__init__()
        rounding = FORMATS[SCALED_KV].kv
        assert rounding is not None
        self.rounding = rounding
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


class _Stored(nn.Module):
    """A matrix as it is stored: the tensors of its format, and no gradient."""

    def __init__(self, format: Format, shape: Sequence[int], tensors: Mapping[str, Tensor]):
        super().__init__()
        self.format = format
        self.out_features, self.in_features = shape
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that stand for the matrix, by the format's names."""
        return dict(self.named_buffers())


class QuantizedEmbedding(_Stored):
    """An embedding in a format whose rows stand for themselves."""

    def __init__(
        self,
        format: Format,
        shape: Sequence[int],
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype,
    ):
        super().__init__(format, shape, tensors)
        self.dtype = dtype

    def forward(self, tokens: Tensor) -> Tensor:
        rows = {name: tensor[tokens] for name, tensor in self.tensors.items()}
        return self.format.dequantize(rows, self.in_features, self.dtype)


class QuantizedLinear(_Stored):
    """A linear layer in a format."""

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The matrix (O, D) that the codes stand for."""
        return self.format.dequantize(self.tensors, self.in_features, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.format.linear(x, self.tensors)


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
    for path, linear in list(_linears(model)):
        largest = torch.full((1, 1), (largest_inputs or {}).get(path, 0.0))
        largest = largest.to(linear.weight.device) if format.static else None
        weight, row = linear.get_parameter("weight"), format.at_width(linear.in_features)
        replace_module(model, path, QATLinear(weight, row, largest))
    link_fused_(model)
    if kv:
        device = next(model.parameters()).device
        model.kv_rounding = KVRounding(len(list(model.get_submodule("layers").children())), device)


def link_fused_(model: nn.Module) -> None:
    """Link layers that learn in a format with those that share a scale with them."""
    linears = dict(_linears(model))
    for path, linear in linears.items():
        if isinstance(linear, QATLinear):
            linear.fused = tuple(linears[p] for p in _fused_paths(path))


def observers(model: nn.Module) -> dict[str, Tensor]:
    """Magnitudes behind static scales, by path: buffers that ranks may combine and decay."""
    return {name: b for name, b in model.named_buffers() if name.rpartition(".")[2] == "largest"}


def set_qat_(model: nn.Module, *, rounds: bool = True, observe: bool = True) -> None:
    """Set whether a prepared model rounds or only watches, and whether static scales change."""
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

    A model from `prepare_qat_` computes what it learned to, bit for bit. The embedding and the
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
            stored = _stored(format, path, linear.weight.detach(), scale, largest_inputs)
            replace_module(model, path, stored)
    if head is not None:
        quantize_head_(model, head)


def quantize_head_(model: nn.Module, format: Format) -> None:
    """Replace the output head by its stored form; a tied embedding keeps its precision."""
    weight = model.get_parameter("output.weight").detach()
    model.output = QuantizedLinear(format, weight.shape, quantize_rows(format, weight))


def quantize_rows(format: Format, weight: Tensor) -> dict[str, Tensor]:
    """A matrix (O, D) as the tensors of a format that rounds its rows one by one.

    In parts, which stay in the processor's cache and keep temporaries small.
    """
    assert format.weights.share != "tensor"
    parts = [format.quantize(rows) for rows in weight.split(max(1, PART // weight.shape[1]))]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


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
    return _stored(format, path, weight_of(path), scale, largest_inputs)


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


def _stored(
    format: Format,
    path: str,
    weight: Tensor,
    scale: Tensor | None,
    largest_inputs: Mapping[str, float] | None,
) -> QuantizedLinear:
    format = format.at_width(weight.shape[1])
    tensors = format.quantize(weight, scale)
    if format.static:
        assert format.inputs is not None
        largest = (largest_inputs or {}).get(path)
        if not largest:
            raise ValueError(
                f"{path}: a static format needs the scale of its inputs: calibrate first"
            )
        tensors["input_scale"] = format.inputs.scale(torch.tensor([[largest]]))
    return QuantizedLinear(format, weight.shape, tensors)


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Replace the module at this path."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
