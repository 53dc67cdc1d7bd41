"""A model that is divided over ranks computes and learns what the whole one does."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from opennemo.errors import InvalidRequest
from opennemo.model.attention import Packed
from opennemo.model.context import ContextParallel
from opennemo.model.formats import FORMATS
from opennemo.model.lora import add_lora_
from opennemo.model.parallel import data_rank, head_weight, make_mesh, shard_, share, whole
from opennemo.model.quantization import prepare_qat_, quantize_
from opennemo.model.transformer import PRESETS, Transformer
from tests.ranks import run_ranks

LENGTHS = (13, 1, 18, 9, 7)  # of the documents of a window; they cross every border between ranks
# With 128 for the formats that round groups of 32 columns.
CONFIG = replace(PRESETS["tiny"], hidden_dim=128)
Curve = tuple[list[tuple[float, float]], dict[str, Tensor]]


def build(tied: bool = False, qat: str | None = None, lora: bool = False) -> Transformer:
    """The same model on every rank."""
    torch.manual_seed(0)
    model = Transformer(replace(CONFIG, tied_embeddings=tied))
    if qat:
        prepare_qat_(model, FORMATS[qat])
    if lora:
        add_lora_(model, rank=4, alpha=8, generator=torch.Generator().manual_seed(1))
        for name, weight in model.named_parameters():
            if name.endswith(".b"):  # zero at first, which would hide mistakes
                torch.nn.init.normal_(weight, 0, 0.1)
    return model


def train(mesh: Any, model: Transformer) -> Curve:
    """Four windows a step: losses with norms of gradients, and the weights in the end."""
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=0.01)
    cu_seqlens = F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0)).int()
    rank, n = data_rank(mesh)
    curve = []
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        windows = torch.randint(0, CONFIG.vocab_size, (4, sum(LENGTHS)), generator=generator)
        total = torch.zeros(())
        for tokens in windows.chunk(n)[rank]:
            part = share(mesh, cu_seqlens, max(LENGTHS))
            hidden = model(tokens[part.inputs], part.attend)
            logits = F.linear(hidden, head_weight(model)).float()
            targets = tokens.roll(-1)[part.outputs]
            loss = F.cross_entropy(logits, targets, reduction="sum") / windows.numel()
            loss.backward()
            total += loss.detach()
        if mesh is not None:
            dist.all_reduce(total)
        norm = torch.nn.utils.clip_grad_norm_(learning, 0.5)
        curve.append((float(total), float(whole(norm))))
        optimizer.step()
        optimizer.zero_grad()
    return curve, {name: whole(w.detach()).clone() for name, w in model.named_parameters()}


def on_a_rank(cases: list[tuple[dict, dict, dict]]) -> list[Curve]:
    """Train once for each of (degrees of the mesh, kind of model, options of shard_)."""
    curves = []
    for degrees, kind, options in cases:
        mesh, model = make_mesh("cpu", **degrees), build(**kind)
        names = list(model.state_dict())
        shard_(model, mesh, **options)
        assert list(model.state_dict()) == names
        curves.append(train(mesh, model))
    return curves


def assert_equal_to_one_rank(n_ranks: int, cases: list[tuple[dict, dict, dict]]) -> None:
    alone: dict[str, Curve] = {}
    for rank in run_ranks(n_ranks, on_a_rank, cases, timeout=600):
        for (degrees, kind, options), (curve, weights) in zip(cases, rank, strict=True):
            if str(kind) not in alone:
                alone[str(kind)] = train(None, build(**kind))
            expected, expected_weights = alone[str(kind)]
            case = f"{degrees} {kind} {options}"
            # Where last bits differ, some numbers are rounded to the code beside: in compiled code,
            # and with scales that are no powers of two.
            inexact = kind.get("qat") in ("int4", "int8") or (
                "qat" in kind and "compile" in options
            )
            atol = 1e-3 if inexact else 1e-5
            off = (torch.tensor(curve) - torch.tensor(expected)).abs().max()
            assert off < atol, f"{case}: losses or norms differ by {off}"
            assert weights.keys() == expected_weights.keys()
            for name, weight in weights.items():
                # Where a gradient is all but zero, AdamW's first steps depend on its last bits.
                off = (weight - expected_weights[name]).abs().max()
                assert off < 50 * atol, f"{case}: {name} differs by {off}"


FSDP, TENSOR, CONTEXT = {}, {"tensor_parallel": 2}, {"context_parallel": 2}
REPLICAS = {"data_parallel_replicate": 2}


RECOMPUTED = {"activation_checkpointing": True}


def test_two_ranks_learn_what_one_does_however_they_divide_the_work():
    assert_equal_to_one_rank(
        2,
        [
            (FSDP, {}, {}),
            (FSDP, {"tied": True}, RECOMPUTED),
            (FSDP, {"qat": "fp8-static", "lora": True}, {}),
            (REPLICAS, {}, {}),
            (TENSOR, {"tied": True}, RECOMPUTED),
            (TENSOR, {"qat": "fp8-static", "lora": True}, {}),
            (CONTEXT, {}, RECOMPUTED),
        ],
    )


def test_four_ranks_divide_the_work_in_two_ways_at_once():
    assert_equal_to_one_rank(4, [(TENSOR, {}, {}), (TENSOR | CONTEXT, {"qat": "fp8"}, {})])


@pytest.mark.slow
def test_more_ways_to_divide_the_work():
    """Half a minute."""
    assert_equal_to_one_rank(
        2,
        [
            (FSDP, {"qat": "fp8-static"}, {}),
            (FSDP, {"lora": True}, RECOMPUTED),
            (TENSOR, {"lora": True}, RECOMPUTED),
            (TENSOR, {"qat": "fp8-static"}, {}),
            (TENSOR, {"qat": "int8"}, {}),
            (TENSOR, {"qat": "int4"}, {}),
            (CONTEXT, {"tied": True, "qat": "fp8-static"}, {}),
        ],
    )
    assert_equal_to_one_rank(
        4,
        [
            (TENSOR, {"qat": "fp8-static", "lora": True}, RECOMPUTED),
            (TENSOR | REPLICAS, {"tied": True}, {}),
            (CONTEXT, {}, {}),
            (REPLICAS, {}, {}),
        ],
    )


@pytest.mark.slow
def test_compiled_blocks_learn_the_same():
    """Some two minutes, nearly all of which is compilation."""
    both = {"compile": True, "activation_checkpointing": True}
    assert_equal_to_one_rank(
        2,
        [
            (FSDP, {"qat": "fp8-static"}, both),
            (TENSOR, {}, {"compile": True}),
            (TENSOR, {"qat": "fp8", "lora": True}, both),
            (CONTEXT, {"tied": True}, both),
        ],
    )


def in_two_precisions() -> tuple[Curve, set, set]:
    mesh, model = make_mesh("cpu"), build().bfloat16()
    seen = set()
    model.layers[0].register_forward_pre_hook(
        lambda _, inputs: seen.update(x.dtype for x in inputs[:2])
    )
    shard_(model, mesh, dtype=torch.float32, compute_dtype=torch.bfloat16)
    return train(mesh, model), seen, {weight.dtype for weight in model.parameters()}


def test_weights_are_kept_in_one_precision_and_multiplied_in_another():
    expected, _ = train(None, build())
    for (curve, _), seen, kept in run_ranks(2, in_two_precisions):
        assert kept == {torch.float32}
        assert seen == {torch.bfloat16, torch.float32}  # rotary angles keep theirs
        torch.testing.assert_close(torch.tensor(curve), torch.tensor(expected), rtol=0, atol=0.05)


# Documents of a window, and a sliding window.
ATTENDING = [
    ([13, 1, 18, 16], None),
    ([7, 36, 5], None),
    ([20, 28], 6),
    ([48], None),
    ([40, 8], None),
]


def attention_inputs(lengths: list[int]) -> tuple[Tensor, ...]:
    """q, k, v, and a gradient of what comes out."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(sum(lengths), n, 16, generator=generator) for n in (4, 2, 2, 4))


