"""Counting tokens: the arithmetic, and the files it writes."""

import csv
import io
import json
from pathlib import Path

import mistral_common
import pytest
from rich.console import Console

from opennemo.data.compression import Comparison, as_csv, compare, open_all
from opennemo.errors import InvalidRequest
from opennemo.texts import LAYOUTS, Texts
from opennemo.tokenizer.patterns import PATTERNS
from opennemo.tokenizer.rank_files import OWN
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


def test_texts_are_measured_in_the_layout_that_is_asked_for(english: Tekken):
    texts = [("en", "the\nthe. the\n\nthe"), ("code-x", "the\nthe")]
    tokens = {
        layout: compare({"e": english}, texts, "e", layout).n_tokens["e"]
        for layout in ("document", "paragraph", "sentence")
    }
    # the|\n|the|.| the|\n|\n|the and the| the|.| the, the and the, the|., the, the
    assert [counts["en"] for counts in tokens.values()] == [8, 5, 5]
    assert {counts["code-x"] for counts in tokens.values()} == {3}


def test_a_tie_is_not_won(english: Tekken):
    assert compare({"a": english, "b": english}, TEXTS, "a").won("b") == 0


def test_numbers_come_out_as_csv_and_json(comparison: Comparison):
    rows = list(csv.DictReader(io.StringIO(as_csv(comparison.rows()))))
    assert [row["language"] for row in rows] == ["el", "el", "en", "en", "fr", "fr"]
    assert rows[3] == {
        "language": "en", "layout": "document", "tokenizer": "bytes", "tokens": "26",
        "bytes_a_token": "1.0", "chars_a_token": "1.0", "ratio": "2.0",
    }  # fmt: skip
    content = json.loads(json.dumps(comparison.content()))
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


def test_tokenizers_have_names(english: Tekken, tmp_path: Path):
    (tmp_path / "small").mkdir()
    english.save(tmp_path / "small" / "tekken.json")
    opened = open_all([str(tmp_path / "small"), f"own={OWN}"])
    assert {name: each.vocab_size for name, each in opened.items()} == {
        "small": english.vocab_size, "own": 32_768
    }  # fmt: skip
    with pytest.raises(InvalidRequest, match="two tokenizers are called small: write NAME="):
        open_all([str(tmp_path / "small"), str(tmp_path / "small" / "tekken.json")])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_no_worse_than_sentencepiece_on_the_held_out_text(layout: str):
    news = Path(__file__).parents[2].parent / "shared/data/tokenizer-heldout/news.jsonl.gz"
    if not news.exists():
        pytest.skip("the held-out news are not beside this checkout")
    data = Path(mistral_common.__file__).parent / "data"
    tokenizers = open_all([f"own={OWN}", f"v3={data}/mistral_instruct_tokenizer_240323.model.v3"])
    result = compare(tokenizers, Texts([news]), "own", layout)
    assert result.won("v3") == len(result.languages) == 75
    assert all(result.ratio("v3", language) > 1.5 for language in ("hi", "ar", "ko"))
