"""Counting tokens: the arithmetic, the files it writes, and files of ranks to compare with."""

import base64
import csv
import io
import json
from importlib.resources import files
from pathlib import Path

import mistral_common
import pytest
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from rich.console import Console

from opennemo.data.compression import Comparison, compare, open_all
from opennemo.data.display import show
from opennemo.errors import CheckpointError, InvalidRequest
from opennemo.texts import Texts
from opennemo.tokenizer.patterns import PATTERNS
from opennemo.tokenizer.rank_files import OWN, PATTERN_OF_RANKS, Ranks, open_tokenizer, pack
from opennemo.tokenizer.tekken import SINGLE_BYTES, Tekken

TEXTS = [("en", "the theme of the thesis"), ("fr", "thé"), ("en", "the"), ("el", "το")]


@pytest.fixture(scope="module")
def in_bytes() -> Tekken:
    return Tekken(PATTERNS["tekken"], SINGLE_BYTES)


@pytest.fixture(scope="module")
def english() -> Tekken:
    return Tekken(PATTERNS["tekken"], [*SINGLE_BYTES, b"th", b"the", b" the", "τ".encode()])


@pytest.fixture(scope="module")
def comparison(in_bytes: Tekken, english: Tekken) -> Comparison:
    return compare({"english": english, "bytes": in_bytes}, TEXTS, "english")


def test_the_arithmetic(comparison: Comparison):
    assert comparison.n_bytes == {"en": 26, "fr": 4, "el": 4}
    assert comparison.n_chars == {"en": 26, "fr": 3, "el": 2}
    # the| the|m|e| |o|f| the| the|s|i|s and the
    assert comparison.n_tokens["english"] == {"en": 13, "fr": 3, "el": 3}
    assert comparison.ratio("bytes", "en") == 2
    assert comparison.won("bytes") == 3
    assert comparison.worst("bytes", 2) == ["el", "fr"]


def test_a_tie_is_not_won(english: Tekken):
    assert compare({"a": english, "b": english}, TEXTS, "a").won("b") == 0


def test_numbers_come_out_as_csv_and_json(comparison: Comparison):
    rows = list(csv.DictReader(io.StringIO(comparison.csv())))
    assert [row["language"] for row in rows] == ["el", "el", "en", "en", "fr", "fr"]
    assert rows[3] == {
        "language": "en", "tokenizer": "bytes", "tokens": "26", "bytes_a_token": "1.0",
        "chars_a_token": "1.0", "ratio": "2.0",
    }  # fmt: skip
    content = json.loads(comparison.json())
    assert content["won"] == {"bytes": {"won": 3, "of": 3}}
    assert len(content["rows"]) == 6


def test_the_table_says_what_was_won_and_what_is_worst(comparison: Comparison):
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(comparison.table())
    shown = " ".join(console.export_text().split())
    assert "english needs fewer tokens than bytes in 3 of 3 languages (100.0%)" in shown
    assert "worst: el 1.33, fr 1.33, en 2.00" in shown


def test_the_plot_is_the_same_file_each_time(comparison: Comparison, tmp_path: Path):
    pytest.importorskip("matplotlib")
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        files = [tmp_path / folder / name for name in ("plot.png", "plot.svg")]
        comparison.plot(files, {"en": "English", "fr": "French"}, {"bytes": {"en": 1.3}})
    assert (tmp_path / "a/plot.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "a/plot.svg").read_text("utf-8")
    assert all(word in svg for word in ("English", "French", "bytes, as announced", "2.00"))
    assert svg == (tmp_path / "b/plot.svg").read_text("utf-8")


def test_comparing_needs_texts_and_a_reference(english: Tekken):
    with pytest.raises(InvalidRequest, match="no text"):
        compare({"a": english}, [], "a")
    with pytest.raises(InvalidRequest, match="b is not among a"):
        compare({"a": english}, TEXTS, "b")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of as many ranks as GPT-2 has, though not its own."""
    n = next(iter(PATTERN_OF_RANKS))
    tokens = [*SINGLE_BYTES, b" lo", b" low", *(b"%06d" % i for i in range(n - 258))]
    lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    file = tmp_path_factory.mktemp("ranks") / "tokenizer.model"
    file.write_bytes(b"".join(lines))
    return file


def test_a_file_of_ranks_is_known_by_its_content(ranks: Path):
    tokenizer = open_tokenizer(ranks)
    assert isinstance(tokenizer, Ranks)
    ids = tokenizer.encode(" low é")
    assert ids == [257, 32, *"é".encode()]
    assert tokenizer.decode(ids) == " low é"


def test_tokenizers_have_names(english: Tekken, ranks: Path, tmp_path: Path):
    (tmp_path / "small").mkdir()
    english.save(tmp_path / "small" / "tekken.json")
    opened = open_all([str(tmp_path / "small"), f"gpt={ranks}"])
    assert {name: type(each) for name, each in opened.items()} == {"small": Tekken, "gpt": Ranks}
    with pytest.raises(InvalidRequest, match="two tokenizers are called small: write NAME="):
        open_all([str(tmp_path / "small"), str(tmp_path / "small" / "tekken.json")])


def test_an_unknown_number_of_ranks_is_an_error(tmp_path: Path):
    file = tmp_path / "small.tiktoken"
    file.write_bytes(b"YQ== 0\nYg== 1\n")
    with pytest.raises(CheckpointError, match="2 ranks, so its split pattern is unknown"):
        open_tokenizer(file)
    file.write_bytes(b"YQ== 0\n*** *** ***\n")
    with pytest.raises(CheckpointError, match="not a tiktoken file"):
        open_tokenizer(file)


def test_showing_a_text_names_ids_and_bytes(english: Tekken):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(show(english, "the τό\n[bold]"))
    shown = console.export_text()
    assert shown.splitlines()[:2] == ["the τ⟨cf⟩⟨8c⟩⏎", "[bold]"]
    assert "1257" in shown  # the id of "the"
    assert "74 68 65" in shown  # its bytes
    assert "characters, 15 bytes" in shown


def test_the_vocabulary_that_comes_with_the_package(tmp_path: Path):
    own = open_tokenizer(Path(OWN))
    assert isinstance(own, Tekken)
    assert own.vocab_size == 32_768
    text = "Всі люди народжуються вільними — 人人生而自由,在尊严和权利上一律平等。 def f(x): return 42 🦙"  # noqa: E501, RUF001
    assert own.decode(own.encode(text)) == text
    assert pack(own.tokens) == files("opennemo.tokenizer").joinpath(
        "data", f"{OWN}.tiktoken.gz"
    ).read_bytes()  # fmt: skip
    own.save(tmp_path / "tekken.json")
    mistral = Tekkenizer.from_file(str(tmp_path / "tekken.json"))
    assert mistral.encode(text, bos=False, eos=False) == own.encode(text)


def test_it_is_no_worse_than_sentencepiece_on_the_held_out_text():
    news = Path(__file__).parents[2].parent / "shared/data/tokenizer-heldout/news.jsonl.gz"
    if not news.exists():
        pytest.skip("the held-out news are not beside this checkout")
    data = Path(mistral_common.__file__).parent / "data"
    tokenizers = open_all([f"own={OWN}", f"v3={data}/mistral_instruct_tokenizer_240323.model.v3"])
    result = compare(tokenizers, Texts([news]), "own")
    assert result.won("v3") == len(result.languages) == 75
    assert all(result.ratio("v3", language) > 1.5 for language in ("hi", "ar", "ko"))
