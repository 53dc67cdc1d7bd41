"""Each stage does what it says and no more, the fast rules equal plain ones, copies are found."""

import random
import sys
import sysconfig
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from opennemo.data.cleaning import (
    MAX_COMMONEST,
    MAX_REPEATED,
    MAX_REPEATED_LINE_CHARS,
    MAX_REPEATED_LINES,
    STAGES,
    WORDS,
    Cleaning,
    Document,
    keys,
    repetition,
    stages,
)
from opennemo.errors import InvalidRequest, OpenNemoError

ROOT = Path(__file__).parents[2]
PROSE = (ROOT / "docs" / "architecture.md").read_text("utf-8")
ENGLISH = "The house on the hill had been empty for years, and nobody knew whose it was."
GERMAN = "Das Haus auf dem Hügel stand seit Jahren leer, und niemand wusste, wem es gehörte."
JAPANESE = "丘の上の家は何年も空き家で、誰のものか誰も知らなかった。"


def clean(text: str, *chosen: str, language: str = "", **settings: object) -> Document:
    """One text through the stages, between two that nothing happens to."""
    other = Document(text="alone", language="en", text_bytes=5)
    documents = [other, Document(text=text, language=language, text_bytes=0), other]
    cleaning = Cleaning(stages=chosen, **settings)  # pyright: ignore[reportArgumentType]
    for stage in stages(cleaning):
        documents = stage(documents)
    first, document, last = documents
    assert first == last == other
    return document


def test_mending_touches_only_what_was_decoded_wrongly():
    pytest.importorskip("ftfy")
    for text in (
        ENGLISH,
        GERMAN,
        JAPANESE,
        "“ﬁne” \u2018quotes\u2019 &amp; <b>\uff37\uff49de</b> … e\u0301",
        PROSE,
    ):
        assert clean(text, "mojibake") == Document(text=text, language="", text_bytes=0)
        wrong = text.encode().decode("latin-1")
        mended = clean(wrong, "mojibake")
        if not text.isascii():
            assert mended.text == text and mended.changes == ("mojibake",)
    composed = clean("cafe\u0301", "nfc")
    assert composed.text == "caf\u00e9" and composed.changes == ("nfc",)
    assert clean("caf\u00e9", "nfc").changes == ()
    both = clean("scho\u0308n".encode().decode("latin-1"), "nfc", "mojibake")
    assert both.text == "schön" and both.changes == ("mojibake", "nfc")


def test_languages_are_named_where_files_do_not_and_others_left_out():
    pytest.importorskip("py3langid")
    for language, text in (("en", ENGLISH), ("de", GERMAN), ("ja", JAPANESE)):
        assert clean(text, "identify").language == language
        assert clean(text, "identify", language="xx").language == "xx"
        assert clean(text).language == ""
        kept = clean(text, "identify", languages=("de", "en"))
        assert kept.dropped == ("language" if language == "ja" else "")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        *(("", "empty"), (" \n", "empty"), ("four", "too short"), ("five5", "")),
        *(("123456789", ""), ("1234567890", "too long")),
    ],
)
def test_lengths(text: str, why: str):
    assert clean(text, min_chars=5, max_chars=9).dropped == why


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(InvalidRequest, match=r"no stage 'polish' of cleaning \(there are mojibake"):
        Cleaning(stages=("nfc", "polish"))
    with pytest.raises(InvalidRequest, match="hold no text"):
        Cleaning(min_chars=9, max_chars=8)


