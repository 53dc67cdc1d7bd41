"""Vocabularies in GGUF files: the ids of the tokenizers that they were made from."""

import importlib.resources
import importlib.util
import json
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
from sentencepiece import SentencePieceProcessor

from opennemo.errors import CheckpointError
from opennemo.tokenizer.gguf_head import read_metadata
from opennemo.tokenizer.gguf_vocabulary import load_gguf
from opennemo.tokenizer.load import load_tokenizer
from opennemo.tokenizer.patterns import PATTERNS
from opennemo.tokenizer.saving import save_huggingface
from opennemo.tokenizer.sentencepiece import SentencePiece
from opennemo.tokenizer.tekken import Tekken

DATA = Path(str(importlib.resources.files("mistral_common"))) / "data"
MISTRAL_7B = {
    "v1": DATA / "tokenizer.model.v1",
    "v3": DATA / "mistral_instruct_tokenizer_240323.model.v3",
}


@pytest.mark.parametrize("version", ["v1", "v3"])
@pytest.mark.parametrize("space", [True, False])
def test_sentencepiece_in_gguf(texts: SimpleNamespace, tmp_path: Path, version: str, space: bool):
    original = SentencePiece.load(MISTRAL_7B[version])
    model = SentencePieceProcessor(model_file=str(MISTRAL_7B[version]))
    ids = range(model.vocab_size())
    kinds = [
        2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1
        for i in ids
    ]
    scores = [model.get_score(i) for i in ids]
    tokens = [model.id_to_piece(i) for i in ids]
    file = write_gguf(
        tmp_path / "model.gguf",
        model="llama",
        tokens=tokens,
        scores=scores,
        token_type=kinds,
        bos_token_id=1,
        eos_token_id=2,
        add_space_prefix=space,
    )
    ours = load_tokenizer(file)
    texts.hold_for(ours)
    assert ours.control == original.control and ours.vocab_size == original.vocab_size
    assert ours.dummy_prefix == space and ours.instruct_version == version
    assert [*map(ours.token_bytes, ids)] == [*map(original.token_bytes, ids)]
    for text in texts.samples() if space else []:
        assert ours.encode(text) == original.encode(text)


def write_gguf(path: Path, **fields: Any) -> Path:
    """A GGUF file with these keys of `tokenizer.ggml` and no tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in fields.items():
        key = f"tokenizer.ggml.{key}"
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case str():
                writer.add_string(key, value)
            case _:
                writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def nemo_fields(folder: Path, n_tokens: int = 3000) -> dict[str, Any]:
    """The beginning of NeMo's vocabulary, as llama.cpp's converter takes it from tokenizer.json."""
    tokens = Tekken.load(DATA / "tekken_240718.json").tokens[:n_tokens]
    save_huggingface(Tekken(PATTERNS["tekken"], tokens), folder)
    model = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]
    return {
        "model": "gpt2",
        "pre": "tekken",
        "tokens": [*model["vocab"]],
        "token_type": [3] * 1000 + [1] * n_tokens,
        "merges": [" ".join(pair) for pair in model["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "add_bos_token": True,
    }


def test_nemo_in_gguf(texts: SimpleNamespace, tmp_path: Path):
    fields = nemo_fields(tmp_path)
    tokenizer = load_tokenizer(write_gguf(tmp_path / "nemo.gguf", **fields))
    original = load_tokenizer(tmp_path)
    texts.hold_for(tokenizer)
    assert tokenizer.instruct_version == "v3-tekken" and tokenizer.add_bos
    assert tokenizer.control == original.control
    for text in texts.samples():
        assert tokenizer.encode(text) == original.encode(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "viking"}, "how 'viking' splits text is not known, only gpt-2"),
        ({"model": "bert"}, "vocabulary 'bert' is not supported, only"),
        ({"eos_token_id": 99_999}, "has no token 99999"),
        ({"merges": ["a b c"]}, "vocabulary is not usable"),
        ({"merges": ["☃ ☃"]}, "vocabulary is not usable"),
        ({"token_type": [1]}, "vocabulary is not usable"),
        ({"tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"eos_token_id": None}, "tokenizer.ggml.eos_token_id is missing"),
        ({"tokens": "text"}, "vocabulary is not usable"),
        ({"eos_token_id": "text"}, "has no token 'text'"),
        ({"tokens": 5}, "vocabulary is not usable"),
        ({"tokens": [5] * 1300}, "vocabulary is not usable"),
        ({"merges": [5]}, "vocabulary is not usable"),
        ({"pre": 5}, "how '5' splits text is not known"),
        ({"model": "llama"}, "tokenizer.ggml.scores is missing"),
        ({"model": "llama", "scores": [0.0] * 1300}, "vocabulary is not usable"),
    ],
)
def test_gguf_vocabularies_that_cannot_be_used(
    tmp_path: Path, changes: dict[str, Any], message: str
):
    fields = {**nemo_fields(tmp_path, 300), **changes}
    fields = {key: value for key, value in fields.items() if value is not None}
    with pytest.raises(CheckpointError) as caught:
        load_gguf(write_gguf(tmp_path / "model.gguf", **fields))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_gguf_files(tmp_path: Path):
    file = write_gguf(tmp_path / "model.gguf", model="gpt2", tokens=["a", "é"], token_type=[1, 2])
    whole = file.read_bytes()
    assert read_metadata(file)["tokenizer.ggml.tokens"] == ["a", "é"]
    cut = [whole[:n] for n in range(len(whole) - 1)]
    key = struct.pack("<Q", 1) + b"k"
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key
    forged = [
        head + struct.pack("<IIQ", 9, 0, 2**62),  # a list that is longer than the file
        head + struct.pack("<IIQ", 9, 8, 2**62),
        head + struct.pack("<IQ", 8, 2**62),  # such a string
        head + struct.pack("<IB", 99, 0),  # a type that does not exist
        head + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 100_000,  # lists in lists
        head + struct.pack("<IQ", 8, 1) + b"\xff",  # not UTF-8
        b"GGUF" + struct.pack(">IQQ", 3, 0, 0),  # big-endian
        b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
        b"PK" + whole,
    ]
    for damaged in [*cut, *forged]:
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError) as caught:
            load_gguf(file)
        assert str(file) in str(caught.value)
    with pytest.raises(CheckpointError, match="No such file"):
        load_gguf(tmp_path / "none.gguf")
