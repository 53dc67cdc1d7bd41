"""A vocabulary is learned as BPE defines it, reproducibly, and other libraries read it."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import tiktoken
import tokenizers
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from opennemo.data.vocabulary import (
    VocabularySettings,
    make_settings,
    train,
)
from opennemo.errors import InvalidRequest
from opennemo.texts import Texts
from opennemo.tokenizer.bpe import encode_plainly, merge
from opennemo.tokenizer.patterns import PATTERNS
from opennemo.tokenizer.tekken import Tekken
from tests.tokenizer.conftest import SENTENCES, random_texts

GREEK = "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στα δικαιώματα. "  # noqa: RUF001
SETTINGS = VocabularySettings(vocab_size=2000)
SUPERWORD_SETTINGS = VocabularySettings(
    vocab_size=2400,
    superwords=True,
    transition=2000,
    token_words=3,
    sample_bytes=200_000,
    layouts=["document", "paragraph", "sentence"],
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    """This project's own sources and documents, and a little Greek."""
    folder = tmp_path_factory.mktemp("corpus")
    root = Path(__file__).parents[2]
    # Without the files that spell control tokens, which Hugging Face's libraries take for them.
    texts = [file.read_text("utf-8") for file in sorted((root / "opennemo").rglob("*.py"))]
    texts = [text for text in texts if not re.search(r"\[/?[A-Z_]{3,}\]|</?s>|<unk>|<pad>", text)]
    lines = [json.dumps({"text": text, "lang": "code"}) for text in texts]
    (folder / "code.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "el.txt").write_text(GREEK * 20, encoding="utf-8")
    return Texts([folder])


@pytest.fixture(scope="module")
def tekken(corpus: Texts) -> Tekken:
    return train(corpus, SETTINGS).tokenizer


def test_the_same_texts_give_the_same_files(corpus: Texts, tmp_path: Path):
    for folder, processes in (("one", 1), ("two", 2)):
        train(corpus, SETTINGS, processes=processes).save(tmp_path / folder)
    for name in ("tekken.json", "tokenizer.json", "training.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_other_libraries_make_the_same_ids_of_it(corpus: Texts, tmp_path: Path):
    trained = train(corpus, SETTINGS)
    trained.save(tmp_path)
    ours = trained.tokenizer
    mistral = Tekkenizer.from_file(str(tmp_path / "tekken.json"))
    hugging_face = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert mistral.n_words == ours.vocab_size == 2000
    for _, text in corpus:
        ids = ours.encode(text)
        assert mistral.encode(text, bos=False, eos=False) == ids
        assert hugging_face.encode(text, add_special_tokens=False).ids == ids
        assert ours.decode(ids) == text


def test_every_token_can_come_out(tekken: Tekken):
    ranks = {token: rank for rank, token in enumerate(tekken.tokens)}
    assert all(merge(token, ranks) == [token] for token in tekken.tokens)


def test_digits_stay_apart_and_text_is_never_control(tekken: Tekken):
    assert not [
        token for token in tekken.tokens if len(token) > 1 and token.decode("latin-1").isdigit()
    ]
    assert min(tekken.encode("</s>[INST]<unk>")) >= 1000
    assert tekken.control["</s>"] == 2


def test_extending_keeps_the_ids_and_learns_the_new_language(tekken: Tekken, tmp_path: Path):
    georgian = "ყველა ადამიანი იბადება თავისუფალი და თანასწორი თავისი ღირსებითა და უფლებებით. "
    (tmp_path / "ka.txt").write_text(georgian * 9, encoding="utf-8")
    texts = Texts([tmp_path / "ka.txt"])
    extended = train(texts, VocabularySettings(vocab_size=2060), base=tekken).tokenizer
    assert extended.tokens[: len(tekken.tokens)] == tekken.tokens
    assert extended.vocab_size == 2060
    assert extended.encode(GREEK) == tekken.encode(GREEK)
    assert len(extended.encode(georgian)) < 0.5 * len(tekken.encode(georgian))
    assert extended.decode(extended.encode(georgian)) == georgian


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 1256}, "no room for 256 bytes and 1,000 control tokens"),
        ({"temperature": 0}, "temperature is 0: Input should be greater than 0"),
        ({"weights": {"el": -1}}, "weights.el is -1: Input should be greater than or equal to 0"),
        ({"weights": {"xx": 1}}, "weights for languages without texts: xx"),
        ({"weights": {"el": 0, "code": 0}}, "weights of all languages are 0"),
        ({"pattern": "(?:[a-z"}, f"is not one of {', '.join(PATTERNS)} and does not compile"),
        ({"pattern": "(a|b)"}, "has groups"),
        ({"pattern": "[a-z]+"}, "would lose"),
        ({"vocab_size": 900_000}, "the texts are too small"),
        ({"max_words": 3}, "max_words is 3: Input should be greater than or equal to 1000"),
        ({"superwords": True, "pattern": "gpt2"}, "superwords are known for the pattern tekken"),
        ({"superwords": True, "transition": 131_072}, "transition must be from 1,257 to 131,071"),
        ({"token_words": 1}, "token_words is 1: Input should be greater than or equal to 2"),
        ({"layouts": ["page"]}, "layouts.0 is 'page'"),
    ],
)
def test_settings_that_cannot_be_met_get_one_clear_line(
    corpus: Texts, settings: dict, message: str
):
    with pytest.raises(InvalidRequest, match=message.replace("(", "\\(")) as error:
        train(corpus, make_settings(**settings))
    assert "\n" not in str(error.value)


