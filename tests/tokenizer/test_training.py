"""A vocabulary is learned as BPE defines it, reproducibly, and other libraries read it."""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from opennemo.data import merging
from opennemo.data.display import progress
from opennemo.data.merging import learn_merges
from opennemo.data.vocabulary import (
    VocabularySettings,
    read_settings,
    train,
)
from opennemo.data.words import (
    MAX_WORD_CHARS,
    WordCounts,
    compiled,
    count_words,
    weigh,
)
from opennemo.errors import InvalidRequest
from opennemo.texts import Texts
from opennemo.tokenizer.bpe import merge
from opennemo.tokenizer.patterns import PATTERNS
from opennemo.tokenizer.tekken import SINGLE_BYTES, Tekken

GREEK = "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στα δικαιώματα. "  # noqa: RUF001
SETTINGS = VocabularySettings(vocab_size=2000)


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


def plain_bpe(words: Mapping[str, int], n_tokens: int) -> list[bytes]:
    """BPE by the book: join the most frequent pair, of equals the one with the lowest ids."""
    vocab = list(SINGLE_BYTES)
    spelled = {word: list(word.encode()) for word in words}
    made: dict[bytes, None] = {}
    while len(made) < n_tokens:
        pairs = Counter[tuple[int, int]]()
        for word, ids in spelled.items():
            for pair in pairwise(ids):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        for ids in spelled.values():
            i = 0
            while i < len(ids) - 1:
                if (ids[i], ids[i + 1]) == best:
                    ids[i : i + 2] = [len(vocab)]
                i += 1
        vocab.append(vocab[best[0]] + vocab[best[1]])
        made[vocab[-1]] = None
    return list(made)


def sample_words() -> Counter[str]:
    text = Path(__file__).read_text("utf-8") + GREEK * 2 + "aaaaaaaa aaa \0 \0\0x"
    return Counter(compiled(PATTERNS["tekken"]).findall(text))


def test_merges_are_what_bpe_defines():
    words = sample_words()
    made = learn_merges(words, 300, SINGLE_BYTES)
    assert made == plain_bpe(words, 300)
    # The same by a library, to which each byte is written as a character of its own.
    spelled = {word: "".join(chr(256 + byte) for byte in word.encode()) for word in words}
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    trainer = tokenizers.trainers.BpeTrainer(  # pyright: ignore
        vocab_size=256 + 310,
        initial_alphabet=[chr(256 + byte) for byte in range(256)],
        show_progress=False,
    )
    trained.train_from_iterator((f"{spelled[word]} " * n for word, n in words.items()), trainer)
    merges = json.loads(trained.to_str())["model"]["merges"]
    theirs = (bytes(ord(character) - 256 for character in "".join(pair)) for pair in merges)
    assert list(dict.fromkeys(theirs))[:300] == made


@given(
    st.dictionaries(st.text("aaabé\0", min_size=1, max_size=12), st.integers(1, 99), max_size=20),
    st.integers(1, 40),
    st.integers(2, 30),
)
def test_merges_of_any_words(words: dict[str, int], n_tokens: int, floors: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "FLOORS", floors)
        expected = plain_bpe(words, n_tokens)
        assert learn_merges(words, n_tokens, SINGLE_BYTES) == expected
        patch.setattr(merging, "MAX_BITS", 0)  # as if there were too many for one number
        assert learn_merges(words, n_tokens, SINGLE_BYTES) == expected


def test_going_on_is_like_never_having_stopped():
    words = sample_words()
    made = learn_merges(words, 200, SINGLE_BYTES)
    known = [*SINGLE_BYTES, *made[:90]]
    ranks = {token: rank for rank, token in enumerate(known)}
    spell = lambda word: [ranks[part] for part in merge(word.encode(), ranks)]  # noqa: E731
    assert learn_merges(words, 110, known, spell) == made[90:]


@pytest.mark.parametrize("name", PATTERNS)
def test_cutting_at_spaces_changes_no_word(name: str, texts: SimpleNamespace, tmp_path: Path):
    documents = [*texts.documents(), *texts.random(300, seed=9)]
    blanks = ["".join(run) for run in product(" \n\t\u00a0a1)/", repeat=5)]
    lines = [json.dumps({"text": text}) for text in [*documents, " ".join(blanks), *blanks[::50]]]
    (tmp_path / "xx.jsonl").write_text("\n".join(lines), encoding="utf-8")
    find, expected = compiled(PATTERNS[name]).findall, Counter[str]()
    for _, text in Texts([tmp_path]):
        expected.update(word for word in find(text) if len(word) <= MAX_WORD_CHARS)
    assert count_words(Texts([tmp_path]), PATTERNS[name], 10**7).words["xx"] == expected


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


def test_the_tekken_pattern_is_the_official_one():
    import mistral_common

    file = Path(mistral_common.__file__).parent / "data" / "tekken_240718.json"
    with file.open(encoding="utf-8") as lines:
        assert PATTERNS["tekken"] == json.loads(lines.read())["config"]["pattern"]


@pytest.mark.parametrize("name", PATTERNS)
def test_no_pattern_loses_text(name: str):
    compiled(PATTERNS[name])


def counts_of(**languages: str) -> WordCounts:
    counts = WordCounts({name: Counter(text.split()) for name, text in languages.items()})
    counts.n_bytes.update({name: len(text) for name, text in languages.items()})
    return counts


