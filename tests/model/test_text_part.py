"""Folders of vision models: their text model loads, equal to transformers'."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedModel,
)

from opennemo.errors import CheckpointError
from opennemo.model.attention import Packed
from opennemo.model.checkpoint import convert, load, save
from opennemo.model.transformer import Transformer

TEXT: dict[str, Any] = {
    "model_type": "mistral", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96, "vocab_size": 120,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 512, "sliding_window": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip
MINISTRAL_3 = TEXT | {
    "model_type": "ministral3", "tie_word_embeddings": True, "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "mscale": 1.0,
        "mscale_all_dim": 1.0, "original_max_position_embeddings": 32, "beta_fast": 32.0,
        "beta_slow": 1.0, "llama_4_scaling_beta": 0.1,
    },
}  # fmt: skip
VISION = {
    "model_type": "pixtral", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "head_dim": 16, "intermediate_size": 48, "image_size": 32, "patch_size": 16,
}  # fmt: skip
KINDS: dict[str, tuple[Any, Any, dict[str, Any], bool]] = {
    "small 3.1": (Mistral3ForConditionalGeneration, Mistral3Config, TEXT, False),
    "ministral 3": (Mistral3ForConditionalGeneration, Mistral3Config, MINISTRAL_3, True),
    "pixtral": (LlavaForConditionalGeneration, LlavaConfig, TEXT, False),
}
UNREAD = "vision tensors are not read"


def make(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    kind, config, text, tied = KINDS[name]
    settings = config(
        text_config=text, vision_config=VISION, tie_word_embeddings=tied, image_token_index=7
    )
    model = kind(settings).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() == 2 else 1.0)
    return model


@torch.no_grad()
def assert_equal(ours: Transformer, theirs: PreTrainedModel) -> None:
    tokens = torch.randint(8, 120, (100,))
    expected = theirs(tokens[None]).logits[0]
    found = ours.output(ours(tokens, Packed.of(100)))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", KINDS)
def test_the_text_model_of_a_folder_that_transformers_saved(name: str, tmp_path: Path):
    theirs = make(name)
    theirs.save_pretrained(tmp_path / "seeing")
    with pytest.warns(UserWarning, match=UNREAD):
        ours = load(tmp_path / "seeing")
    assert_equal(ours, theirs)
    with pytest.warns(UserWarning, match=UNREAD):
        convert(tmp_path / "seeing", tmp_path / "text", to="hf")
    assert_equal(load(tmp_path / "text"), theirs)


def test_both_ways_in_which_tensors_are_named(tmp_path: Path):
    theirs = make("small 3.1")
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    text = [name for name in tensors if "language_model" in name]
    assert text
    new = {}
    for name, tensor in tensors.items():
        own = name.removeprefix("language_model.").removeprefix("model.language_model.")
        own = own.removeprefix("model.")
        if name in text and own != "lm_head.weight":
            old_way = name.startswith("language_model.")
            own = f"model.language_model.{own}" if old_way else f"language_model.model.{own}"
        elif own == "lm_head.weight":
            own = own if name != own else f"language_model.{own}"
        else:
            own = name
        new[own] = tensor
    assert set(new) != set(tensors)
    save_file(new, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match=UNREAD):
        assert_equal(load(tmp_path), theirs)


@pytest.mark.parametrize(
    "parts",
    [
        {"vision_encoder": {"hidden_size": 1024}},
        {"multimodal": {"vision_encoder_args": {"hidden_size": 1024}}},
    ],
)
def test_mistral_s_own_layout(parts: dict[str, Any], tmp_path: Path):
    theirs = make("pixtral")
    theirs.save_pretrained(tmp_path / "hf")
    with pytest.warns(UserWarning, match=UNREAD):
        save(load(tmp_path / "hf"), tmp_path / "mistral", layout="mistral")
    weights = tmp_path / "mistral" / "consolidated.safetensors"
    more = {"vision_encoder.ln_pre.weight": torch.ones(4), "patch_merger.x": torch.ones(4)}
    save_file(load_file(weights) | more, weights)
    edit(tmp_path / "mistral" / "params.json", **parts)
    with pytest.warns(UserWarning, match=f"its 2 {UNREAD}"):
        assert_equal(load(tmp_path / "mistral"), theirs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": TEXT | {"model_type": "qwen2"}}, "text_config.model_type = 'qwen2'"),
        ({"text_config": None}, "text_config.model_type is missing.*mistral"),
        ({"audio_config": {"d_model": 8}}, "audio_config = "),
        ({"text_config": TEXT | {"attention_bias": True}}, "attention_bias = True"),
        ({"architectures": ["VoxtralForConditionalGeneration"]}, "Voxtral"),
        (
            {"quantization_config": {"ignore": ["re:.*language_model.*"]}},
            "quantization_config = 're:.*language_model",
        ),
    ],
)
def test_what_is_not_understood_is_refused(changes: dict, message: str, tmp_path: Path):
    make("small 3.1").save_pretrained(tmp_path)
    edit(tmp_path / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_a_model_that_hears_is_refused(tmp_path: Path):
    make("pixtral").save_pretrained(tmp_path / "hf")
    with pytest.warns(UserWarning, match=UNREAD):
        save(load(tmp_path / "hf"), tmp_path / "mistral", layout="mistral")
    edit(tmp_path / "mistral" / "params.json", multimodal={"whisper_model_args": {"x": 1}})
    with pytest.raises(CheckpointError, match=r"multimodal\.whisper_model_args"):
        load(tmp_path / "mistral")
