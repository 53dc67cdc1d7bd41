"""How other tools' codes lie in their tensors: tensors by suffix -> weights (O, D) in float32.

foreign.py says which of these ways a folder uses, and names the sources.
"""

import json
from collections.abc import Mapping

import torch
from torch import Tensor

INPUTS = ("input_scale", "input_zero_point", "input_global_scale")
CT = ("weight", "weight_scale", "weight_zero_point", "weight_g_idx", *INPUTS)
CT_PACKED = ("weight_packed", "weight_shape", *CT[1:])
FP8 = ("weight", "weight_scale", "weight_scale_inv", "activation_scale", *INPUTS)
NF4 = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
BNB4 = (
    "weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax",
    "weight.nested_quant_map", *NF4,
)  # fmt: skip
Share = tuple[int | None, int | None]  # rows and columns that share a scale; None: all


def _scaled(
    codes: Tensor, scale: Tensor, zero: Tensor | None, share: Share, order: Tensor | None = None
) -> Tensor:
    """Codes (O, D), and scale and zero of blocks of them -> weights (O, D).

    `order` (D,) says which group of columns each one belongs to, if that is not its place.
    """
    size = [all if n is None else n for n, all in zip(share, codes.shape, strict=True)]
    blocks = [-(-n // at) for n, at in zip(codes.shape, size, strict=True)]
    columns = torch.arange(codes.shape[1]) // size[1] if order is None else order.long()
    rows = torch.arange(codes.shape[0]) // size[0]

    def spread(x: Tensor) -> Tensor:
        if order is not None and x.dim() == 2:
            blocks[1] = x.shape[1]
        return x.float().reshape(blocks)[rows][:, columns]

    codes = codes.float()
    return (codes if zero is None else codes - spread(zero)) * spread(scale)


def _bits(x: Tensor, bits: int, dim: int) -> Tensor:
    """int32 of several codes each -> the codes, the lowest bits first, along a dimension."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    shape = [1] * (x.dim() + 1)
    shape[dim + 1] = len(shifts)
    return (x.unsqueeze(dim + 1) >> shifts.view(shape) & (1 << bits) - 1).flatten(dim, dim + 1)


def plain(tensors: Mapping[str, Tensor], bits: int, share: Share) -> Tensor:
    zero, order = tensors.get("weight_zero_point"), tensors.get("weight_g_idx")
    return _scaled(tensors["weight"], tensors["weight_scale"], zero, share, order)


def unpacked(tensors: Mapping[str, Tensor], bits: int, share: Share) -> Tensor:
    shape, offset = tensors["weight_shape"].tolist(), 1 << bits - 1
    if tensors["weight_packed"].shape[1] != -(-shape[1] * bits // 32):
        raise ValueError(f"codes of {bits} bits do not make {tuple(shape)}")
    codes = _bits(tensors["weight_packed"], bits, 1)[: shape[0], : shape[1]] - offset
    zero, order = tensors.get("weight_zero_point"), tensors.get("weight_g_idx")
    if zero is not None and zero.dtype == torch.int32:
        zero = _bits(zero, bits, 0)[: shape[0]] - offset
    return _scaled(codes, tensors["weight_scale"], zero, share, order)


def fp8(tensors: Mapping[str, Tensor], block: list[int] | None) -> Tensor:
    weight, scale = tensors["weight"], tensors.get("weight_scale_inv")
    scale = tensors["weight_scale"] if scale is None else scale
    share: Share = (block[0], block[1]) if block else (None, None)
    if not block and scale.numel() == weight.shape[0] > 1:
        share = (1, None)
    return _scaled(weight, scale, None, share)


def awq(tensors: Mapping[str, Tensor], size: int) -> Tensor:
    def columns(x: Tensor) -> Tensor:
        places = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
        return _bits(x, 4, 1).unflatten(1, (-1, 8))[..., places].flatten(1).T

    share = (1, None if size == -1 else size)
    codes, zero = columns(tensors["qweight"]), columns(tensors["qzeros"])
    return _scaled(codes, tensors["scales"].T, zero, share)


def gptq(tensors: Mapping[str, Tensor], size: int, bits: int, first: bool) -> Tensor:
    codes = _bits(tensors["qweight"], bits, 0).T
    zero = _bits(tensors["qzeros"], bits, 1).T + first  # the first format stores one less
    share = (1, None if size == -1 else size)
    return _scaled(codes, tensors["scales"].T, zero, share, tensors.get("g_idx"))


def bnb4(tensors: Mapping[str, Tensor]) -> Tensor:
    names = [name for name in NF4 if name in tensors]
    state = json.loads(bytes(tensors[(names or NF4)[0]].tolist()))
    absmax = tensors["weight.absmax"]
    if absmax.dtype == torch.uint8:
        nested = tensors["weight.nested_quant_map"][absmax.long()].unflatten(0, (-1,))
        blocks = torch.arange(len(absmax)) // state["nested_blocksize"]
        scales = tensors["weight.nested_absmax"][blocks]
        absmax = nested * scales + state.get("nested_offset", 0.0)
    packed = tensors["weight"].flatten().view(torch.uint8)
    codes = torch.stack((packed >> 4, packed & 15), -1).flatten()
    values = tensors["weight.quant_map"].float()[codes.long()]
    blocks = torch.arange(len(values)) // state["blocksize"]
    return (values * absmax.float()[blocks])[: _product(state["shape"])].reshape(state["shape"])


def bnb8(tensors: Mapping[str, Tensor]) -> Tensor:
    return tensors["weight"].float() * (tensors["SCB"].float() / 127)[:, None]


def _product(shape: list[int]) -> int:
    return torch.Size(shape).numel()
