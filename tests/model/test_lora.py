"""What an adapter learned is what is merged, exported, read by PEFT, and served."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from opennemo.errors import CheckpointError, InvalidRequest
from opennemo.model.adapter_files import read_adapter
from opennemo.model.attention import Packed
from opennemo.model.checkpoint import load, save
from opennemo.model.export import merge
from opennemo.model.export import quantize as quantize_folder
from opennemo.model.formats import FORMATS
from opennemo.model.lora import (
    LINEAR,
    LoRALinear,
    LowRank,
    adapted,
    add_lora_,
    load_adapter,
    lora_disabled,
    merge_lora_,
    save_adapter,
    start_from_,
)
from opennemo.model.quantization import QuantizedLinear, prepare_qat_, quantize_
from opennemo.model.transformer import PRESETS, ModelConfig, Transformer

# Widths that fill no group of 32 and no byte of two codes.
ODD = ModelConfig(
    dim=35, n_layers=2, n_heads=3, n_kv_heads=1, head_dim=14, hidden_dim=45, vocab_size=64
)
TOKENS = torch.arange(40) * 7 % 64


def tiny(config: ModelConfig = PRESETS["tiny"]) -> Transformer:
    torch.manual_seed(0)
    return Transformer(config)


def hidden(model: Transformer) -> Tensor:
    return model(TOKENS, Packed.of(25, 15))


def loss(model: Transformer) -> Tensor:
    out = hidden(model)
    return (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()


def low_rank(model: Transformer, path: str) -> LowRank:
    found = model.get_submodule(f"{path}.low_rank")
    assert isinstance(found, LowRank)
    return found


def with_lora(model: Transformer, **options) -> Transformer:
    """The model with an adapter that does something: B is not zero."""
    options = {"rank": 4, "alpha": 8.0, "generator": torch.Generator().manual_seed(1)} | options
    add_lora_(model, **options)
    for name, parameter in model.named_parameters():
        if name.endswith(".b"):
            torch.nn.init.normal_(parameter, std=0.2, generator=options["generator"])
    return model


def quantized(format: str, config: ModelConfig = PRESETS["tiny"]) -> Transformer:
    model = tiny(config)
    largest = dict.fromkeys(
        (p for p, m in model.named_modules() if "layers" in p and hasattr(m, "weight")), 2.0
    )
    quantize_(model, FORMATS[format], largest)
    return model


@pytest.mark.parametrize("format", [None, *FORMATS])
def test_a_new_adapter_changes_nothing_and_alone_learns(format: str | None):
    model = tiny() if format is None else quantized(format)
    before = hidden(model).detach()
    generator = torch.Generator().manual_seed(0)
    add_lora_(model, rank=3, alpha=6, layers=("wq", "w2"), generator=generator)
    assert torch.equal(hidden(model), before)
    loss(model).backward()
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(learning) == 2 * 2 * model.config.n_layers
    assert all(".wq.low_rank." in name or ".w2.low_rank." in name for name in learning)
    for name, parameter in model.named_parameters():
        # At first B is zero, and only B has a gradient.
        has_gradient = parameter.grad is not None and bool(parameter.grad.any())
        assert has_gradient == name.endswith(".b"), name


def test_a_starts_as_in_peft():
    model = tiny()
    add_lora_(model, rank=8, alpha=16, generator=torch.Generator().manual_seed(3))
    a = low_rank(model, "layers.1.feed_forward.w2").a.detach()
    expected = torch.empty(8, 96)
    bound = 96**-0.5
    assert a.shape == expected.shape and a.abs().max() <= bound and a.std() > bound / 2
    again = tiny()
    add_lora_(again, rank=8, alpha=16, generator=torch.Generator().manual_seed(3))
    assert torch.equal(low_rank(again, "layers.1.feed_forward.w2").a, a)


@pytest.mark.parametrize("config", [PRESETS["tiny"], ODD], ids=["tiny", "odd"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_stored_layer_has_the_gradient_of_the_weights_it_stands_for(name, config):
    format, model = FORMATS[name], quantized(name, config)
    for path in ("layers.0.attention.wq", "layers.1.feed_forward.w2"):
        linear = model.get_submodule(path)
        assert isinstance(linear, QuantizedLinear)
        plain = tiny(config).get_parameter(f"{path}.weight").detach()
        mine, theirs = (torch.randn(9, plain.shape[1]).requires_grad_() for _ in range(2))
        theirs.data = mine.detach().clone()
        layer = with_lora(quantized(name, config)).get_submodule(path)
        assert isinstance(layer, LoRALinear)
        tensors = linear.tensors
        scale = tensors["scale"] if format.weights.share == "tensor" else None
        expected = format.fake_linear(theirs, plain, scale, tensors.get("input_scale"))
        low = layer.low_rank
        expected = expected + low.scale * (theirs @ low.a.T) @ low.b.T
        out = layer(mine)
        torch.testing.assert_close(out, expected)
        grad = torch.randn_like(out)
        out.backward(grad)
        expected.backward(grad)
        assert mine.grad is not None and theirs.grad is not None
        torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("format", ["int8", "fp8", "int4"])
def test_over_codes_no_weight_is_kept_in_memory(format: str):
    model = with_lora(quantized(format))
    n_bytes = sum(t.numel() * t.element_size() for t in model.layers.state_dict().values())
    adapters = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    norms = sum(p.numel() * 4 for n, p in model.layers.named_parameters() if "norm" in n)
    n_weights = sum(p.numel() for n, p in tiny().layers.named_parameters() if "norm" not in n)
    scales = sum(b.numel() * 4 for n, b in model.named_buffers() if n.endswith("scale"))
    codes = n_weights // 2 if format == "int4" else n_weights
    assert n_bytes == codes + scales + adapters + norms
    shapes = []
    note = lambda tensor: shapes.append(tuple(tensor.shape)) or tensor  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        total = loss(model)
    total.backward()
    weights = {tuple(p.shape) for n, p in tiny().layers.named_parameters() if p.dim() == 2}
    assert shapes and not weights & set(shapes) and not {s[::-1] for s in weights} & set(shapes)


@pytest.mark.parametrize("config", [PRESETS["tiny"], ODD], ids=["tiny", "odd"])
@pytest.mark.parametrize("name", FORMATS)
def test_learned_inside_rounding_is_exported_bit_for_bit(name: str, config: ModelConfig):
    model = with_lora(tiny(config), format=FORMATS[name])
    learning = [p for p in model.parameters() if p.requires_grad]
    assert len(learning) == 2 * 7 * config.n_layers
    frozen = model.get_parameter("layers.0.attention.wq.base")
    kept = frozen.detach().clone()
    optimizer = torch.optim.SGD(learning, lr=0.005)
    before = hidden(model).detach()
    loss(model).backward()
    optimizer.step()
    assert torch.equal(frozen, kept)
    model.eval()
    trained = hidden(model).detach()
    assert not torch.equal(trained, before)
    unmerged = copy.deepcopy(model)
    merge_lora_(model)
    assert torch.equal(hidden(model), trained)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in tiny().named_parameters()]
    for net in (model, unmerged):
        quantize_(net, FORMATS[name])
        assert torch.equal(hidden(net), trained)


def test_a_model_that_rounds_already_takes_an_adapter_inside():
    first, second = tiny(), tiny()
    prepare_qat_(second, FORMATS["fp8"])
    assert torch.equal(
        hidden(with_lora(first, format=FORMATS["fp8"])).detach(), hidden(with_lora(second))
    )
    with pytest.raises(InvalidRequest, match=r"lora\.dropout"):
        with_lora(tiny(), format=FORMATS["fp8"], dropout=0.1)


@pytest.mark.parametrize("format", [None, "int8", "int4", "fp8-static"])
def test_merged_is_unmerged(format: str | None):
    model = with_lora(tiny() if format is None else quantized(format, ODD))
    expected = hidden(model).detach()
    merge_lora_(model)
    found = hidden(model)
    if format is None:
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    else:  # the inputs are not rounded any longer
        assert (found - expected).norm() < 0.1 * expected.norm()
    assert dict(model.named_parameters()).keys() == dict(tiny().named_parameters()).keys()


def test_disabled_is_the_base_and_comes_back():
    for options in ({}, {"format": FORMATS["int8"]}):
        base = tiny()
        if options:
            prepare_qat_(base, FORMATS["int8"])
        model = with_lora(tiny(), **options)
        adapted_output = hidden(model)
        with pytest.raises(RuntimeError), lora_disabled(model):
            assert torch.equal(hidden(model), hidden(base))
            raise RuntimeError
        assert torch.equal(hidden(model), adapted_output)


@pytest.mark.parametrize("rounded", [False, True])
def test_disabled_is_the_adapter_that_a_run_began_with_if_it_is_kept(tmp_path, rounded: bool):
    save_adapter(with_lora(tiny()), tmp_path, base_model_name="a/b")
    model = tiny()
    if rounded:
        prepare_qat_(model, FORMATS["int8"])
    with_lora(model, dropout=0 if rounded else 0.5)
    start_from_(model, read_adapter(tmp_path, model.config), keep=True)
    at_first = hidden(model.eval())
    names = model.state_dict().keys()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".a", ".b")):
                parameter.mul_(2)
    assert not torch.equal(hidden(model), at_first)
    with lora_disabled(model.train()):
        assert torch.equal(hidden(model), at_first)
    assert not any("first" in name for name in names)


def test_dropout_is_for_learning_only():
    model = with_lora(tiny(), dropout=0.5)
    torch.manual_seed(0)
    assert not torch.equal(hidden(model), hidden(model))
    model.eval()
    assert torch.equal(hidden(model), hidden(model))


def test_a_saved_adapter_is_served_as_it_was_learned(tmp_path):
    model = with_lora(tiny(), layers=("wq", "wk", "w2"))
    save_adapter(model, tmp_path / "adapter", base_model_name="a/b")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "k_proj", "down_proj"]
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    weights = read_adapter(tmp_path / "adapter", model.config)
    assert len(weights) == 6
    for path, (scale, a, b) in weights.items():
        assert scale == 2
        assert torch.equal(a, low_rank(model, path).a) and torch.equal(b, low_rank(model, path).b)
    base = tiny().requires_grad_(False)
    adapter = load_adapter(tmp_path / "adapter", base)
    with adapted(base, [(adapter, torch.arange(len(TOKENS)))]):
        torch.testing.assert_close(hidden(base), hidden(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rounded", [False, True])
def test_peft_reads_what_was_learned(tmp_path, rounded: bool):
    peft = pytest.importorskip("peft", reason="the package peft is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = PRESETS["tiny"]
    save(tiny(), tmp_path / "base")
    model = with_lora(tiny(), **({"format": FORMATS["fp32"]} if rounded else {}))
    save_adapter(model, tmp_path / "adapter", base_model_name="base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = theirs(TOKENS[None]).logits[0]
        ours = model.output(model(TOKENS, Packed.of(len(TOKENS))))
        base = tiny().output(tiny()(TOKENS, Packed.of(len(TOKENS))))
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    assert (base - expected).abs().max() > 0.1
    # And PEFT writes what is read here.
    theirs.save_pretrained(tmp_path / "again")
    again = read_adapter(tmp_path / "again", config)
    assert {scale for scale, _, _ in again.values()} == {2}
    assert len(again) == 7 * config.n_layers


@pytest.mark.parametrize("layout", ["hf", "mistral"])
def test_folding_into_a_folder_is_merging_in_memory(tmp_path, layout):
    save(tiny(), tmp_path / "base", layout=layout)
    model = with_lora(tiny())
    save_adapter(model, tmp_path / "adapter", base_model_name="base")
    done = []
    merge(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "merged",
        progress=lambda *bytes: done.append(bytes),
    )  # fmt: skip
    merge_lora_(model)
    found = load(tmp_path / "merged")
    for name, weight in model.named_parameters():
        assert torch.equal(found.get_parameter(name), weight), name
    assert done[-1][0] == done[-1][1]
    assert (tmp_path / "merged" / "params.json").exists() == (layout == "mistral")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "half", dtype=torch.bfloat16)
    half = load(tmp_path / "half").get_parameter("layers.1.feed_forward.w2.weight")
    assert torch.equal(half, model.get_parameter("layers.1.feed_forward.w2.weight").bfloat16())


def test_what_cannot_be_is_refused(tmp_path):
    for layers, message in (
        (("wq", "wz"), r"lora\.layers: wz; allowed are"),
        ((), r"lora\.layers: none"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            with_lora(tiny(), layers=layers)
    model = with_lora(tiny())
    save(tiny(), tmp_path / "base")
    save_adapter(model, tmp_path / "adapter", base_model_name="base")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_adapter(model, tmp_path / "adapter", base_model_name="base")
    quantize_folder(tmp_path / "base", tmp_path / "int8", format="int8")
    with pytest.raises(CheckpointError, match="is stored as int8, and the sum"):
        merge(tmp_path / "int8", tmp_path / "adapter", tmp_path / "out")
    save(tiny(ODD), tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"layers\.0\.feed_forward\.w2: A and B are"):
        merge(tmp_path / "other", tmp_path / "adapter", tmp_path / "out")
    assert set(LINEAR) == {"wq", "wk", "wv", "wo", "w1", "w2", "w3"}


def saved_by_peft(tmp_path, **settings) -> tuple[torch.Tensor, torch.Tensor]:
    """An adapter with random weights: logits by PEFT from its files, and without it."""
    peft = pytest.importorskip("peft", reason="the package peft is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    save(tiny(), tmp_path / "base")
    read = transformers.AutoModelForCausalLM.from_pretrained
    config = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(read(tmp_path / "base"), peft.LoraConfig(**(config | settings)))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        plain = read(tmp_path / "base")(TOKENS[None]).logits[0]
        theirs = peft.PeftModel.from_pretrained(read(tmp_path / "base"), tmp_path / "adapter")
        return theirs.eval()(TOKENS[None]).logits[0], plain


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True, "lora_alpha": 3},
        {"rank_pattern": {"down_proj": 2, r".*\.0\.self_attn\.q_proj": 6}},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5}, "use_rslora": True},
        {"alpha_pattern": {"layers.1.mlp.down_proj": 30}},
        {"layers_to_transform": [1]},
        {"target_modules": "all-linear", "exclude_modules": ["k_proj", "lm_head"]},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": False, "lora_dropout": 0.5},
    ],
)
def test_settings_of_peft_give_what_peft_computes(tmp_path, settings: dict):
    expected, plain = saved_by_peft(tmp_path, **settings)
    base = load(tmp_path / "base")
    adapter = load_adapter(tmp_path / "adapter", base)
    with torch.no_grad(), adapted(base, [(adapter, torch.arange(len(TOKENS)))]):
        ours = base.output(base(TOKENS, Packed.of(len(TOKENS))))
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    assert (plain - expected).abs().max() > 0.01
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    with torch.no_grad():
        merged = load(tmp_path / "merged")
        ours = merged.output(merged(TOKENS, Packed.of(len(TOKENS))))
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("way", ["as plain LoRA", "with the base weights"])
def test_adapters_that_began_in_the_base_weights(init: str, way: str, tmp_path):
    """As PEFT saves them for others: the difference to the beginning, or the base of training."""
    peft = pytest.importorskip("peft", reason="the package peft is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    base = tmp_path / "base"
    save(tiny(), base)
    read = transformers.AutoModelForCausalLM.from_pretrained
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=init
    )
    model = peft.get_peft_model(read(base), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    with torch.no_grad():
        expected = model.eval()(TOKENS[None]).logits[0]
    if way == "as plain LoRA":
        model.peft_config["default"].init_lora_weights = init
        initial = str(tmp_path / "initial")
        model.save_pretrained(
            tmp_path / "adapter", path_initial_model_for_weight_conversion=initial
        )
    else:
        model.save_pretrained(tmp_path / "adapter")
        base = tmp_path / "residual"
        model.unload().save_pretrained(base)
    ours = load(base)
    adapter = load_adapter(tmp_path / "adapter", ours)
    with torch.no_grad(), adapted(ours, [(adapter, torch.arange(len(TOKENS)))]):
        found = ours.output(ours(TOKENS, Packed.of(len(TOKENS))))
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"init_lora_weights": "OLoRA"}, "init_lora_weights is 'OLoRA'"),
        ({"init_lora_weights": "corda"}, "init_lora_weights is 'corda'"),
        ({"init_lora_weights": "loftq", "loftq_config": {"bits": 4}}, "is 'loftq', which also"),
        ({"init_lora_weights": "tomorrow's"}, "init_lora_weights is .tomorrow's., not a bool or"),
        ({"alora_invocation_tokens": [7, 8]}, r"alora_invocation_tokens is \[7, 8\]"),
        ({"use_qalora": True}, "use_qalora is True"),
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"target_parameters": ["experts.w"]}, "target_parameters"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"of_a_later_version": 0.5}, "of_a_later_version is 0.5, which is not supported"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\] is 0"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern '\\('"),
        ({"rank_pattern": [1]}, "rank_pattern is"),
    ],
)
def test_settings_that_change_the_result_are_refused_by_name(tmp_path, settings, message):
    save_adapter(with_lora(tiny()), tmp_path, base_model_name="base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    empty = {"use_dora": False, "of_a_later_version": None, "another": [], "loftq_config": {}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | empty))
    assert read_adapter(tmp_path, PRESETS["tiny"])
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | settings))
    with pytest.raises(CheckpointError, match=message):
        read_adapter(tmp_path, PRESETS["tiny"])


def test_what_mistral_finetune_leaves_behind(tmp_path):
    model, config = with_lora(tiny(), layers=("wq", "w2")), PRESETS["tiny"]
    save(tiny(), tmp_path / "base", layout="mistral")
    params = json.loads((tmp_path / "base" / "params.json").read_text())
    lora = {"enable": True, "rank": 4, "dropout": 0.0, "scaling": 2.0}
    tensors = {}
    for path in (f"layers.{i}.{name}" for i in range(config.n_layers)
                 for name in ("attention.wq", "feed_forward.w2")):  # fmt: skip
        part = low_rank(model, path)
        tensors |= {f"{path}.lora_A.weight": part.a.data, f"{path}.lora_B.weight": part.b.data}
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "lora.safetensors")
    with pytest.raises(CheckpointError, match=r"params\.json"):
        read_adapter(tmp_path / "adapter", config)
    (tmp_path / "adapter" / "params.json").write_text(json.dumps(params | {"lora": lora}))
    with pytest.raises(CheckpointError, match="adapter: an adapter; `opennemo merge`"):
        load(tmp_path / "adapter")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merge_lora_(model)
    # Merged weights keep the settings of the adapter that they learned with.
    for settings in ({"lora": lora, "moe": None}, {"lora": {**lora, "enable": False}}):
        (tmp_path / "merged" / "params.json").write_text(json.dumps(params | settings))
        ours = load(tmp_path / "merged")
        for name, weight in model.named_parameters():
            assert torch.equal(ours.get_parameter(name), weight), name
    wrong = {"layers.0.attention.wz.lora_A.weight": torch.zeros(4, 4)}
    save_file(wrong, tmp_path / "adapter" / "lora.safetensors")
    with pytest.raises(CheckpointError, match="not a part of an adapter"):
        read_adapter(tmp_path / "adapter", config)
