"""SentencePiece: the ids of mistral-common, and the chat layout by the name of the file."""

import importlib.resources
import io
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer, get_spm_version

from opennemo.errors import CheckpointError
from opennemo.tokenizer.load import load_tokenizer
from opennemo.tokenizer.saving import save_huggingface
from opennemo.tokenizer.sentencepiece import SentencePiece

DATA = Path(str(importlib.resources.files("mistral_common"))) / "data"
FILES = sorted(DATA.glob("*.model*"))
V1, V3 = DATA / "tokenizer.model.v1", DATA / "mistral_instruct_tokenizer_240323.model.v3"


@pytest.mark.parametrize("file", FILES, ids=[file.name for file in FILES])
def test_mistral_common_agrees(texts: SimpleNamespace, file: Path):
    ours, theirs = load_tokenizer(file), SentencePieceTokenizer(file.as_posix())
    assert ours.instruct_version == get_spm_version(file).value
    assert (ours.vocab_size, ours.bos_id, ours.eos_id) == (theirs.n_words, 1, 2)
    assert ours.dummy_prefix and ours.add_bos
    for name, id in ours.control.items():
        assert theirs.get_special_token(name) == id
    every = [*texts.documents(), *texts.sentences, *texts.look_alikes, *texts.random(3000, seed=5)]
    for text, batched in zip(every, ours.encode_batch(every), strict=True):
        ids = ours.encode(text)
        assert ids == batched.tolist() == theirs.encode(text, bos=False, eos=False)
        assert not {*ids} & {*ours.control.values()}
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode(ids) == text.replace("▁", " ")


def test_bytes_and_control_tokens():
    tokenizer = load_tokenizer(V3)
    ids = tokenizer.encode("🦙\ud800")
    assert b"".join(map(tokenizer.token_bytes, ids)) == " 🦙\ufffd".encode()
    assert tokenizer.token_bytes(tokenizer.bos_id) == tokenizer.token_bytes(0) == b""
    inst = tokenizer.control["[INST]"]
    assert tokenizer.decode([1, inst, *tokenizer.encode("Hi")], show_control=True) == "<s>[INST] Hi"
    for id in (-1, tokenizer.vocab_size):
        with pytest.raises(IndexError):
            tokenizer.token_bytes(id)


# As on the hub, which knows no system message in between.
OFFICIAL = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}
{%- if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %} [/INST]{% else %}
{{- ' ' + m.content + eos_token }}{% endif %}{% endfor %}"""


@pytest.mark.parametrize(
    ("source", "name", "template", "version"),
    [
        (V1, "tokenizer.model", None, "v1"),
        (V1, "tokenizer.model", "[INST] {{ messages }}", None),
        (V1, "tokenizer.model.v1", "[INST] {{ messages }}", None),
        (V3, "tokenizer.model", None, "v3"),
        (
            V3,
            "tokenizer.model",
            OFFICIAL.replace("if m.role == 'user'", "if m.role != 'assistant'"),
            "v3",
        ),
        (V3, "tokenizer.model", "[INST] {{ messages }}", None),
        (V3, "tokenizer.model", "<|im_start|>{{ messages }}", None),
        (V3, "tokenizer.model.v2", None, "v2"),
    ],
)
def test_version(tmp_path: Path, source: Path, name: str, template: str | None, version: str):
    shutil.copy(source, tmp_path / name)
    if template:
        (tmp_path / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, SentencePiece)
    assert (tokenizer.instruct_version, tokenizer.chat_template) == (version, template)


@pytest.mark.parametrize("content", [b"", b"\0" * 99, b"text", V1.read_bytes()[:100_000]])
def test_a_file_that_is_no_model(tmp_path: Path, content: bytes):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_which_file_of_a_folder(tmp_path: Path):
    def loaded() -> tuple[str, str | None]:
        tokenizer = load_tokenizer(tmp_path)
        return type(tokenizer).__name__, tokenizer.instruct_version

    with pytest.raises(CheckpointError, match="no tokenizer there"):
        load_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match=r"none\.json: cannot be read"):
        load_tokenizer(tmp_path / "none.json")
    with pytest.raises(CheckpointError, match="no tokenizer there"):
        load_tokenizer(tmp_path / "none")
    (tmp_path / "weights.bin").write_text("")
    with pytest.raises(CheckpointError, match="no tokenizer there"):
        load_tokenizer(tmp_path / "weights.bin")
    shutil.copy(V1, tmp_path / "tokenizer.model")
    assert loaded() == ("SentencePiece", "v1")
    shutil.copy(V1, tmp_path / "tokenizer.model.v1")
    shutil.copy(V3, tmp_path / "tokenizer.model.v3")
    assert loaded() == ("SentencePiece", "v3")
    shutil.copy(DATA / "tekken_240718.json", tmp_path / "tekken.json")
    assert loaded() == ("Tekken", "v3-tekken")


@pytest.mark.parametrize("file", [V1, V3], ids=["v1", "v3"])
def test_as_tokenizer_json(texts: SimpleNamespace, tmp_path: Path, file: Path):
    ours = load_tokenizer(file)
    save_huggingface(ours, tmp_path)
    again = load_tokenizer(tmp_path)
    for text in [*texts.sentences, *texts.look_alikes, *texts.random(1000, seed=7), " ▁ x", "\0"]:
        assert again.encode(text) == ours.encode(text)
    ids = range(ours.vocab_size)
    assert [*map(again.token_bytes, ids)] == [*map(ours.token_bytes, ids)]
    assert (again.control, again.add_bos) == (ours.control, True)


@pytest.mark.parametrize("dummy_prefix", [True, False])
def test_tokens_that_are_not_merged_stay_whole(tmp_path: Path, dummy_prefix: bool):
    """A fine-tune may have added them: the library takes them out of a text before all else."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore
        sentence_iterator=iter(Path(__file__).read_text("utf-8").splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=dummy_prefix,
        user_defined_symbols=["<|im_end|>", "ZZ9Z"],
        minloglevel=2,
    )
    ours = SentencePiece(model.getvalue())
    assert ours.dummy_prefix == dummy_prefix
    save_huggingface(ours, tmp_path)
    again = load_tokenizer(tmp_path)
    for text in ("import json", "  a  b", "def test(x):\n\n    assert x == 'é🦙'", "x ZZ9Z", ""):
        assert again.encode(text) == ours.encode(text)
        assert again.decode(ours.encode(text)) == text
    for name in ("<|im_end|>", "ZZ9Z"):
        assert again.encode(f"a{name}")[-1] == ours.encode(f"a{name}")[-1]
        assert again.token_bytes(ours.encode(f"a{name}")[-1]) == name.encode()
