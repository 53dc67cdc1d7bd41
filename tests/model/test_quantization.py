"""What was learned in a format is what is exported in it, bit for bit."""

import copy

import pytest
import torch
from torch import Tensor, nn

from opennemo.model.attention import Packed, Paged
from opennemo.model.formats import BLOCKS, FORMATS, Format
from opennemo.model.pages import Pages
from opennemo.model.quantization import (
    FUSED,
    KVRounding,
    QuantizedLinear,
    calibration,
    fake_kv,
    observers,
    prepare_qat_,
    quantize_,
    set_qat_,
)
from opennemo.model.transformer import PRESETS, ModelConfig, Transformer

# Widths that fill no group of 32 and no byte of two codes.
ODD = ModelConfig(
    dim=35, n_layers=2, n_heads=3, n_kv_heads=1, head_dim=14, hidden_dim=45, vocab_size=64
)
TOKENS = torch.arange(40) * 7 % 64


def model(config: ModelConfig = PRESETS["tiny"], dtype: torch.dtype = torch.float32) -> Transformer:
    torch.manual_seed(0)
    return Transformer(config).to(dtype)


def hidden(net: Transformer) -> Tensor:
    return net(TOKENS, Packed.of(25, 15))


def calibrated(net: Transformer, format: Format) -> dict[str, float] | None:
    if not format.static:
        return None
    with calibration(net) as largest, torch.no_grad():
        hidden(net)
    return largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("config", [PRESETS["tiny"], ODD], ids=["tiny", "odd"])
@pytest.mark.parametrize("name", FORMATS)
def test_exporting_what_was_trained_changes_no_output(
    name: str, config: ModelConfig, dtype: torch.dtype
):
    format, net = FORMATS[name], model(config, dtype)
    prepare_qat_(net, format, calibrated(net, format))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    before = hidden(net).detach()
    hidden(net).square().sum().backward()
    optimizer.step()
    trained = hidden(net).detach()
    assert not torch.equal(before, trained)
    quantize_(net, format)
    assert torch.equal(hidden(net), trained)
    assert sum(isinstance(m, QuantizedLinear) for m in net.modules()) == 7 * config.n_layers


@pytest.mark.parametrize("name", BLOCKS)
def test_what_learns_in_blocks_is_exported_in_the_same_codes(name: str):
    config = ModelConfig(
        dim=256, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=128, hidden_dim=256, vocab_size=64
    )
    net = model(config)
    prepare_qat_(net, BLOCKS[name])
    before = hidden(net).detach()
    hidden(net).square().sum().backward()
    torch.optim.SGD(net.parameters(), lr=0.05).step()
    after = hidden(net).detach()
    assert not torch.equal(after, before)
    exported = copy.deepcopy(net)
    quantize_(exported, BLOCKS[name])
    assert torch.equal(hidden(exported), after)


def test_layers_that_engines_fuse_share_a_scale():
    net = model()
    quantize_(net, FORMATS["fp8-static"], calibrated(net, FORMATS["fp8-static"]))
    state = net.state_dict()
    for i in range(net.config.n_layers):
        for group, part in zip(FUSED, ("attention", "feed_forward"), strict=True):
            for scale in ("scale", "input_scale"):
                values = {float(state[f"layers.{i}.{part}.{name}.{scale}"]) for name in group}
                assert len(values) == 1


def test_a_static_format_refuses_to_guess_the_inputs():
    with pytest.raises(ValueError, match=r"layers\.0\..*calibrate"):
        quantize_(model(), FORMATS["fp8-static"])
    never_run = model()
    prepare_qat_(never_run, FORMATS["fp8-static"])
    with pytest.raises(ValueError, match="calibrate"):
        quantize_(never_run, FORMATS["fp8-static"])


def test_scales_follow_what_training_sees_until_they_are_told_to_stay():
    net = model()
    prepare_qat_(net, FORMATS["fp8-static"], kv=True)
    seen = observers(net)
    assert len(seen) == 7 * net.config.n_layers + 1
    attend = fake_kv(net, Packed.of(25, 15))
    net(TOKENS, attend)
    with calibration(plain := model()) as largest, torch.no_grad():
        hidden(plain)
    assert float(seen["layers.0.attention.wq.largest"]) == largest["layers.0.attention.wq"]
    kept = {name: tensor.clone() for name, tensor in seen.items()}
    assert all(tensor.all() for tensor in kept.values())
    net.get_parameter("layers.0.attention_norm.weight").data *= 8
    for still in (net.eval(), net.train()):
        set_qat_(net, observe=not still.training)
        still(TOKENS, attend)
        assert all(torch.equal(seen[name], kept[name]) for name in seen)
    set_qat_(net)
    net(TOKENS, attend)
    grown = float(seen["layers.0.attention.wq.largest"] / kept["layers.0.attention.wq.largest"])
    assert grown == pytest.approx(8, rel=1e-4)


def test_before_it_rounds_a_prepared_model_is_the_plain_one():
    net = model()
    prepare_qat_(net, FORMATS["fp8-static"], kv=True)
    set_qat_(net, rounds=False)
    assert torch.equal(net(TOKENS, fake_kv(net, Packed.of(25, 15))), hidden(model()))
    assert all(tensor.all() for tensor in observers(net).values())


def test_rounded_keys_and_values_are_those_of_a_cache_in_fp8():
    net = model()
    prepare_qat_(net, FORMATS["fp8"], kv=True)
    attend = fake_kv(net, Packed.of(25, 15))
    trained = net(TOKENS, attend)
    rounding = net.kv_rounding
    assert isinstance(rounding, KVRounding)
    pages = Pages.empty(net.config, 8, 16, "fp8", scale=rounding.scale)
    slots = torch.cat((torch.arange(25), 32 + torch.arange(15)))
    paged = Paged(
        pages, attend.positions, slots, torch.tensor([0, 25, 40]).int(), 25,
        torch.tensor([25, 15]).int(), torch.tensor([[0, 1], [2, 3]]).int(),
    )  # fmt: skip
    quantize_(net, FORMATS["fp8"])
    assert torch.equal(net(TOKENS, paged), trained)


def test_only_the_head_that_is_named_is_rounded():
    net = model()
    quantize_(net, FORMATS["fp8"])
    assert isinstance(net.output, nn.Linear)
    tied = model(PRESETS["nano-60m"]).requires_grad_(False)
    embedding = tied.tok_embeddings.weight.clone()
    quantize_(tied, FORMATS["int4"], head=FORMATS["int8"])
    assert isinstance(tied.output, QuantizedLinear) and tied.output.format is FORMATS["int8"]
    assert torch.equal(tied.tok_embeddings.weight, embedding)


def test_a_quantized_model_copies_and_saves_its_codes():
    net = model()
    quantize_(net, FORMATS["int8"], head=FORMATS["int8"])
    twin = copy.deepcopy(net)
    for tensor in twin.state_dict().values():
        tensor.zero_()
    twin.load_state_dict(net.state_dict())
    assert torch.equal(hidden(twin), hidden(net))
    assert net.state_dict()["layers.0.attention.wq.weight"].dtype == torch.int8
