"""Merges are those that BPE defines, however they are found."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from opennemo.data import merging
from opennemo.data.merging import learn_merges
from opennemo.data.words import compiled
from opennemo.tokenizer.bpe import merge
from opennemo.tokenizer.patterns import PATTERNS
from opennemo.tokenizer.tekken import SINGLE_BYTES

GREEK = "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στα δικαιώματα. "  # noqa: RUF001


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


@contextmanager
def with_floors(floors: int) -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "FLOORS", floors)
        yield patch


def counted_words(letters: str, longest: int, most: int) -> st.SearchStrategy[dict[str, int]]:
    text = st.text(letters, min_size=1, max_size=longest)
    return st.dictionaries(text, st.integers(1, most), max_size=20)


@given(counted_words("aaabé\0", 12, 99), st.integers(1, 40), st.integers(2, 30))
def test_merges_of_any_words(words: dict[str, int], n_tokens: int, floors: int):
    with with_floors(floors) as patch:
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


@given(counted_words("ab  ", 14, 9), st.integers(2, 3), st.integers(2, 30))
def test_no_token_holds_more_words_than_it_may(words: dict[str, int], most: int, floors: int):
    with with_floors(floors):
        made = learn_merges(words, 300, SINGLE_BYTES, most_words=most)
    assert all(len(token.split()) <= most for token in made)
    # Whole words that may stay together are a token each, for there is room for all.
    whole = {word.encode() for word in words if len(word) > 1}
    assert {word for word in whole if len(word.split()) <= most} <= set(made)
