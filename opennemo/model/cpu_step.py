"""A model's step on a CPU as one native call.

Its weights are packed for the kernel, whatever number format they are in; the model's own can be
freed meanwhile.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from opennemo.kernels import cpu
from opennemo.model.attention import Paged
from opennemo.model.formats import FORMATS, plain
from opennemo.model.positions import frequencies, window_in
from opennemo.model.quantization import QuantizedEmbedding, QuantizedLinear, replace_module
from opennemo.model.tensor_files import forget_pages
from opennemo.model.transformer import Block, Transformer

# Of a layer, in the kernel's order.
MATRICES = (
    *(f"attention.{name}" for name in ("wq", "wk", "wv", "wo")),
    *(f"feed_forward.{name}" for name in ("w1", "w3", "w2")),
)


class NativeStep:
    """The kernel, equal to the definition except for the order of additions."""

    def __init__(
        self,
        model: Transformer,
        n_threads: int,
        instructions: str | None = None,
        release: bool = False,
    ):
        config = model.config
        far, scaling = config.query_scaling, config.rope_scaling
        shape = cpu.Shape(
            config.dim, config.n_layers, config.n_heads, config.n_kv_heads, config.head_dim,
            config.hidden_dim, config.vocab_size, n_threads, far.original if far else 0,
            config.norm_eps, far.beta if far else 0.0, scaling.gain if scaling else 1.0,
        )  # fmt: skip
        self.kernel = cpu.CpuModel(
            shape,
            frequencies(config.head_dim, config.rope_theta, scaling),
            _weights(model.tok_embeddings),
            model.norm.weight,
            _layers(model, release),
            _weights(model.output),
            instructions,
        )
        own = [t.data_ptr() for t in model.tok_embeddings.state_dict().values()]
        if release and not any(t.data_ptr() in own for t in model.output.state_dict().values()):
            _empty(model.output)

    def __call__(self, tokens: Tensor, attend: Paged, rows: Tensor) -> Tensor:
        pages = attend.pages
        kv_format = FORMATS[pages.format].kernel
        assert kv_format is not None, pages.format
        return self.kernel.step(
            tokens, attend.positions, attend.slots, attend.cu_seqlens, attend.page_table, rows,
            pages.codes, kv_format, pages.scale,
            [window_in(attend.window, layer) for layer in range(pages.codes.shape[0])],
        )  # fmt: skip


class KernelLinear(nn.Module):
    """A matrix that only the kernel holds, multiplied outside of its step."""

    def __init__(self, kernel: cpu.CpuModel, index: int, n_rows: int):
        super().__init__()
        self.kernel, self.index, self.out_features = kernel, index, n_rows

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel.multiply(self.index, x, self.out_features)


def use_kernel_(model: Transformer, step: NativeStep) -> None:
    """Let PyTorch run a model by the matrices that the kernel has, in float32 between products."""
    paths = [f"layers.{i}.{name}" for i in range(model.config.n_layers) for name in MATRICES]
    for index, path in enumerate([*paths, "output"]):
        n_rows = model.get_submodule(path).out_features
        assert isinstance(n_rows, int)
        replace_module(model, path, KernelLinear(step.kernel, index, n_rows))
    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            module.float()
    model.tok_embeddings.register_forward_hook(lambda module, inputs, output: output.float())


def has_kernels(model: Transformer, kv_format: str) -> bool:
    """Whether the kernel computes every format that the model's matrices and its cache are in."""
    halves = ("attention", "feed_forward")
    matrices = [part for block in model.layers for half in halves
                for part in block.get_submodule(half).children()]  # fmt: skip
    formats = map(_format_of, (model.tok_embeddings, model.output, *matrices))
    return None not in (FORMATS[kv_format].kernel, *formats)


def _format_of(module: nn.Module) -> cpu.CpuFormat | None:
    if isinstance(module, QuantizedLinear | QuantizedEmbedding):
        return module.format.kernel
    if type(module) not in (nn.Linear, nn.Embedding):
        return None  # it learns in some way of its own
    format = plain(module.get_parameter("weight").dtype)
    return format and format.kernel


def _weights(module: nn.Module) -> cpu.Weights:
    format = _format_of(module)
    assert format is not None, module
    if isinstance(module, nn.Linear | nn.Embedding):
        weight = module.get_parameter("weight")
        return cpu.Weights(
            format=format, columns=weight.shape[1], codes=weight, scale=torch.ones(1, 1)
        )
    assert isinstance(module, QuantizedLinear | QuantizedEmbedding)
    tensors, inputs = module.tensors, module.format.inputs
    return cpu.Weights(
        format=format,
        columns=module.in_features,
        codes=tensors["weight"],
        scale=tensors.get("scale", torch.ones(1, 1)),
        input_scale=float(tensors["input_scale"]) if module.format.static else 0.0,
        power_of_two=inputs is not None and inputs.power_of_two,
        whole_rows=inputs is not None and inputs.share == "row",
    )


def _layers(model: Transformer, release: bool) -> Iterator[cpu.LayerWeights]:
    for block in model.layers:
        assert isinstance(block, Block)
        attention, feed_forward = block.attention, block.feed_forward
        yield cpu.LayerWeights(
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


def _empty(linear: nn.Module) -> None:
    for tensor in (*linear.parameters(), *linear.buffers()):
        forget_pages(tensor)
        tensor.data = tensor.new_empty(0)
