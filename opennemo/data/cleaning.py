"""Cleaning of texts before a model learns from them, as stages to choose from.

A stage is a function from a list of documents to a list of the same length. It changes a document,
or records in it why it is left out; a stage has no other state. So any number of processes of any
engine gives the same result, and the report is a count of what the documents record. Stages do not
look for copies of a text elsewhere: `keys` gives what copies have in common, and preparation.py
compares them.

Mending is ftfy's, naming languages py3langid's, signatures are rensa's. Repetition: the rules of
Gopher (arXiv:2112.11446, table A1). Near copies: bands of MinHash signatures as for FineWeb
(arXiv:2406.17557): 14 of 8, which find 92 of 100 texts that share 80 % of their 5-word sequences.
"""

import hashlib
import re
import unicodedata
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from opennemo.errors import InvalidRequest, OpenNemoError

STAGES = ("mojibake", "nfc", "identify", "repetition", "exact", "near")  # in the order they run
IDENTIFY_CHARS = 1000  # of a text by which its language is identified
SHINGLE, BANDS, ROWS = 5, 14, 8
MIN_WORDS = 50  # of a text that the rules of repetition fit; Gopher has no shorter ones
# Thai to Khmer, kana and Han put no space between words: there each character counts as a word.
UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff"
    r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
)
WORDS = re.compile(rf"[^\W{UNSPACED}]+|[{UNSPACED}]")
# Of Gopher: the most of a text's characters that may lie in its commonest sequence of n words, and
# in sequences of n words that occurred before; the most lines and paragraphs that did.
MAX_COMMONEST = {2: 0.20, 3: 0.18, 4: 0.16}
MAX_REPEATED = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
MAX_REPEATED_LINES, MAX_REPEATED_LINE_CHARS = 0.30, 0.20


@dataclass(frozen=True, kw_only=True)
class Cleaning:
    """Which stages run, in the order of `STAGES`, and their limits.

    Attributes:
        stages: mojibake mends text that was decoded wrongly; nfc composes characters; identify
            names the language of texts whose file does not; repetition leaves out texts that
            repeat themselves; exact and near leave out copies of texts that came before.
        languages: leave out texts of any other; none keeps all.
        min_chars, max_chars: leave out texts that are shorter or longer, counted after mending.
    """

    stages: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    min_chars: int = 1
    max_chars: int | None = None

    def __post_init__(self) -> None:
        if unknown := [name for name in self.stages if name not in STAGES]:
            raise InvalidRequest(
                f"no stage {unknown[0]!r} of cleaning (there are {', '.join(STAGES)})"
            )
        if not 1 <= self.min_chars <= (self.max_chars or self.min_chars):
            raise InvalidRequest(
                f"lengths from {self.min_chars} to {self.max_chars} characters hold no text"
            )


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text that goes through the stages.

    Attributes:
        text_bytes: of the text in UTF-8, as it was read.
        changes: the stages that changed the text.
        dropped: why it is left out; "" if it is kept.
    """

    text: str
    language: str
    source: str = ""
    licence: str = ""
    text_bytes: int
    changes: tuple[str, ...] = ()
    dropped: str = ""


Stage = Callable[[list[Document]], list[Document]]


def stages(cleaning: Cleaning) -> list[Stage]:
    """The stages that were chosen, ready to run in this process.

    Raises:
        OpenNemoError: a library that one of them needs is missing.
    """
    chosen = set(cleaning.stages)
    functions: list[Callable[[Document], Document]] = []
    try:
        if "mojibake" in chosen:
            functions.append(_mojibake())
        if "nfc" in chosen:
            functions.append(_nfc)
        functions.append(_length(cleaning.min_chars, cleaning.max_chars))
        if "identify" in chosen:
            functions.append(_identify())
        if cleaning.languages:
            functions.append(_languages(frozenset(cleaning.languages)))
        if "repetition" in chosen:
            functions.append(_repetition)
        if "near" in chosen:
            import rensa  # noqa: F401  raises now if it is missing
    except ModuleNotFoundError as error:
        raise OpenNemoError(
            f"{error.name} is missing: cleaning needs more packages; in the checkout: "
            "pip install -e '.[train]'"
        ) from None
    return [_of_each(function) for function in functions]


def keys(documents: Sequence[Document], cleaning: Cleaning) -> np.ndarray:
    """What copies have in common: (S, K) uint64, where K is 0, 1, 14 or 15.

    With "exact", column 0 is equal for equal texts. With "near", each of the last 14 columns is
    equal for most texts that are nearly the same: they share 8 values of their signatures.
    """
    columns = []
    if "exact" in cleaning.stages:
        exact = [_hash(document.text.encode("utf-8", "replace")) for document in documents]
        columns.append(np.array(exact, np.uint64)[:, None])
    if "near" in cleaning.stages:
        bands = [_bands(document.text) for document in documents]
        columns.append(np.array(bands, np.uint64).reshape(-1, BANDS))
    return np.hstack(columns) if columns else np.zeros((len(documents), 0), np.uint64)


def repetition(text: str) -> str:
    """The first of Gopher's rules that a text breaks; "" if none, or it has fewer than 50 words."""
    words = WORDS.findall(text)
    if len(words) < MIN_WORDS:
        return ""
    for what, parts in (("lines", text.splitlines()), ("paragraphs", text.split("\n\n"))):
        parts = [part for part in map(str.strip, parts) if part]
        n_chars, unique = sum(map(len, parts)), set(parts)
        again = 1 - len(unique) / max(1, len(parts))
        chars_again = 1 - sum(map(len, unique)) / max(1, n_chars)
        if again > MAX_REPEATED_LINES or chars_again > MAX_REPEATED_LINE_CHARS:
            return f"repeats {what}"
    codes, widths = _codes(words), np.array([len(word) for word in words])
    # Where most words are single characters, two of them are about a word.
    factor = 2 if widths.mean() < 2 else 1
    for n, most in MAX_COMMONEST.items():
        sequences = _sequences(codes, n * factor)
        values, counts = np.unique(sequences, return_counts=True)
        count, begin = counts.max(), int((sequences == values[counts.argmax()]).argmax())
        if count > 1 and count * widths[begin : begin + n * factor].sum() > most * widths.sum():
            return f"repeats {n} words"
    for n, most in MAX_REPEATED.items():
        sequences = _sequences(codes, n * factor)
        again = np.ones(len(sequences), bool)
        again[np.unique(sequences, return_index=True)[1]] = False
        borders = np.zeros(len(words) + 1, np.int64)  # +1 where one begins, -1 where one ends
        borders[: len(again)] += again
        borders[n * factor :] -= again
        share = widths[np.cumsum(borders)[:-1] > 0].sum() / widths.sum()
        if share > most:
            return f"repeats {n} words"
        if share <= min(MAX_REPEATED.values()):  # longer ones can only lie within these
            break
    return ""


