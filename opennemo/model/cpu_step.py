"""A model's step on a CPU as one native call.

Its weights are packed for the kernel, whatever number format they are in; the model's own can be
let go of meanwhile.
"""

import ctypes
import mmap
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from opennemo.kernels import cpu
from opennemo.model.attention import Paged
from opennemo.model.quantization import FORMATS, Format, QuantizedLinear
from opennemo.model.transformer import Block, Transformer


class NativeStep:
    """The kernel, equal to the definition but for the order of additions."""

    def __init__(
        self,
        model: Transformer,
        n_threads: int,
        instructions: str | None = None,
        release: bool = False,
    ):
        config = model.config
        shape = cpu.Shape(
            config.dim, config.n_layers, config.n_heads, config.n_kv_heads, config.head_dim,
            config.hidden_dim, config.vocab_size, n_threads, config.norm_eps,
        )  # fmt: skip
        channels = torch.arange(0, config.head_dim, 2, dtype=torch.float64)
        self.kernel = cpu.CpuModel(
            shape,
            config.rope_theta ** (-channels / config.head_dim),
            model.tok_embeddings.weight.detach(),
            model.norm.weight,
            _layers(model, release),
            _weights(model.output),
            instructions,
        )
        if release and not (config.tied_embeddings and isinstance(model.output, nn.Linear)):
            _empty(model.output)

    def __call__(self, tokens: Tensor, attend: Paged, rows: Tensor) -> Tensor:
        return self.kernel.step(
            tokens, attend.positions, attend.slots, attend.cu_seqlens, attend.page_table, rows,
            attend.pages.codes, attend.pages.scale, attend.window,
        )  # fmt: skip


def _layers(model: Transformer, release: bool) -> Iterator[cpu.Layer]:
    for block in model.layers:
        assert isinstance(block, Block)
        attention, feed_forward = block.attention, block.feed_forward
        yield cpu.Layer(
            attention_norm=block.attention_norm.weight,
            qkv=[_weights(w) for w in (attention.wq, attention.wk, attention.wv)],
            out=_weights(attention.wo),
            ffn_norm=block.ffn_norm.weight,
            up=[_weights(w) for w in (feed_forward.w1, feed_forward.w3)],
            down=_weights(feed_forward.w2),
        )
        if release:
            for module in (*attention.children(), *feed_forward.children()):
                _empty(module)


def _weights(linear: nn.Module) -> cpu.Weights:
    if not isinstance(linear, QuantizedLinear):
        weight = linear.get_parameter("weight")
        name = {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(weight.dtype)
        if name is None:
            raise ValueError(f"weights in {weight.dtype}; the CPU takes float32 and bfloat16")
        return cpu.Weights(format=name, codes=weight, scale=torch.ones(1, 1))
    format, inputs = linear.format, linear.format.inputs
    return cpu.Weights(
        format=_name(format),
        codes=linear.weight,
        scale=linear.scale,
        input_scale=0.0 if linear.input_scale is None else float(linear.input_scale),
        power_of_two=inputs is not None and inputs.power_of_two,
    )


def _name(format: Format) -> str:
    """What the kernel calls a format: how its weights are stored."""
    stored = {f.weights.dtype: name for name, f in FORMATS.items() if not f.static}
    return stored[format.weights.dtype]


def _empty(linear: nn.Module) -> None:
    for tensor in (*linear.parameters(), *linear.buffers()):
        _forget_pages(tensor)
        tensor.data = tensor.new_empty(0)


def _forget_pages(tensor: Tensor) -> None:
    """Take the memory pages that lie wholly inside a tensor from it; its numbers are lost.

    A file stays mapped as long as one of its tensors lives, and what was read of it counts as ours:
    loading would seem to take, and in a container would take, twice the model.
    """
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    length = (tensor.data_ptr() + tensor.nbytes) // page * page - start
    if length > 0 and hasattr(mmap, "MADV_DONTNEED") and tensor.is_contiguous():
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED
        )
