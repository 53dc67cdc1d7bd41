"""One model over many ranks, applied from outside: `shard_` divides it, `share` divides the tokens.

The ranks form a mesh of four dimensions, `replicate` x `shard` x `context` x `tensor`:

    tensor     share every layer: heads and channels are divided, and between layers the tokens
               (sequence parallel), so that norms and residuals are divided, too
    context    share a window of tokens (context.py)
    shard      see other windows; weights, gradients and optimizer states are divided over these and
               the context's ranks, and gathered block by block when they are needed (FSDP2)
    replicate  see other windows, and hold copies of what `shard` divides (HSDP)

Gradients are those of the *sum* of all ranks' losses. So with every arrangement a rank takes the
loss of the tokens that are its own, `share(...).outputs`, divided by the whole step's count:

    part = share(mesh, cu_seqlens, max_seqlen)
    hidden = model(tokens[part.inputs], part.attend)                  # of tokens part.outputs
    loss = head_loss(hidden, head_weight(model), targets[part.outputs]) / n_targets_of_all_ranks

All ranks must begin with equal weights: from one folder, or one seed. What changes modules
(`prepare_qat_`, `add_lora_`) comes before `shard_`, optimizers after it.

Things are applied in torchtitan's order (arXiv:2410.06511): tensor parallel, compilation, FSDP2;
only checkpointing of activations is outside what is compiled, so that it holds where a block cannot
be compiled whole. Sources: Megatron-LM (arXiv:1909.08053), sequence parallel
(arXiv:2205.05198), ZeRO (arXiv:1910.02054).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint

from opennemo.errors import InvalidRequest
from opennemo.model.attention import Packed
from opennemo.model.context import ContextParallel
from opennemo.model.positions import Window
from opennemo.model.quantization import QATLinear, QuantizedLinear
from opennemo.model.spread import spread
from opennemo.model.transformer import Attend, Transformer


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """The ranks, and this one's place among them."""

    replicate: DeviceMesh
    shard: DeviceMesh
    context: DeviceMesh
    tensor: DeviceMesh
    fsdp: DeviceMesh  # shard and context as one; before them replicate, if there is more than one