def _of_each(function: Callable[[Document], Document]) -> Stage:
    return lambda documents: [d if d.dropped else function(d) for d in documents]


def _mojibake() -> Callable[[Document], Document]:
    import ftfy
    from ftfy.badness import is_bad

    # Only what was decoded wrongly: quotes, ligatures and widths are the author's.
    nothing_else = dict.fromkeys(
        ("unescape_html", "remove_terminal_escapes", "fix_latin_ligatures", "fix_character_width",
         "uncurl_quotes", "fix_line_breaks", "remove_control_chars", "explain"), False
    )  # fmt: skip
    config = ftfy.TextFixerConfig(**nothing_else, normalization=None)  # pyright: ignore[reportArgumentType]

    def mend(document: Document) -> Document:
        text = document.text
        if text.isascii() or not is_bad(text):  # ftfy would check it line by line
            return document
        return _changed(document, "mojibake", ftfy.fix_text(text, config))

    return mend


def _nfc(document: Document) -> Document:
    return _changed(document, "nfc", unicodedata.normalize("NFC", document.text))


def _changed(document: Document, what: str, text: str) -> Document:
    if text == document.text:
        return document
    return replace(document, text=text, changes=(*document.changes, what))


def _length(least: int, most: int | None) -> Callable[[Document], Document]:
    def check(document: Document) -> Document:
        n_chars = len(document.text.strip())
        if n_chars < least:
            return replace(document, dropped="too short" if n_chars else "empty")
        return replace(document, dropped="too long") if most and n_chars > most else document

    return check


def _identify() -> Callable[[Document], Document]:
    from py3langid import classify

    def name(document: Document) -> Document:
        if document.language:
            return document
        return replace(document, language=str(classify(document.text[:IDENTIFY_CHARS])[0]))

    return name


def _languages(allowed: frozenset[str]) -> Callable[[Document], Document]:
    def check(document: Document) -> Document:
        return document if document.language in allowed else replace(document, dropped="language")

    return check


def _repetition(document: Document) -> Document:
    broken = repetition(document.text)
    return replace(document, dropped=broken) if broken else document


def _bands(text: str) -> list[int]:
    """A number for each of the 14 bands of the signature of a text's 5-word sequences."""
    from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]

    words = WORDS.findall(text.lower())
    if not words:  # only copies have the same
        return [_hash(text.encode("utf-8", "replace"))] * BANDS
    sequences = _sequences(_codes(words), min(SHINGLE, len(words)))
    signature = RMinHash.digest_matrix_from_flat_token_hashes(
        sequences, [0, len(sequences)], BANDS * ROWS, 1
    )
    rows = np.array(signature.to_rows(), np.uint32).reshape(BANDS, ROWS)
    return [_hash(band.tobytes()) for band in rows]


def _codes(words: Sequence[str]) -> np.ndarray:
    """A number for each word (W,) uint64, the same in every process."""
    return np.array([zlib.crc32(word.encode("utf-8", "replace")) for word in words], np.uint64)


def _sequences(codes: np.ndarray, n: int) -> np.ndarray:
    """A number for each n words in a row: (W,) -> (W - n + 1,) uint64."""
    result = np.zeros(len(codes) - n + 1, np.uint64)
    for i in range(n):  # a polynomial modulo 2^64, its bits then mixed as in splitmix64
        result = result * np.uint64(0x9E3779B97F4A7C15) + codes[i : len(codes) - n + 1 + i] + 1
    result = (result ^ result >> 30) * np.uint64(0xBF58476D1CE4E5B9)
    return result ^ result >> 27


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
