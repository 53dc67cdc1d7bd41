"""Vocabularies written as fields of GGUF files: read back with the same ids, or refused by name."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opennemo.tokenizer import Tokenizer, load_tokenizer
from opennemo.tokenizer.gguf_saving import gguf_fields
from opennemo.tokenizer.gguf_vocabulary import load_gguf
from opennemo.tokenizer.huggingface import HuggingFace
from opennemo.tokenizer.patterns import PATTERNS
from opennemo.tokenizer.saving import save_huggingface
from opennemo.tokenizer.spec import byte_level_spec
from opennemo.tokenizer.tekken import Tekken
from tests.tokenizer.test_gguf_vocabulary import DATA, MISTRAL_7B, write_gguf


def through_gguf(tokenizer: Tokenizer, folder: Path, n_rows: int | None = None) -> Tokenizer:
    fields = gguf_fields(tokenizer, n_rows or tokenizer.vocab_size)
    template = fields.pop("tokenizer.chat_template", None)
    fields = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}
    found = load_gguf(write_gguf(folder / "model.gguf", **fields))
    found.chat_template = template
    return found


def nemo(folder: Path) -> Tokenizer:
    tokens = Tekken.load(DATA / "tekken_240718.json").tokens[:3000]
    return Tekken(PATTERNS["tekken"], tokens)


def nemo_as_json(folder: Path) -> Tokenizer:
    save_huggingface(nemo(folder), folder)
    return load_tokenizer(folder / "tokenizer.json")


def mistral_v1(folder: Path) -> Tokenizer:
    return load_tokenizer(MISTRAL_7B["v1"])


def mistral_v3(folder: Path) -> Tokenizer:
    return load_tokenizer(MISTRAL_7B["v3"])


def mistral_as_json(folder: Path) -> Tokenizer:
    save_huggingface(mistral_v3(folder), folder)
    return load_tokenizer(folder / "tokenizer.json")


@pytest.mark.parametrize(
    "make", [nemo, nemo_as_json, mistral_v1, mistral_v3, mistral_as_json], ids=lambda f: f.__name__
)
def test_the_ids_are_the_same(make: Any, texts: SimpleNamespace, tmp_path: Path):
    tokenizer = make(tmp_path)
    found = through_gguf(tokenizer, tmp_path)
    texts.hold_for(found)
    for text in texts.samples():
        assert found.encode(text) == tokenizer.encode(text)
    assert found.vocab_size == tokenizer.vocab_size
    for key in ("bos_id", "eos_id", "add_bos", "dummy_prefix", "instruct_version"):
        assert getattr(found, key) == getattr(tokenizer, key), key
    assert len(found.control) == len(tokenizer.control)
    for id in range(tokenizer.vocab_size):
        assert found.token_bytes(id) == tokenizer.token_bytes(id)


def small(**changes: Any) -> dict[str, Any]:
    """A vocabulary of bytes that splits text as GPT-2 does, and two tokens beside it."""
    alphabet = sorted({chr(i) for i in range(33, 127)} | {"Ġ", "Ċ"})
    vocab = {name: id for id, name in enumerate([*alphabet, "<|end|>", "<think>", "th", "the"])}
    merges, added = [["t", "h"], ["th", "e"]], {"<|end|>": True, "<think>": False}
    spec = byte_level_spec(vocab, merges, [PATTERNS["gpt2"]], added, ignore_merges=False)
    return spec | changes


def test_tokens_that_are_added(tmp_path: Path):
    spec = small()
    end = spec["model"]["vocab"]["<|end|>"]
    tokenizer = HuggingFace(spec, bos_id=end, eos_id=end, chat_template="{{ x }}", add_bos=False)
    found = through_gguf(tokenizer, tmp_path, n_rows=110)
    assert found.control == {"<|end|>": end} and not found.add_bos and found.vocab_size == 110
    assert found.chat_template == "{{ x }}"
    for text in ("the <think> then <|end|>", "", "a <think>"):
        assert found.encode(text) == tokenizer.encode(text)
    assert found.token_bytes(end + 1) == b"<think>"
    fields = gguf_fields(tokenizer, 110)
    assert fields["tokenizer.ggml.token_type"][-14:] == [3, 4, 1, 1, *[5] * 10]
    with pytest.raises(ValueError, match="100 tokens are more than 90 embeddings"):
        gguf_fields(tokenizer, 90)


def test_the_ways_to_split_text_that_have_a_name():
    digits = {"type": "Digits", "individual_digits": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    llama = {**split, "pattern": {"Regex": PATTERNS["llama3"]}}
    bytes_only = {**byte_level, "use_regex": False}
    for steps, whole_first, name in [
        ([{**byte_level, "use_regex": True}], False, "gpt-2"),
        ([digits, {**byte_level, "use_regex": True}], False, "smollm"),
        ([llama, bytes_only], True, "llama3"),
        ([llama, bytes_only], False, None),
        ([{**split, "pattern": {"Regex": "x+"}}, bytes_only], False, None),
        ([{"type": "Whitespace"}, bytes_only], False, "'Whitespace' has no place"),
    ]:
        spec = copy.deepcopy(small(pre_tokenizer={"type": "Sequence", "pretokenizers": steps}))
        spec["model"]["ignore_merges"] = whole_first
        tokenizer = HuggingFace(spec, bos_id=96, eos_id=96)
        if name in ("gpt-2", "smollm", "llama3"):
            assert gguf_fields(tokenizer, 100)["tokenizer.ggml.pre"] == name
            continue
        with pytest.raises(ValueError, match=name or "GGUF has no name for how it splits text"):
            gguf_fields(tokenizer, 100)


def test_a_normalizer_is_refused_by_name(tmp_path: Path):
    tokenizer = HuggingFace(small(normalizer={"type": "NFC"}), bos_id=96, eos_id=96)
    with pytest.raises(ValueError, match="its normalizer 'NFC' has no place in GGUF"):
        gguf_fields(tokenizer, 100)
    folder = tmp_path / "mistral"
    folder.mkdir()
    mistral_as_json(folder)
    spec = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    spec["normalizer"]["normalizers"].append({"type": "Lowercase"})
    tokenizer = HuggingFace(spec, bos_id=1, eos_id=2)
    with pytest.raises(ValueError, match="its normalizer 'Lowercase' has no place in GGUF"):
        gguf_fields(tokenizer, 32_768)