def make_mesh(
    device: str,
    *,
    data_parallel_replicate: int = 1,
    data_parallel_shard: int = -1,
    tensor_parallel: int = 1,
    context_parallel: int = 1,
) -> Mesh | None:
    """Arrange the ranks of the process group; None if there is no group, and no rank but this.

    `data_parallel_shard` of -1 takes the ranks that the others leave.

    Raises:
        InvalidRequest: the degrees do not multiply to the number of ranks.
    """
    n_ranks = dist.get_world_size() if dist.is_initialized() else 1
    others = data_parallel_replicate * tensor_parallel * context_parallel
    shard = max(n_ranks // others, 1) if data_parallel_shard == -1 else data_parallel_shard
    if others * shard != n_ranks:
        raise InvalidRequest(
            f"data_parallel_replicate {data_parallel_replicate} x data_parallel_shard {shard} x "
            f"context_parallel {context_parallel} x tensor_parallel {tensor_parallel} = "
            f"{others * shard} ranks, but there are {n_ranks}"
        )
    if not dist.is_initialized():
        return None
    sizes = data_parallel_replicate, shard * context_parallel, tensor_parallel
    mesh = init_device_mesh(device, sizes, mesh_dim_names=("replicate", "fsdp", "tensor"))
    parts = mesh._unflatten("fsdp", (shard, context_parallel), ("shard", "context"))
    if tensor_parallel > 1:
        mesh["fsdp", "tensor"]._flatten()  # then the gradient's norm takes one sum instead of two
    return Mesh(
        replicate=mesh["replicate"],
        shard=parts["shard"],
        context=parts["context"],
        tensor=mesh["tensor"],
        fsdp=mesh["fsdp"] if data_parallel_replicate == 1 else mesh["replicate", "fsdp"],
    )


def shard_(
    model: Transformer,
    mesh: Mesh | None,
    *,
    activation_checkpointing: bool = False,
    compile: bool = False,
    dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
) -> None:
    """Divide a model over the ranks of a mesh, block by block; None leaves it whole.

    With a GPU's mesh each block moves to this rank's GPU when its turn comes, so the model may lie
    in memory-mapped files until then.

    Args:
        activation_checkpointing: keep only what goes into each block, and compute the rest again
            for the backward pass.
        compile: each block by itself; all have one code.
        dtype: in which weights and optimizer states are kept; as they are by default.
        compute_dtype: in which weights are gathered and multiplied; gradients are summed in
            float32. Only where there is a mesh.

    Raises:
        InvalidRequest: heads, channels or words do not divide by the tensor parallel degree.
    """
    tied = model.config.tied_embeddings
    if mesh is not None and mesh.tensor.size() > 1:
        _check_divides(model, mesh.tensor.size())
    fully_shard = _fully_shard(mesh, compute_dtype)
    for block in model.layers:
        _cast(block, dtype)
        _divide_(block, mesh, _BLOCK)
        if compile:
            # Whole: where a DTensor leaves one graph for the next, its gradient comes back wrong.
            whole = mesh is not None and mesh.tensor.size() > 1
            _set_forward(block, torch.compile(block.forward, fullgraph=whole))
        if activation_checkpointing:
            _set_forward(block, _recomputed(block.forward))
        fully_shard(block)
    _cast(model, dtype)
    _divide_(model, mesh, _ENDS if tied else {**_ENDS, "output": ColwiseParallel})
    if tied:
        model.output.weight = model.tok_embeddings.weight
    else:  # a tied one stays whole as long as the head
        fully_shard(model.tok_embeddings)
    # The head's weight stays whole from the model's forward to its backward, for the loss.
    fully_shard(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other with a factor


@dataclass(frozen=True)
class Share:
    """What this rank computes of sequences laid end to end."""

    attend: Attend
    inputs: Tensor  # (T',) places of the tokens that go into the model
    outputs: Tensor  # (T'',) places of those whose hidden states come out


def share(
    mesh: Mesh | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    window: Window = None,
) -> Share:
    """Divide tokens among the ranks that share a window; they all pass the same.

    Raises:
        InvalidRequest: there are not as many tokens as divide.
    """
    n_tokens = int(cu_seqlens[-1])
    context, tensor = (1, 1) if mesh is None else (mesh.context.size(), mesh.tensor.size())
    if n_tokens % (2 * context * tensor if context > 1 else tensor):
        raise InvalidRequest(
            f"{n_tokens:,} tokens do not divide by tensor_parallel {tensor}"
            + (f" and twice context_parallel {context}" if context > 1 else "")
        )
    if mesh is not None and context > 1:
        attend = ContextParallel(cu_seqlens, mesh.context.get_group(), window)
        inputs = attend.rows
    else:
        attend = Packed(cu_seqlens, max_seqlen, window)
        inputs = torch.arange(n_tokens, device=cu_seqlens.device)
    outputs = inputs if mesh is None else inputs.chunk(tensor)[mesh.tensor.get_local_rank()]
    return Share(attend, inputs, outputs)


def data_rank(mesh: Mesh | None) -> tuple[int, int]:
    """Which windows this rank sees: its number among the ranks that see others, and how many."""
    if mesh is None:
        return 0, 1
    rank = mesh.replicate.get_local_rank() * mesh.shard.size() + mesh.shard.get_local_rank()
    return rank, mesh.replicate.size() * mesh.shard.size()


def head_weight(model: Transformer) -> Tensor:
    """The head's weight (V, D), whole on this rank, to multiply hidden states with.

    Gradients flow back only between a forward pass and its backward pass.
    """
    weight = model.output.weight
    if not isinstance(weight, DTensor):
        return weight
    return weight.full_tensor(grad_placements=[Partial()] * weight.device_mesh.ndim)


def whole(tensor: Tensor) -> Tensor:
    """A weight as it would be without ranks; all ranks must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class _Linear(ParallelStyle):
    """A linear layer divided by its outputs or by its inputs, with the adapter it may have.

    PyTorch's own styles, ColwiseParallel and RowwiseParallel, support only plain layers.
    """

    def __init__(self, by: Literal["outputs", "inputs"]):
        super().__init__()
        self.placements = {"weight": Shard(0), "base": Shard(0), "a": Replicate(), "b": Shard(0)}
        if by == "inputs":
            self.placements = {
                "weight": Shard(1),
                "base": Shard(1),
                "a": Shard(1),
                "b": Replicate(),
            }
        self.takes, self.gives = Replicate(), Shard(1)
        if by == "inputs":
            self.takes, self.gives = Shard(1), Shard(0)  # rows: tokens are divided between layers

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for part in module.modules():
            for name, weight in list(part.named_parameters(recurse=False)):
                divided = distribute_tensor(
                    weight, device_mesh, [self.placements[name]], src_data_rank=None
                )
                part.register_parameter(name, nn.Parameter(divided))

        def take(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
            (x,) = inputs
            if isinstance(x, DTensor):
                return x
            return DTensor.from_local(x, device_mesh, [self.takes], run_check=False)

        def give(_: nn.Module, inputs: tuple[Tensor], output: DTensor) -> Tensor:
            return output.redistribute(placements=[self.gives]).to_local()

        module.register_forward_pre_hook(take)
        module.register_forward_hook(give)
        return module


# How parts are divided over `tensor`: heads and channels; norms by tokens. Two gathers a block.
_Plan = Mapping[str, Callable[[], ParallelStyle]]
_BLOCK: _Plan = {
    "attention_norm": lambda: SequenceParallel(sequence_dim=0),
    "attention": lambda: _gathered(None, None),
    "attention.wq": lambda: _Linear("outputs"),
    "attention.wk": lambda: _Linear("outputs"),
    "attention.wv": lambda: _Linear("outputs"),
    "attention.wo": lambda: _Linear("inputs"),
    "ffn_norm": lambda: SequenceParallel(sequence_dim=0),
    "feed_forward": lambda: _gathered(),
    "feed_forward.w1": lambda: _Linear("outputs"),
    "feed_forward.w2": lambda: _Linear("inputs"),
    "feed_forward.w3": lambda: _Linear("outputs"),
}
_ENDS: _Plan = {
    "tok_embeddings": lambda: RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(0)),
    "norm": lambda: SequenceParallel(sequence_dim=0, use_local_output=True),
}


def _gathered(*others: None) -> ParallelStyle:
    """A module's first input, tokens in parts, made whole."""
    return PrepareModuleInput(
        input_layouts=(Shard(0), *others), desired_input_layouts=(Replicate(), *others)
    )


def _divide_(module: nn.Module, mesh: Mesh | None, plan: _Plan) -> None:
    """As parallelize_module, but frozen parameters stay frozen."""
    if mesh is None or mesh.tensor.size() == 1:
        return
    for path, style in plan.items():
        part = module.get_submodule(path)
        learns = {name: weight.requires_grad for name, weight in part.named_parameters()}
        parallelize_module(part, mesh.tensor, style(), src_data_rank=None)
        for name, weight in part.named_parameters():
            weight.requires_grad_(learns[name])
        if isinstance(part, QATLinear):
            part.format = spread(part.format)
        if isinstance(part, nn.Embedding):
            # Compiled code gives a tensor that is still being gathered a gradient of exactly 0.
            part.register_forward_hook(lambda *call: funcol.wait_tensor(call[-1]))


def _fully_shard(mesh: Mesh | None, compute_dtype: torch.dtype | None) -> Callable:
    """Divides a module's parameters, except those in it that are divided already."""
    if mesh is None:
        return lambda module: None
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the rotary angles stay in float32
    )
    return lambda module: fully_shard(module, mesh=mesh.fsdp, mp_policy=policy)


def _cast(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Parameters alone: buffers are codes, scales and magnitudes."""
    for weight in module.parameters():
        if dtype is not None and not isinstance(weight, DTensor):
            weight.data = weight.data.to(dtype)


def _recomputed(forward: Callable) -> Callable:
    def recomputed(*inputs: Any) -> Any:
        return checkpoint(forward, *inputs, use_reentrant=False)

    return recomputed


def _set_forward(module: nn.Module, forward: Callable) -> None:
    """Replaces a wrapper, which would change the names of all weights in it."""
    module.forward = forward  # pyright: ignore


def _check_divides(model: Transformer, degree: int) -> None:
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise InvalidRequest("tensor_parallel does not go with weights that are stored in codes")
    wrong = [
        f"{name}, which is {n:,}"
        for name in ("n_heads", "n_kv_heads", "hidden_dim", "vocab_size")
        if (n := getattr(model.config, name)) % degree
    ]
    for name, linear in model.layers[0].named_modules():
        if isinstance(linear, QATLinear) and name.endswith((".wo", ".w2")):
            shares = {r.share for r in (linear.format.weights, linear.format.inputs) if r}
            wrong += [
                f"the {linear.in_features:,} inputs of {name} into groups of {share} with one scale"
                for share in shares
                if isinstance(share, int) and linear.in_features % (degree * share)
            ]
    if wrong:
        raise InvalidRequest(f"tensor_parallel {degree} does not divide {'; '.join(wrong)}")