def attend_in_parts() -> list[dict[str, Tensor]]:
    """On each rank: outputs and gradients of its rows."""
    group, found = dist.group.WORLD, []
    assert group is not None
    for lengths, window in ATTENDING:
        cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
        attend = ContextParallel(cu_seqlens, group, window)
        q, k, v, grad = (x[attend.rows] for x in attention_inputs(lengths))
        own = [x.requires_grad_() for x in (q, k, v)]
        out = attend(0, *own)
        q, k, v = torch.autograd.grad(out, own, grad)
        tensors = {"out": out.detach(), "q": q, "k": k, "v": v, "positions": attend.positions}
        found.append(tensors | {"rows": attend.rows})
    return found


@pytest.mark.parametrize("n_ranks", [2, 3])
def test_ranks_that_share_a_window_attend_as_one(n_ranks: int):
    ranks = run_ranks(n_ranks, attend_in_parts)
    for (lengths, window), parts in zip(ATTENDING, zip(*ranks, strict=True), strict=True):
        attend = Packed.of(*lengths, window=window)
        *inputs, grad = attention_inputs(lengths)
        inputs = [x.requires_grad_() for x in inputs]
        out = attend(0, *inputs)
        expected = dict(zip("qkv", torch.autograd.grad(out, inputs, grad), strict=True))
        expected |= {"out": out.detach(), "positions": attend.positions}
        assert sorted(torch.cat([part["rows"] for part in parts]).tolist()) == list(range(48))
        for part in parts:
            rows = part.pop("rows")
            for name, tensor in part.items():
                torch.testing.assert_close(tensor, expected[name][rows], rtol=1e-5, atol=2e-6)


