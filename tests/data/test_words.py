"""Words are counted by language, exactly or with a known error, and weighed by arithmetic."""

import json
from collections import Counter
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opennemo.data.words import (
    MAX_WORD_CHARS,
    PhraseCounts,
    WordCounts,
    compiled,
    count_words,
    weigh,
)
from opennemo.texts import Texts
from opennemo.tokenizer.patterns import PATTERNS, SUPERWORDS
from tests.tokenizer.conftest import documents, random_texts


@pytest.mark.parametrize("name", PATTERNS)
def test_cutting_at_spaces_changes_no_word(name: str, tmp_path: Path):
    samples = [*documents(), *random_texts(300, seed=9)]
    blanks = ["".join(run) for run in product(" \n\t\u00a0a1)/", repeat=5)]
    lines = [json.dumps({"text": text}) for text in [*samples, " ".join(blanks), *blanks[::50]]]
    (tmp_path / "xx.jsonl").write_text("\n".join(lines), encoding="utf-8")
    find, expected = compiled(PATTERNS[name]).findall, Counter[str]()
    for _, text in Texts([tmp_path]):
        expected.update(word for word in find(text) if len(word) <= MAX_WORD_CHARS)
    assert count_words(Texts([tmp_path]), PATTERNS[name], WordCounts()).words["xx"] == expected


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
    pruned, exact = WordCounts(max_words=10), Counter[str]()
    for batch in batches:
        exact.update(batch)
        pruned.add({"xx": Counter(batch)})
        assert sum(map(len, pruned.words.values())) <= 10
    for word, n in exact.items():
        assert n - pruned.missed["xx"] <= pruned.words["xx"][word] <= n


def test_pruning_spares_small_languages():
    counts = WordCounts(max_words=50)
    counts.add({"big": Counter(f"w{i}" for i in range(90)), "small": Counter("abc")})
    assert counts.words["small"] == Counter("abc")
    assert counts.missed == {"big": 1}


def test_a_word_without_end_teaches_nothing(tmp_path: Path):
    (tmp_path / "a.txt").write_text("x" * 5000 + " word", encoding="utf-8")
    counts = count_words(Texts([tmp_path]), PATTERNS["tekken"], WordCounts())
    assert counts.words == {"a": Counter([" word"])}


def phrases(seed: int) -> Counter[str]:
    """1,000 phrases that hold a word of their own, 200 of which occur five times."""
    return Counter({f"phrase {seed} number {i}": 1 + 4 * (i < 200) for i in range(1000)})


def test_a_sample_of_phrases_is_bounded_and_right_on_average():
    kept, estimate = [], []
    for seed in range(40):
        counts = PhraseCounts(max_bytes=6000)
        counts.n_bytes.update({"big": 90_000, "small": 30})
        for part in range(4):
            items = sorted(phrases(seed).items())[part::4]
            counts.add({"big": Counter(dict(items)), "small": Counter({f"few {part}": 2})})
        sizes = {name: sum(map(len, words)) for name, words in counts.words.items()}
        assert sizes == counts.sizes and sum(sizes.values()) <= 6000
        assert counts.words["small"] == {f"few {part}": 2 for part in range(4)}
        least = 2 ** counts.levels["big"]
        assert least > 1 and min(counts.words["big"].values()) == least
        assert counts.record()["one_phrase_kept_of"] == {"big": least}
        kept.append(len(counts.words["big"]))
        estimate.append(counts.words["big"].total() / phrases(seed).total())
    assert max(kept) < 400
    mean = sum(estimate) / len(estimate)
    error = (sum((x - mean) ** 2 for x in estimate) / len(estimate) ** 2) ** 0.5
    assert abs(mean - 1) < 4 * error < 0.1


def test_a_language_with_more_weight_keeps_more_phrases():
    counts = PhraseCounts(max_bytes=12_000, weights={"en": 16, "*": 1})
    for seed, language in enumerate(("en", "fr")):
        counts.n_bytes[language] = 25_000
        counts.add({language: phrases(seed)})
    assert counts.levels["en"] < counts.levels["fr"]


def test_texts_are_written_in_the_layouts_in_turn(tmp_path: Path):
    text = "One line\nof two. Another\n\nparagraph."
    (tmp_path / "xx.jsonl").write_text(f"{json.dumps({'text': text})}\n" * 3, encoding="utf-8")
    (tmp_path / "code-x.jsonl").write_text(f"{json.dumps({'text': text})}\n" * 3, encoding="utf-8")
    layouts = ("document", "paragraph", "sentence")
    counts = count_words(
        Texts([tmp_path]), SUPERWORDS["tekken"], PhraseCounts(10**6), layouts=layouts
    )
    document = ["One line\n", "of two.", " Another\n\n", "paragraph."]
    paragraph = ["One line of two.", " Another", "paragraph."]
    sentence = ["One line", "of two.", "Another", "paragraph."]
    assert counts.words["xx"] == Counter([*document, *paragraph, *sentence])
    assert counts.words["code-x"] == Counter(document * 3)