def test_settings_come_from_a_file(tmp_path: Path):
    file = tmp_path / "settings.toml"
    file.write_text("vocab_size = 5000\ntemperature = 2\n[weights]\nel = 3\n")
    expected = VocabularySettings(vocab_size=6000, temperature=2, weights={"el": 3})
    assert make_settings(file, vocab_size=6000) == expected
    for text, message in (
        ("vocab_size = 'big'", "vocab_size is 'big': Input should be a valid integer"),
        ("vocabulary = 1", "vocabulary is not a setting"),
        ("[weights]\nel = 'x'", "weights.el is 'x': Input should be a valid number"),
        ("vocab_size =", "cannot be read as TOML"),
    ):
        file.write_text(text)
        with pytest.raises(InvalidRequest, match=message):
            make_settings(file)


@pytest.mark.parametrize(
    ("name", "size"), [("32k", 32_768), ("128k", 131_072), ("s-131k", 131_072)]
)
def test_the_recipes_are_valid(name: str, size: int):
    file = Path(__file__).parents[2] / "recipes" / f"opennemo-tekken-{name}.toml"
    assert make_settings(file).vocab_size == size


def test_an_empty_corpus_is_an_error(tmp_path: Path):
    (tmp_path / "empty.jsonl").write_bytes(b'\xff\xfe\n{"no": "text"}\n\n')
    with pytest.raises(InvalidRequest, match="no text to learn from \\(2 lines were unreadable\\)"):
        train(Texts([tmp_path]), SETTINGS)


def test_extending_needs_a_larger_vocabulary(corpus: Texts, tekken: Tekken):
    with pytest.raises(InvalidRequest, match="has 2,000 ids already"):
        train(corpus, SETTINGS, base=tekken)


def test_superwords_extend_a_vocabulary_of_words(corpus: Texts, tmp_path: Path):
    for folder, processes in (("one", 1), ("two", 2)):
        trained = train(corpus, SUPERWORD_SETTINGS, processes=processes)
        trained.save(tmp_path / folder)
    for name in ("tekken.json", "tokenizer.json", "training.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    words = SUPERWORD_SETTINGS.model_copy(update={"superwords": False, "vocab_size": 2000})
    first, both = train(corpus, words).tokenizer, trained.tokenizer
    assert both.tokens[: len(first.tokens)] == first.tokens and both.vocab_size == 2400
    assert both.has_superwords and not first.has_superwords
    n_words = [len(token.split()) for token in both.tokens]
    assert max(n_words) == 3 and sum(n > 1 for n in n_words) > 100
    ranks = {token: rank for rank, token in enumerate(both.tokens)}
    assert all(merge(token, ranks) == [token] for token in both.tokens)
    n_tokens = [sum(len(each.encode(text)) for _, text in corpus) for each in (first, both)]
    assert n_tokens[1] < 0.9 * n_tokens[0]


def test_other_libraries_make_the_same_ids_of_superwords(corpus: Texts, tmp_path: Path):
    trained = train(corpus, SUPERWORD_SETTINGS)
    trained.save(tmp_path)
    ours = Tekken.load(tmp_path / "tekken.json")
    mistral = Tekkenizer.from_file(str(tmp_path / "tekken.json"))
    hugging_face = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ranks = {token: rank for rank, token in enumerate(ours.tokens)}
    openai = tiktoken.Encoding(
        "superwords", pat_str=ours.pattern, mergeable_ranks=ranks, special_tokens={}
    )
    line = "and so the words of a line went on and on without a mark at its end " * 600
    texts = [*(text for _, text in corpus), *SENTENCES, *random_texts(400, seed=3), line, line * 9]
    texts = [text for text in texts if not any(name in text for name in ours.control)]
    expected = [ours.encode_prompt(text) for text in texts]
    assert [mistral.encode(text, bos=False, eos=False) for text in texts] == expected
    assert [[id + 1000 for id in openai.encode_ordinary(text)] for text in texts] == expected
    theirs = [hugging_face.encode(text, add_special_tokens=False).ids for text in texts]
    assert theirs == expected
    assert [ids.tolist() for ids in ours.encode_batch(texts)] == expected
    if importlib.util.find_spec("fastokens"):
        assert ours.fastokens is not None
    for text, ids in zip(texts[-200:-2], expected[-200:-2], strict=True):
        plain = encode_plainly(text, ours.pattern, ranks)
        assert [id - 1000 for id in ids] == plain and ours.decode(ids) == text


def test_superwords_are_not_added_to_a_vocabulary_that_exists(corpus: Texts, tekken: Tekken):
    with pytest.raises(InvalidRequest, match="superwords change the pattern"):
        train(corpus, SUPERWORD_SETTINGS, base=tekken)