def refusals() -> list[str]:
    messages = []

    def refuse(call: Any) -> None:
        with pytest.raises(InvalidRequest) as error:
            call()
        messages.append(str(error.value))

    refuse(lambda: make_mesh("cpu", data_parallel_shard=2, tensor_parallel=2))
    refuse(lambda: make_mesh("cpu", tensor_parallel=3))
    tensor = make_mesh("cpu", tensor_parallel=2)
    odd = replace(CONFIG, n_heads=3, n_kv_heads=3, vocab_size=321)
    refuse(lambda: shard_(Transformer(odd), tensor))
    narrow = Transformer(PRESETS["tiny"])
    prepare_qat_(narrow, FORMATS["int8"])
    refuse(lambda: shard_(narrow, tensor))
    codes = Transformer(CONFIG)
    quantize_(codes, FORMATS["fp8"])
    refuse(lambda: shard_(codes, tensor))
    refuse(lambda: share(tensor, torch.tensor([0, 9]).int(), 9))
    refuse(lambda: share(make_mesh("cpu", context_parallel=2), torch.tensor([0, 6]).int(), 6))
    return messages


def test_what_does_not_divide_is_refused_in_one_line():
    (messages, again) = run_ranks(2, refusals)
    assert messages == again == [
        "data_parallel_replicate 1 x data_parallel_shard 2 x context_parallel 1 x "
        "tensor_parallel 2 = 4 ranks, but there are 2",
        "data_parallel_replicate 1 x data_parallel_shard 1 x context_parallel 1 x "
        "tensor_parallel 3 = 3 ranks, but there are 2",
        "tensor_parallel 2 does not divide n_heads, which is 3; n_kv_heads, which is 3; "
        "vocab_size, which is 321",
        "tensor_parallel 2 does not divide the 96 inputs of feed_forward.w2 into groups of 32 with "
        "one scale",
        "tensor_parallel does not go with weights that are stored in codes",
        "9 tokens do not divide by tensor_parallel 2",
        "6 tokens do not divide by tensor_parallel 1 and twice context_parallel 2",
    ]  # fmt: skip


def test_without_ranks_a_model_is_as_it_was():
    assert make_mesh("cpu") is None
    with pytest.raises(InvalidRequest, match="= 2 ranks, but there are 1"):
        make_mesh("cpu", context_parallel=2)
    expected = train(None, build())
    model = build()
    shard_(model, None, activation_checkpointing=True)
    curve, weights = train(None, model)
    assert curve == expected[0]
    assert all(torch.equal(weights[name], expected[1][name]) for name in weights)
    assert not any(isinstance(weight, DTensor) for weight in model.parameters())


def adapt_codes() -> Curve:
    mesh, model = make_mesh("cpu"), Transformer(CONFIG)
    torch.manual_seed(0)
    model = build()
    quantize_(model, FORMATS["fp8"])
    add_lora_(model, rank=4, alpha=8, generator=torch.Generator().manual_seed(1))
    shard_(model, mesh)
    return train(mesh, model)


def test_adapters_over_codes_learn_on_two_ranks_as_on_one():
    expected, _ = adapt_codes()
    for curve, _ in run_ranks(2, adapt_codes):
        torch.testing.assert_close(torch.tensor(curve), torch.tensor(expected), rtol=0, atol=1e-5)