def test_weights_and_temperature_change_shares_and_not_the_total():
    counts = counts_of(big="a " * 900, small="b " * 100)
    assert dict(weigh(counts)) == {"a": 900, "b": 100}
    assert dict(weigh(counts, temperature=2)) == {"a": 750, "b": 250}  # 30 : 10
    assert dict(weigh(counts, weights={"small": 9})) == {"a": 500, "b": 500}
    assert dict(weigh(counts, weights={"big": 1, "*": 9})) == {"a": 500, "b": 500}


def test_rounding_keeps_languages_of_rare_words():
    rare = " ".join(
        f"w{i:04}" for i in range(1000)
    )  # as Thai or Chinese look: nothing occurs twice
    words = dict(weigh(counts_of(big="a " * 20_000, rare=rare), weights={"rare": 0.25}))
    assert 150 < len(words) < 350


@given(st.lists(st.dictionaries(st.integers(0, 50).map(str), st.integers(1, 9)), max_size=8))
def test_pruned_counts_are_as_wrong_as_they_say_at_most(batches: list[dict[str, int]]):
    pruned, exact = WordCounts(), Counter[str]()
    for batch in batches:
        exact.update(batch)
        pruned.add({"xx": Counter(batch)}, max_words=10)
        assert sum(map(len, pruned.words.values())) <= 10
    for word, n in exact.items():
        assert n - pruned.missed["xx"] <= pruned.words["xx"][word] <= n


def test_pruning_spares_small_languages():
    counts = WordCounts()
    counts.add({"big": Counter(f"w{i}" for i in range(90)), "small": Counter("abc")}, 50)
    assert counts.words["small"] == Counter("abc")
    assert counts.missed == {"big": 1}


def test_a_word_without_end_teaches_nothing(tmp_path: Path):
    (tmp_path / "a.txt").write_text("x" * 5000 + " word", encoding="utf-8")
    counts = count_words(Texts([tmp_path]), PATTERNS["tekken"], 1000)
    assert counts.words == {"a": Counter([" word"])}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 1256}, "no room for 256 bytes and 1,000 control tokens"),
        ({"temperature": 0}, "temperature must be above 0"),
        ({"weights": {"el": -1}}, "weights finite"),
        ({"weights": {"xx": 1}}, "weights for languages without texts: xx"),
        ({"weights": {"el": 0, "code": 0}}, "weights of all languages are 0"),
        ({"pattern": "(?:[a-z"}, "is none of tekken, o200k, llama3, gpt2 and does not compile"),
        ({"pattern": "(a|b)"}, "has groups"),
        ({"pattern": "[a-z]+"}, "would lose"),
        ({"vocab_size": 900_000}, "the texts are too small"),
        ({"max_words": 3}, "must be 1,000 or more"),
    ],
)
def test_settings_that_cannot_be_met_get_one_clear_line(
    corpus: Texts, settings: dict, message: str
):
    with pytest.raises(InvalidRequest, match=message.replace("(", "\\(")) as error:
        train(corpus, VocabularySettings(**settings))
    assert "\n" not in str(error.value)


def test_settings_come_from_a_file(tmp_path: Path):
    file = tmp_path / "settings.toml"
    file.write_text("vocab_size = 5000\ntemperature = 2\n[weights]\nel = 3\n")
    expected = VocabularySettings(vocab_size=6000, temperature=2, weights={"el": 3})
    assert read_settings(file, vocab_size=6000) == expected
    for text, message in (
        ("vocab_size = 'big'", "vocab_size is 'big', but must be of the type of 131072"),
        ("vocabulary = 1", "no setting 'vocabulary' \\(there are vocab_size, "),
        ("[weights]\nel = 'x'", "the weight of el is 'x', not a number"),
        ("vocab_size =", "cannot be read as TOML"),
    ):
        file.write_text(text)
        with pytest.raises(InvalidRequest, match=message):
            read_settings(file)


@pytest.mark.parametrize("size", [32_768, 131_072])
def test_the_recipes_are_valid(size: int):
    file = Path(__file__).parents[2] / "recipes" / f"opennemo-tekken-{size >> 10}k.toml"
    assert read_settings(file).vocab_size == size


def test_an_empty_corpus_is_an_error(tmp_path: Path):
    (tmp_path / "empty.jsonl").write_bytes(b'\xff\xfe\n{"no": "text"}\n\n')
    with pytest.raises(InvalidRequest, match="no text to learn from \\(2 lines were unreadable\\)"):
        train(Texts([tmp_path]), SETTINGS)


def test_extending_needs_a_larger_vocabulary(corpus: Texts, tekken: Tekken):
    with pytest.raises(InvalidRequest, match="has 2,000 ids already"):
        train(corpus, SETTINGS, base=tekken)


def test_progress_on_a_pipe_is_a_line_at_each_tenth(capsys: pytest.CaptureFixture[str]):
    with progress() as report:
        report("learning merges", math.nan)  # how much is left is not known yet
        for share in (0.01, 0.11, 0.12, 1.0):
            report("learning merges", share)
    assert capsys.readouterr().err.split("\n") == [
        *("learning merges: 0 %", "learning merges: 10 %", "learning merges: 100 %", "")
    ]
