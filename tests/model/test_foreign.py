"""Folders that other tools quantised load as the weights of their codes, or are refused by name.

The reference for compressed-tensors is that package. AWQ, GPTQ and bitsandbytes have no library for
a CPU, so their files are written here number by number, as their published packers do.
"""

import json
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opennemo.errors import CheckpointError
from opennemo.model.attention import Packed
from opennemo.model.checkpoint import convert, load, open_checkpoint
from opennemo.model.formats import FORMATS
from tests import tiny

VOCABULARY = 300
WEIGHTS = tiny.weights(VOCABULARY, std=0.1)
IDS = torch.arange(30) * 7 % VOCABULARY
Made = tuple[dict[str, Tensor], Tensor]  # the tensors that stand for a matrix, and the weights


def folder(
    path: Path, make: Callable[[Tensor], Made], config: Any, skip: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """Write the tiny model with its matrices stored as `make` says: the weights it stands for."""
    stored, exact = {}, dict(WEIGHTS)
    for name, weight in WEIGHTS.items():
        if name in tiny.LINEAR and not any(part in name for part in skip):
            parts, exact[name] = make(weight)
            stored |= {name.removesuffix("weight") + part: t for part, t in parts.items()}
        else:
            stored[name] = weight
    tiny.write(path, stored, VOCABULARY, quantization_config=config)
    return exact


@torch.no_grad()
def logits(path: Path) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load(path)
    return model.output(model(IDS, Packed.of(30)))


def assert_stands_for(path: Path, exact: Mapping[str, Tensor], tmp_path: Path) -> None:
    tiny.write(tmp_path / "exact", exact)
    torch.testing.assert_close(logits(path), logits(tmp_path / "exact"), atol=1e-4, rtol=1e-4)


def arguments(bits: int, kind: str = "int", strategy: str = "channel", **more: Any) -> dict:
    return {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True} | more


def compressed(weights: Any, inputs: Any = None, **more: Any) -> dict:
    """The entry of config.json that llm-compressor writes."""
    kind = "int" if weights["type"] == "int" else "float"
    format = "pack-quantized" if weights["num_bits"] < 8 else f"{kind}-quantized"
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    group |= {"output_activations": None, "format": format}
    return {
        "quant_method": "compressed-tensors", "format": format, "ignore": ["lm_head"],
        "quantization_status": "compressed", "config_groups": {"group_0": group},
        "kv_cache_scheme": None, "sparsity_config": {}, "transform_config": {}, "version": "0.12",
        **more,
    }  # fmt: skip


def by_compressed_tensors(weights: dict, packed: bool) -> Callable[[Tensor], Made]:
    """Rounds as the package does, zero points included."""
    quantization = pytest.importorskip("compressed_tensors.quantization", reason="not installed")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    given = quantization.QuantizationArgs(**weights)

    def make(weight: Tensor) -> Made:
        rows, columns = weight.shape
        size = {"group": weights.get("group_size"), "channel": columns}.get(weights["strategy"])
        shape, bits = (rows, columns), weights["num_bits"]
        if weights["strategy"] == "block":
            height, width = weights["block_structure"]
            blocks = weight.unfold(0, height, height).unfold(1, width, width)
        elif size is None:
            blocks = weight.view(1, 1, -1)
        else:
            blocks = weight.unfold(1, size, size)
        inner = tuple(range(2, blocks.dim()))
        low, high = blocks.amin(inner), blocks.amax(inner)
        limit = 448 if weights["type"] == "float" else 2 ** (bits - 1) - 1
        zero = torch.zeros_like(low, dtype=torch.int8)
        if weights["symmetric"]:
            scale = torch.maximum(low.abs(), high.abs()) / limit
        else:
            scale = (high - low) / (2**bits - 1)
            zero = (-(2 ** (bits - 1)) - low / scale).round().clamp(-(2 ** (bits - 1)), limit)
            zero = zero.to(torch.int8)
        scale = scale.view(1) if weights["strategy"] == "tensor" else scale
        dtype = torch.float8_e4m3fn if weights["type"] == "float" else torch.int8
        given_zero = None if weights["symmetric"] else zero
        codes = forward.quantize(weight, scale, given_zero, given, dtype=dtype)
        exact = forward.dequantize(codes, scale, given_zero, given)
        parts = {"weight_scale": scale}
        if packed:
            parts |= {"weight_packed": helpers.pack_to_int32(codes, bits)}
            parts |= {"weight_shape": torch.tensor(shape)}
            if not weights["symmetric"]:
                parts["weight_zero_point"] = helpers.pack_to_int32(zero, bits, packed_dim=0)
        else:
            parts |= {"weight": codes}
            if not weights["symmetric"]:
                parts["weight_zero_point"] = zero
        return {name: tensor.contiguous() for name, tensor in parts.items()}, exact

    return make


TOKEN = arguments(8, strategy="token", dynamic=True)


@pytest.mark.parametrize(
    ("weights", "inputs", "format"),
    [
        (arguments(4, strategy="group", group_size=64), None, None),
        (arguments(4, strategy="group", group_size=64, symmetric=False), None, None),
        (arguments(4, strategy="group", group_size=32, symmetric=False), None, None),
        (arguments(4, strategy="group", group_size=32), None, "int4"),
        (arguments(4, strategy="channel"), None, None),
        (arguments(8, strategy="channel"), TOKEN, "w8a8"),
        (arguments(8, strategy="channel", symmetric=False), TOKEN, None),
        (arguments(8, strategy="tensor"), TOKEN, None),
        (arguments(8, "float", "channel", dynamic=False), TOKEN | {"type": "float"}, "fp8-dynamic"),
        (arguments(8, "float", "tensor", dynamic=False), TOKEN | {"type": "float"}, None),
        (arguments(8, "float", "block", block_structure=[32, 64]), TOKEN | {"type": "float"}, None),
    ],
)  # fmt: skip
def test_compressed_tensors(tmp_path: Path, weights: dict, inputs: dict, format: str | None):
    make = by_compressed_tensors(weights, packed=weights["num_bits"] < 8)
    exact = folder(tmp_path / "m", make, compressed(weights, inputs))
    assert open_checkpoint(tmp_path / "m").format == format
    if format is None:
        assert_stands_for(tmp_path / "m", exact, tmp_path)
        # And it is converted like any other folder.
        convert(tmp_path / "m", tmp_path / "mistral", to="mistral")
        assert torch.equal(logits(tmp_path / "m"), logits(tmp_path / "mistral"))


FP8 = arguments(8, "float", "channel", dynamic=False)


@pytest.mark.parametrize(
    ("ignore", "skip"),
    [
        (["re:.*lm_head"], ()),
        (["lm_head", "re:vision_tower.*", "a.module.of.another.model"], ()),
        ([], ()),
        (["lm_head", r"re:.*layers\.0\..*"], (".layers.0.",)),
        (["lm_head", *(name.removesuffix(".weight") for name in tiny.LINEAR[:7])], (".layers.0.",)),
        (["lm_head", "re:.*down_proj"], ("down_proj",)),
    ],
)
def test_what_is_ignored_stays_as_it_was(tmp_path: Path, ignore: list[str], skip: tuple[str, ...]):
    make = by_compressed_tensors(FP8, packed=False)
    inputs = TOKEN | {"type": "float"}
    exact = folder(tmp_path / "m", make, compressed(FP8, inputs, ignore=ignore), skip)
    assert open_checkpoint(tmp_path / "m").format == (None if skip else "fp8-dynamic")
    if skip:
        assert_stands_for(tmp_path / "m", exact, tmp_path)


@pytest.mark.parametrize(
    ("weights", "limit"), [(FP8, 448.0), (arguments(8, strategy="channel"), 127.0)]
)
def test_inputs_are_rounded_as_other_engines_do_it(weights: dict, limit: float, tmp_path: Path):
    """By largest / limit a token, and not by a power of two or in groups, as in our own folders."""
    inputs = TOKEN | {"type": weights["type"]}
    folder(tmp_path / "m", by_compressed_tensors(weights, False), compressed(weights, inputs))
    layer = load(tmp_path / "m").get_submodule("layers.0.feed_forward.w1")
    x = torch.randn(5, tiny.DIM, generator=torch.Generator().manual_seed(2))
    step = x.abs().amax(-1, keepdim=True) / limit
    ratio = x / step
    kind = weights["type"] == "float"
    codes = ratio.to(torch.float8_e4m3fn).float() if kind else ratio.round()
    own = open_checkpoint(tmp_path / "m").files
    name = "model.layers.0.mlp.gate_proj"
    scale = own.read(f"{name}.weight_scale").float().view(-1, 1)
    expected = (codes * step) @ (own.read(f"{name}.weight").float() * scale).T
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_scales_that_are_powers_of_two_are_those_of_a_folder_of_ours(tmp_path: Path):
    def make(weight: Tensor) -> Made:
        codes, scale = FORMATS["fp8"].weights.quantize(weight)
        return {"weight": codes, "weight_scale": scale}, codes.float() * scale

    folder(tmp_path / "m", make, compressed(FP8, TOKEN | {"type": "float"}))
    assert open_checkpoint(tmp_path / "m").format == "fp8"


@pytest.mark.parametrize("order", [list, reversed])
def test_every_group_of_a_config_is_read(order: Callable, tmp_path: Path):
    """A pattern counts before the class, in whatever order the groups stand."""
    four = arguments(4, strategy="group", group_size=32, symmetric=False)
    config = compressed(FP8, TOKEN | {"type": "float"})
    groups = config["config_groups"]
    groups["group_0"]["targets"] = ["Linear"]
    groups["other"] = {"targets": ["re:.*mlp.*"], "weights": four, "format": "pack-quantized"}
    config |= {"config_groups": dict(order(groups.items())), "format": "mixed-precision"}
    eight = by_compressed_tensors(FP8, packed=False)
    packed = by_compressed_tensors(four, packed=True)
    exact = folder(tmp_path / "m", eight, None)
    stored, exact = {}, dict(WEIGHTS)
    for name, weight in WEIGHTS.items():
        if name not in tiny.LINEAR:
            stored[name] = weight
            continue
        parts, exact[name] = (packed if ".mlp." in name else eight)(weight)
        stored |= {name.removesuffix("weight") + part: tensor for part, tensor in parts.items()}
    tiny.write(tmp_path / "m", stored, VOCABULARY, quantization_config=config)
    assert_stands_for(tmp_path / "m", exact, tmp_path)


def fp8(share: str, inverse: bool = False) -> Callable[[Tensor], Made]:
    def make(weight: Tensor) -> Made:
        if share == "block":
            blocks = weight.unfold(0, 32, 32).unfold(1, 64, 64)
            scale = blocks.abs().amax((2, 3)) / 448
            spread = scale.repeat_interleave(32, 0).repeat_interleave(64, 1)
        else:
            spread = scale = weight.abs().max() / 448
        codes = (weight / spread).to(torch.float8_e4m3fn)
        parts = {"weight": codes, "weight_scale_inv" if inverse else "weight_scale": scale}
        return parts, codes.float() * spread

    return make


@pytest.mark.parametrize(
    ("share", "inverse", "config"),
    [
        ("tensor", False, {"activation_scheme": "dynamic", "ignored_layers": ["lm_head"]}),
        ("tensor", True, {"activation_scheme": "static", "modules_to_not_convert": ["lm_head"]}),
        ("block", True, {"activation_scheme": "dynamic", "weight_block_size": [32, 64],
                         "fmt": "e4m3"}),
    ],
)  # fmt: skip
def test_fp8_as_autofp8_and_transformers_write_it(tmp_path: Path, share, inverse, config):
    exact = folder(tmp_path / "m", fp8(share, inverse), {"quant_method": "fp8", **config})
    assert_stands_for(tmp_path / "m", exact, tmp_path)


@pytest.mark.parametrize("beside", [False, True])
def test_fp8_as_modelopt_writes_it(tmp_path: Path, beside: bool):
    def make(weight: Tensor) -> Made:
        parts, exact = fp8("tensor")(weight)
        return parts | {"input_scale": torch.tensor(0.05)}, exact

    said = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    folder(tmp_path, make, None if beside else {"quant_method": "modelopt", **said})
    if beside:
        content = json.dumps({"producer": {"name": "modelopt"}, "quantization": said})
        (tmp_path / "hf_quant_config.json").write_text(content)
    assert open_checkpoint(tmp_path).format == "fp8-static"
    assert torch.cosine_similarity(logits(tmp_path).flatten(), plain(tmp_path), 0) > 0.99


def plain(tmp_path: Path) -> Tensor:
    return logits(tiny.write(tmp_path / "plain", WEIGHTS)).flatten()


def packed_along(codes: Tensor, bits: int, dim: int, order: list[int] | None = None) -> Tensor:
    """Codes to int32, one after the other from the lowest bits up, by a plain loop."""
    codes = codes if dim == 1 else codes.T
    n = 32 // bits
    words = torch.zeros(codes.shape[0], codes.shape[1] // n, dtype=torch.int64)
    for i in range(n):
        words |= (
            codes[:, [c * n + (order or range(n))[i] for c in range(words.shape[1])]] << i * bits
        )
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return (words if dim == 1 else words.T).contiguous()


def rounded(weight: Tensor, bits: int, size: int, groups: Tensor) -> tuple[Tensor, ...]:
    """Codes (O, D) without sign, scale and zero (O, G) by group of columns, and the weights."""
    n_groups = -(-weight.shape[1] // size)
    scale, zero = torch.zeros(2, len(weight), n_groups)
    for g in range(n_groups):
        low, high = weight[:, groups == g].aminmax(dim=1)
        scale[:, g] = ((high - low) / (2**bits - 1)).half().float()
        zero[:, g] = (-low / scale[:, g]).round().clamp(1, 2**bits - 1)
    codes = (weight / scale[:, groups] + zero[:, groups]).round().clamp(0, 2**bits - 1)
    return codes.long(), scale, zero.long(), scale[:, groups] * (codes - zero[:, groups])


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("version", [None, "gptq", "gptq_v2"])
def test_gptq(tmp_path: Path, bits: int, act_order: bool, version: str | None):
    def make(weight: Tensor) -> Made:
        groups = torch.arange(weight.shape[1]) // 32
        if act_order:
            groups = groups[torch.randperm(len(groups))]
        codes, scale, zero, exact = rounded(weight, bits, 32, groups)
        parts = {
            "qweight": packed_along(codes.T, bits, 0), "scales": scale.T.half().contiguous(),
            "qzeros": packed_along(zero.T - int(version != "gptq_v2"), bits, 1),
            "g_idx": groups.to(torch.int32),
        }  # fmt: skip
        return parts, exact

    config = {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": act_order}
    config |= {"sym": False, "damp_percent": 0.01, "lm_head": False, "dynamic": None}
    config |= {"checkpoint_format": version} if version else {}
    exact = folder(tmp_path / "m", make, config, skip=("layers.1.mlp.up_proj",))
    assert_stands_for(tmp_path / "m", exact, tmp_path)


@pytest.mark.parametrize("size", [32, -1])
def test_awq(tmp_path: Path, size: int):
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def make(weight: Tensor) -> Made:
        width = weight.shape[1] if size == -1 else size
        groups = torch.arange(weight.shape[1]) // width
        codes, scale, zero, exact = rounded(weight, 4, width, groups)
        parts = {
            "qweight": packed_along(codes.T, 4, 1, order), "scales": scale.T.half().contiguous(),
            "qzeros": packed_along(zero.T, 4, 1, order),
        }  # fmt: skip
        return parts, exact

    config = {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True}
    exact = folder(tmp_path / "m", make, config | {"version": "gemm"})
    assert_stands_for(tmp_path / "m", exact, tmp_path)


@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_in_four_bits(tmp_path: Path, nested: bool):
    table = torch.linspace(-1, 1, 16) ** 3

    def make(weight: Tensor) -> Made:
        blocks = weight.reshape(-1, 64)
        absmax = blocks.abs().amax(1)
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32"}
        state |= {"shape": list(weight.shape)}
        parts = {"weight.quant_map": table.clone()}
        if nested:
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.1}
            levels = torch.linspace(0, 1, 256)
            largest = (absmax - 0.1).abs().max().repeat(-(-len(absmax) // 256))
            bytes_ = ((absmax - 0.1).clamp(min=0) / largest[0] * 255).round().to(torch.uint8)
            absmax = levels[bytes_.long()] * largest[0] + 0.1
            parts |= {"weight.absmax": bytes_, "weight.nested_absmax": largest}
            parts |= {"weight.nested_quant_map": levels}
        else:
            parts |= {"weight.absmax": absmax}
        codes = ((blocks / absmax[:, None])[..., None] - table).abs().argmin(-1)
        pairs = codes.flatten().view(-1, 2)
        parts["weight"] = (pairs[:, :1] << 4 | pairs[:, 1:]).to(torch.uint8)
        text = json.dumps(state).encode()
        parts["weight.quant_state.bitsandbytes__nf4"] = torch.tensor([*text], dtype=torch.uint8)
        return parts, (table[codes] * absmax[:, None]).reshape(weight.shape)

    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    exact = folder(tmp_path / "m", make, config | {"bnb_4bit_use_double_quant": nested})
    assert_stands_for(tmp_path / "m", exact, tmp_path)


def test_bitsandbytes_in_eight_bits(tmp_path: Path):
    def make(weight: Tensor) -> Made:
        largest = weight.abs().amax(1)
        codes = (weight / largest[:, None] * 127).round().to(torch.int8)
        return {"weight": codes, "SCB": largest}, codes * (largest / 127)[:, None]

    config = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0}
    exact = folder(tmp_path / "m", make, config)
    assert_stands_for(tmp_path / "m", exact, tmp_path)


GROUP = compressed(FP8)["config_groups"]["group_0"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "exl2"}, "quant_method is 'exl2', .* only compressed-tensors"),
        ({"output_activations": TOKEN}, r"group_0\.output_activations is"),
        ({"format": "nvfp4-pack-quantized"}, "format is 'nvfp4-pack-quantized', not .* float-q"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config is .*24-bitmask"),
        ({"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}}, "transform_config"),
        ({"kv_cache_scheme": {"num_bits": 8, "type": "int"}}, "kv_cache_scheme is .*'int'"),
        ({"kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "attn_head"}}, "attn_he"),
        ({"of_a_later_version": True}, "of_a_later_version is True"),
        ({"weights": arguments(3)}, r"weights\.num_bits is 3, not supported, only 2 or 4 or 8"),
        ({"weights": arguments(8, strategy="tensor_group")}, "strategy is 'tensor_group'"),
        ({"weights": FP8 | {"dynamic": True}}, r"weights\.dynamic is True"),
        ({"weights": FP8 | {"of_later": 1}}, r"weights\.of_later is 1"),
        ({"weights": arguments(4, strategy="group")}, r"group_0\.weights is"),
        ({"weights": None, "input_activations": TOKEN}, "input_activations"),
        ({"ignore": ["re:("]}, r"ignore is 're:\('"),
        ({"ignore": "lm_head"}, "ignore is 'lm_head', .* a list of names"),
        ({"targets": [1]}, r"group_0\.targets is \[1\]"),
        ({"quant_method": "compressed-tensors", "config_groups": [1]}, "config_groups is"),
        ({"quant_method": "modelopt", "config_groups": {"a": {"weights": 1}}}, "weights is 1"),
        ({"quant_method": "fp8", "weight_block_size": "128"}, "weight_block_size is '128'"),
        ({"quant_method": "fp8", "activation_scheme": "token"}, "activation_scheme is 'token'"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo is 'NVFP4', .*only FP8"),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "INT8"}, "INT8"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 32}, "bits is 3, .* only 2 or 4 or 8"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size is 0"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {"-:.*": {}}}, "dynamic"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, "gptq, and no weight is stored"),
        ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"}, "'gemv'.*gemm"),
        ({"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "af4"}, "'af4', .* nf4 or fp4"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused_with_its_key_and_value(tmp_path, config, message):
    if "quant_method" not in config:
        base = compressed(FP8, TOKEN | {"type": "float"})
        group = base["config_groups"]["group_0"]
        in_group = {key: config[key] for key in config.keys() & (GROUP.keys() - {"format"})}
        base["config_groups"]["group_0"] = {**group, **in_group}
        config = base | {key: value for key, value in config.items() if key not in in_group}
        config["config_groups"]["group_0"].pop("format")
    folder(tmp_path, by_compressed_tensors(FP8, packed=False), config)
    with pytest.raises(CheckpointError, match=f"config.json: quantization_config.*{message}"):
        open_checkpoint(tmp_path)


def test_codes_scales_and_settings_that_do_not_fit(tmp_path: Path):
    make, config = (
        by_compressed_tensors(FP8, packed=False),
        compressed(arguments(8, strategy="tensor")),
    )
    folder(tmp_path / "a", make, config)
    with pytest.raises(CheckpointError, match=r"q_proj: weight \(128, 64\).* do not fit"):
        logits(tmp_path / "a")
    folder(tmp_path / "b", lambda w: ({"weight": make(w)[0]["weight"]}, w), config)
    with pytest.raises(CheckpointError, match=r"b: tensors missing: model.*weight_scale"):
        open_checkpoint(tmp_path / "b")
    folder(tmp_path / "c", lambda w: ({"weight": torch.zeros(8, 1, dtype=torch.uint8)}, w), None)
    with pytest.raises(CheckpointError, match=r"codes that the settings do not explain: .*uint8"):
        open_checkpoint(tmp_path / "c")


def test_it_says_that_weights_are_decoded(tmp_path: Path):
    config = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    folder(tmp_path, fp8("tensor"), config)
    said = re.escape(f"{tmp_path}/config.json: weights are decoded as they are read, and inputs")
    with pytest.warns(UserWarning, match=said):
        open_checkpoint(tmp_path)
