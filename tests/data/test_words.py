"""Words are counted by language, exactly or with a known error, and weighed by arithmetic."""

import json
from collections import Counter
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opennemo.data.words import MAX_WORD_CHARS, WordCounts, compiled, count_words, weigh
from opennemo.texts import Texts
from opennemo.tokenizer.patterns import PATTERNS
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
    assert count_words(Texts([tmp_path]), PATTERNS[name], 10**7).words["xx"] == expected


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
