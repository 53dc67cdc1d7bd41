"""A model's step on a GPU: few kernels a layer, and while decoding one recorded graph for all.

The pass is the model's own, with matrices that see the same input laid into one and the rest in
kernels that end in the rounding of the next product. At one token a step launching even those few
takes longer than running them; so a step in which each sequence has one token is padded to one of
`BATCHES`, recorded once as a CUDA graph and replayed. Padding rows write to the last page of the KV
cache, which no sequence may use.

The definition is `TorchStep`; tests compare the two, the kernels in Triton's interpreter on a CPU,
the graphs only on a GPU.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opennemo.kernels import gpu, packed_weights
from opennemo.kernels.packed_weights import PackedMatrix
from opennemo.kernels.paged_attention import paged_attention
from opennemo.kernels.paged_prefill import paged_prefill
from opennemo.model.attention import Paged
from opennemo.model.formats import FORMATS
from opennemo.model.fused_attention import fuses_pages
from opennemo.model.pages import Pages
from opennemo.model.positions import query_scale, window_in
from opennemo.model.quantization import QuantizedEmbedding, QuantizedLinear
from opennemo.model.torch_step import TorchStep
from opennemo.model.transformer import Block, Transformer, rotary

BATCHES = (1, 2, 4, 8, *range(16, 257, 16))


class Product:
    """Linear layers that see the same input, as one product; their weights become views of it.

    Float weights go to PyTorch's product, FP8 to the tensor cores where the card has them. Codes of
    four to eight bits are unpacked as they are multiplied, each matrix by itself. Everything else
    is computed by its definition, from weights that are dequantised at each use.
    """

    def __init__(self, *linears: nn.Module):
        self.rounding, self.weight, self.scale = None, None, None
        self.each = [_product(linear) for linear in linears]
        first = linears[0]
        if all(type(linear) is nn.Linear for linear in linears):
            self.weight = _fuse([linear.get_parameter("weight") for linear in linears])
        elif isinstance(first, QuantizedLinear) and all(map(_fits_tensor_cores, linears)):
            given = [linear.get_buffer("input_scale") for linear in linears if first.format.static]
            if all(torch.equal(scale, given[0]) for scale in given):
                weights = [linear.get_buffer("weight") for linear in linears]
                scales = [linear.get_buffer("scale").float() for linear in linears]
                scales = [s.expand(len(w), 1) for s, w in zip(scales, weights, strict=True)]
                self.weight, self.scale = _fuse(weights), torch.cat(scales).t().contiguous()
                inputs = first.format.inputs
                self.rounding = gpu.ToFP8(
                    given[0].float() if given else None, inputs is not None and inputs.power_of_two
                )

    def __call__(self, rows: gpu.RoundedRows, dtype: torch.dtype) -> Tensor:
        """Rows (T, D), rounded by `self.rounding` -> (T, O), the layers' outputs side by side."""
        if self.weight is None:
            return torch.cat([product(rows.values) for product in self.each], -1)
        if self.scale is None:
            return F.linear(rows.values, self.weight)
        return gpu.fp8_linear(rows, self.weight, self.scale, dtype)


@dataclass
class FusedLayer:
    """A block: its norms, and a product for each input that its matrices share."""

    attention_norm: Tensor
    qkv: Product
    out: Product
    ffn_norm: Tensor
    up: Product
    down: Product

    @classmethod
    def of(cls, block: nn.Module) -> "FusedLayer":
        assert isinstance(block, Block)
        attention, feed_forward = block.attention, block.feed_forward
        return cls(
            attention_norm=block.attention_norm.weight,
            qkv=Product(attention.wq, attention.wk, attention.wv),
            out=Product(attention.wo),
            ffn_norm=block.ffn_norm.weight,
            up=Product(feed_forward.w1, feed_forward.w3),
            down=Product(feed_forward.w2),
        )