@pytest.mark.parametrize("library", ["ftfy", "py3langid", "rensa"])
def test_a_missing_library_is_one_line(library: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(OpenNemoError, match=f"{library} is missing: .* pip install"):
        stages(Cleaning(stages=STAGES))


def plainly(text: str) -> str:
    """The rules of `repetition` as they are written in the paper, with loops and counters."""
    words = WORDS.findall(text)
    if len(words) < 50:
        return ""
    for what, parts in (("lines", text.splitlines()), ("paragraphs", text.split("\n\n"))):
        parts, seen = [part.strip() for part in parts if part.strip()], set()
        again: list[str] = []
        for part in parts:
            if part in seen:
                again.append(part)
            seen.add(part)
        n_chars = sum(len(part) for part in again) / sum(len(part) for part in parts)
        if len(again) / len(parts) > MAX_REPEATED_LINES or n_chars > MAX_REPEATED_LINE_CHARS:
            return f"repeats {what}"
    n_chars = sum(len(word) for word in words)
    factor = 2 if n_chars / len(words) < 2 else 1
    for n in (*MAX_COMMONEST, *MAX_REPEATED):
        length = n * factor
        runs = [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]
        if n in MAX_COMMONEST:
            counts = Counter(runs)
            most = max(counts.values())
            # Of several that are equally common the paper says nothing.
            shares = {
                sum(len(w) for w in run) * most / n_chars for run, k in counts.items() if k == most
            }
            if most > 1 and min(shares) > MAX_COMMONEST[n]:
                return f"repeats {n} words"
            if most > 1 and max(shares) > MAX_COMMONEST[n]:
                return "a tie"
            continue
        seen_runs, inside = set(), set[int]()
        for i, run in enumerate(runs):
            if run in seen_runs:
                inside.update(range(i, i + length))
            seen_runs.add(run)
        if sum(len(words[i]) for i in inside) / n_chars > MAX_REPEATED[n]:
            return f"repeats {n} words"
    return ""


def test_repetition_is_what_the_paper_says():
    rng = random.Random(0)
    library = Path(sysconfig.get_path("stdlib"))
    texts = [p for f in ROOT.glob("docs/*.md") for p in f.read_text("utf-8").split("\n## ")]
    texts += [library.joinpath(f"{name}.py").read_text("utf-8") for name in ("this", "abc", "ast")]
    texts += [JAPANESE * n + "。".join(rng.sample(JAPANESE, 20)) for n in range(1, 5)]
    vocabulary = ["a", "bb", "ccc", "word", "家", "another", "\n", "\n\n", ". "]
    texts += [" ".join(rng.choices(vocabulary[:k], k=80)) for k in (2, 4, 9) for _ in range(40)]
    for _ in range(60):  # a random run of prose, again and again among other prose
        words = rng.choice(texts[:20]).split(" ")
        run = words[: rng.randint(2, 14)]
        parts = [run if rng.random() < 0.2 else [word] for word in words[:300]]
        texts.append(" ".join(word for part in parts for word in part))
    expected = [plainly(text) for text in texts]
    for text, why in zip(texts, expected, strict=True):
        if why != "a tie":
            assert repetition(text) == why, text
    found = Counter(expected)
    assert found[""] > 20
    assert {"repeats lines", "repeats 2 words", "repeats 3 words", "repeats 5 words"} <= set(found)
    assert not repetition(PROSE)


def test_equal_texts_have_equal_keys_and_others_none():
    documents = [Document(text=t, language="", text_bytes=0) for t in ("a", "b", "a", "A", "")]
    found = keys(documents, Cleaning(stages=("exact",)))
    assert found.dtype == np.uint64 and found.shape == (5, 1)
    assert len({*found[:, 0].tolist()}) == 4 and found[0] == found[2]
    assert keys(documents, Cleaning()).shape == (5, 0)
    assert keys([], Cleaning(stages=("exact",))).shape == (0, 1)


def test_near_copies_share_a_band_as_often_as_arithmetic_says():
    """1 - (1 - s^8)^14 for a Jaccard similarity of s, over 400 pairs each."""
    pytest.importorskip("rensa")
    rng = random.Random(1)
    cleaning = Cleaning(stages=("near",))
    assert keys([], cleaning).shape == (0, 14)

    def share(similarity: float) -> tuple[float, float]:
        """How similar pairs were that should be so, and how many share a band."""
        documents, found = [], []
        for _ in range(400):
            # Sequences of 5 words that are the same: as many as there is common prose in front.
            same = int(400 * 2 * similarity / (1 + similarity))
            pair = [[f"w{rng.randrange(10**9)}" for _ in range(404)] for _ in range(2)]
            pair[1][:same] = pair[0][:same]
            sets = [{tuple(words[i : i + 5]) for i in range(400)} for words in pair]
            found.append(len(sets[0] & sets[1]) / len(sets[0] | sets[1]))
            documents += [
                Document(text=" ".join(words), language="", text_bytes=0) for words in pair
            ]
        bands = keys(documents, cleaning)
        assert bands.shape == (800, 14)
        return float(np.mean(found)), float((bands[::2] == bands[1::2]).any(axis=1).mean())

    for wanted in (0.3, 0.6, 0.75, 0.9):
        similarity, n = share(wanted)
        expected = 1 - (1 - similarity**8) ** 14
        assert abs(n - expected) < 0.08, (wanted, similarity, n, expected)


def bands_of(texts: Sequence[str]) -> np.ndarray:
    documents = [Document(text=text, language="", text_bytes=0) for text in texts]
    return keys(documents, Cleaning(stages=("near",)))


def test_what_makes_texts_near_copies():
    pytest.importorskip("rensa")
    same = bands_of([PROSE, PROSE.upper(), PROSE.replace("\n", "  \n "), PROSE + " One more line."])
    assert (same[:3] == same[0]).all(), "case and blanks make a difference"
    assert (same[3] == same[0]).any()
    unlike = bands_of(["", "?!", "two words", "words two", JAPANESE, GERMAN])
    assert all(len({*column}) == 6 for column in unlike.T.tolist())