class GpuStep:
    """The fused pass, equal to the definition except for the order of additions."""

    def __init__(self, model: Transformer):
        self.model = model
        self.layers = [FusedLayer.of(block) for block in model.layers]
        self.head = Product(model.output)
        self._embed = _embedding(model.tok_embeddings)
        self._definition = TorchStep(model)
        self._pages: Pages | None = None  # those that the graphs were recorded with
        self._inputs: tuple[Tensor, Paged] | None = None  # where graphs read, for the largest batch
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, attend: Paged, rows: Tensor) -> Tensor:
        pages = attend.pages
        # Where there are no FP8 products, Triton has no E4M3 either.
        without_fp8 = pages.codes.dtype == gpu.FP8 and not gpu.multiplies_fp8(tokens.device)
        if without_fp8 or not FORMATS[pages.format].fused_kv:
            return self._definition(tokens, attend, rows)
        if not tokens.is_cuda:  # in Triton's interpreter, which has no graphs
            return self.logits(self.hidden(tokens, attend)[rows])
        with torch.cuda.device(tokens.device):
            if attend.max_seqlen == 1 and len(tokens) <= BATCHES[-1]:
                hidden = self._replay(*self.padded(tokens, attend))
            else:
                hidden = self.hidden(tokens, attend)
            return self.logits(hidden[rows])

    def hidden(self, tokens: Tensor, attend: Paged) -> Tensor:
        """The blocks and the last norm: tokens (T,) -> (T, D)."""
        config, pages = self.model.config, attend.pages
        # The kernel turns queries and keys alike; queries may be scaled by position besides.
        rope = rotary(attend.positions, config)[:, -1:].contiguous()
        far = config.query_scaling and query_scale(attend.positions, config.query_scaling)
        x, update = self._embed(tokens), None
        for i, layer in enumerate(self.layers):
            rows = gpu.norm(x, update, layer.attention_norm, config.norm_eps, layer.qkv.rounding)
            scale = None if pages.scale is None else pages.scale[i]
            q = gpu.rotate_and_write(
                layer.qkv(rows, x.dtype), rope, config.n_heads, pages.codes[i], scale, attend.slots
            )
            if far is not None:
                q = (q * far).type_as(q)
            seen = _attention(i, q, attend)
            update = layer.out(gpu.round_rows(seen.flatten(1), layer.out.rounding), x.dtype)
            rows = gpu.norm(x, update, layer.ffn_norm, config.norm_eps, layer.up.rounding)
            rows = gpu.swiglu(layer.up(rows, x.dtype), layer.down.rounding)
            update = layer.down(rows, x.dtype)
        return gpu.norm(x, update, self.model.norm.weight, config.norm_eps).values

    def logits(self, hidden: Tensor) -> Tensor:
        """Normed hidden states (R, D) -> (R, V) in float32."""
        return self.head(gpu.round_rows(hidden, self.head.rounding), hidden.dtype).float()

    def padded(self, tokens: Tensor, attend: Paged) -> tuple[Tensor, Paged]:
        """A step of one token a sequence, copied to where graphs read and filled up to a batch."""
        if attend.pages is not self._pages:
            self._pages, self._inputs = attend.pages, self._room(attend)
            self._graphs.clear()
        assert self._inputs is not None
        n, n_pages = attend.page_table.shape
        size = next(size for size in BATCHES if size >= n)
        all_tokens, room = self._inputs
        spare, page_size = attend.pages.codes.shape[2] - 1, attend.pages.codes.shape[3]
        for target, source, filler in (
            (all_tokens, tokens, 0),
            (room.positions, attend.positions, 0),
            (room.slots, attend.slots, spare * page_size),
            (room.context_lens, attend.context_lens, 1),
            (room.page_table[:, :n_pages], attend.page_table, spare),
        ):
            target[:n] = source
            target[n:size] = filler
        return all_tokens[:size], replace(
            room,
            positions=room.positions[:size],
            slots=room.slots[:size],
            cu_seqlens=room.cu_seqlens[: size + 1],
            context_lens=room.context_lens[:size],
            page_table=room.page_table[:size],
        )

    def _room(self, attend: Paged) -> tuple[Tensor, Paged]:
        """Inputs of the largest batch with the longest sequences, at a fixed address."""
        pages, size = attend.pages, BATCHES[-1]
        longest = -(-self.model.config.max_position_embeddings // pages.codes.shape[3])

        def ints(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=pages.codes.device)

        return ints(size), Paged(
            pages=pages,
            positions=ints(size),
            slots=ints(size, dtype=torch.int64),
            cu_seqlens=torch.arange(size + 1, dtype=torch.int32, device=pages.codes.device),
            max_seqlen=1,
            context_lens=ints(size),
            page_table=ints(size, min(pages.codes.shape[2], longest)),
            window=attend.window,
        )

    def _replay(self, tokens: Tensor, attend: Paged) -> Tensor:
        """`hidden` as a graph, recorded when a batch of this size first comes; valid until then."""
        size = len(tokens)
        if size not in self._graphs:
            # Once unrecorded: compiles kernels and lets libraries initialise, which a recording
            # cannot. It writes the keys and values that the replay will write again.
            self.hidden(tokens, attend)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            pool = next(iter(self._graphs.values()))[0].pool() if self._graphs else None
            # Other threads may use CUDA meanwhile.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                hidden = self.hidden(tokens, attend)
            self._graphs[size] = graph, hidden
        graph, hidden = self._graphs[size]
        graph.replay()
        return hidden


def _attention(layer: int, q: Tensor, attend: Paged) -> Tensor:
    """Attention of queries (T, N, H) to a layer's pages, by the kernel that suits this step."""
    pages, window = attend.pages, window_in(attend.window, layer)
    keys, values = pages.codes[layer]
    k_scale, v_scale = (None, None) if pages.scale is None else pages.scale[layer]
    table, lengths = attend.page_table, attend.context_lens
    if attend.max_seqlen == 1:
        return paged_attention(q, keys, values, table, lengths, k_scale, v_scale, window)
    fused = q.is_cuda and q.dtype == keys.dtype != torch.float32 and fuses_pages(keys.shape[1])
    if fused:
        return attend.attention(layer, q)
    return paged_prefill(
        q, keys, values, table, lengths, attend.cu_seqlens, attend.max_seqlen, k_scale, v_scale,
        window,
    )  # fmt: skip


def _product(linear: nn.Module) -> Callable[[Tensor], Tensor]:
    """x (T, D) -> (T, O), from packed weights if there is a kernel for them."""
    if not isinstance(linear, QuantizedLinear) or (packed := _packed(linear)) is None:
        return linear
    rounds = linear.format.inputs is not None
    return lambda x: packed_weights.multiply(x, packed, rounds_inputs=rounds)


def _embedding(embedding: nn.Module) -> Callable[[Tensor], Tensor]:
    """Tokens (T,) -> (T, D). Code in a graph must not copy constants from the CPU."""
    if not isinstance(embedding, QuantizedEmbedding) or (packed := _packed(embedding)) is None:
        return embedding
    return lambda tokens: packed_weights.unpack(packed, embedding.dtype, tokens)


def _packed(stored: QuantizedEmbedding | QuantizedLinear) -> PackedMatrix | None:
    format, width = stored.format, stored.in_features
    if not format.unpacked_on_gpu or not packed_weights.serves(format.name, width):
        return None
    tensors = stored.tensors
    scales = tensors["scale"].float() if "scale" in tensors else None
    return PackedMatrix(format.name, tensors["weight"], scales, width)


def _fits_tensor_cores(linear: nn.Module) -> bool:
    """Whether a layer's arithmetic is that of the FP8 product, on a device that has one."""
    if not isinstance(linear, QuantizedLinear):
        return False
    fits = linear.format.tensor_cores and linear.out_features % 16 == linear.in_features % 16 == 0
    return fits and gpu.multiplies_fp8(linear.get_buffer("weight").device)


def _fuse(weights: Sequence[Tensor]) -> Tensor:
    """Lay weights (O, D) into one and make them views of it, so that memory holds them once."""
    if len(weights) == 1:
        return weights[0].detach()
    # As bytes: PyTorch lays those together in every build.
    dtype, rows = weights[0].dtype, [len(weight) for weight in weights]
    whole = torch.cat([weight.detach().view(torch.uint8) for weight in weights])
    for weight, part in zip(weights, whole.split(rows), strict=True):
        weight.data = part.view(dtype)
    return whole.view(dtype)
