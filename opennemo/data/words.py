"""How often each word occurs in texts of many languages: all that learning a vocabulary needs.

Once words are counted per language, the weights of languages, sampling by temperature and bounded
memory are arithmetic on counts. The order in which processes finish changes nothing.

It does not know what a token is. Sampling by temperature: arXiv:1907.05019. Pruned counts: Manku
and Motwani, "Approximate Frequency Counts over Data Streams" (2002).
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

import regex  # comes with tiktoken; reads \p{...} as the Rust libraries do

from opennemo.data.workers import in_order
from opennemo.errors import InvalidRequest
from opennemo.progress import Stages
from opennemo.texts import CODE, Texts, lay_out
from opennemo.tokenizer.patterns import PATTERNS
from opennemo.tokenizer.tokenizer import repair_surrogates

# With these patterns a word may begin with a space, and has no other space that is followed by
# text. So a text is first cut there, which is fast, and only different parts are matched.
CUT = re.compile(r" (?=\S)")
BATCH_CHARS = 4 << 20  # characters that a process counts at a time
MAX_WORD_CHARS = 1_000  # a longer word, such as an image in base64, teaches nothing
MAX_WEIGHED_BYTES = 1 << 30  # that all words together count as
AnyCounts = TypeVar("AnyCounts", bound="Counts")


class Counts(Protocol):
    """How often words occur, by language, in bounded memory; see WordCounts for the attributes."""

    words: dict[str, Counter[str]]
    n_bytes: Counter[str]
    n_broken: int

    def add(self, words: Mapping[str, Counter[str]]) -> None:
        """Add what occurs in a batch of texts."""
        ...


@dataclass
class WordCounts:
    """How often each word occurs, by language.

    Attributes:
        max_words: distinct words that are kept, in all languages together.
        n_bytes: of text, by language, in UTF-8.
        missed: by language, the most that any count may be too low because rare words were
            dropped to stay within `max_words`; a language that is not in it is counted exactly.
        n_broken: lines left out because they could not be read.
    """

    words: dict[str, Counter[str]] = field(default_factory=dict)
    n_bytes: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)
    n_broken: int = 0
    max_words: int = 10_000_000

    def add(self, words: Mapping[str, Counter[str]]) -> None:
        """Add counts; then drop the rarest words of the languages that have most of them."""
        for language, counts in words.items():
            self.words.setdefault(language, Counter()).update(counts)
        while sum(map(len, self.words.values())) > self.max_words:
            language = max(self.words, key=lambda name: len(self.words[name]))
            counts = self.words[language]
            threshold = sorted(counts.values())[len(counts) // 2]
            frequent = {word: n for word, n in counts.items() if n > threshold}
            self.words[language] = Counter(frequent)
            self.missed[language] += threshold

    def record(self) -> dict:
        """How many words were counted, and how exactly."""
        return {
            "distinct_words": sum(map(len, self.words.values())),
            "counts_too_low_by_at_most": dict(sorted(self.missed.items())),
        }


@dataclass
class PhraseCounts:
    """A sample of phrases, of which hardly any occurs twice, with how often each counts.

    A phrase that occurs *n* times is kept with probability *n* / *t* and then counts *t* times,
    where *t* is a power of two of its language, so that the count of any run of words is right on
    average. Phrases that occur more often than that are kept and counted. Chance is a hash of the
    phrase, so the same texts give the same sample.

    Attributes:
        max_bytes: of all phrases that are kept. A language's share is in proportion to the square
            root of what its texts count, so that neither large nor small ones lack phrases.
        weights: factors of languages, as in `weigh`; those of 0 are not kept.
        levels: by language, the logarithm of *t*; a language that is not in it is complete.
    """

    max_bytes: int
    weights: Mapping[str, float] = field(default_factory=dict)
    words: dict[str, Counter[str]] = field(default_factory=dict)
    n_bytes: Counter[str] = field(default_factory=Counter)
    levels: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    n_broken: int = 0

    def add(self, words: Mapping[str, Counter[str]]) -> None:
        """Add counts; then halve the samples that are too large until all have room."""
        for language, counts in words.items():
            known = self.words.setdefault(language, Counter())
            if self._weight(language):
                self._add(language, known, counts)
        while self.sizes.total() > self.max_bytes:
            language = max(self.sizes, key=self._excess)
            self.levels[language] += 1
            before, self.words[language], self.sizes[language] = self.words[language], Counter(), 0
            self._add(language, self.words[language], before)

    def _excess(self, language: str) -> float:
        return self.sizes[language] ** 2 / (self.n_bytes[language] * self._weight(language))

    def _weight(self, language: str) -> float:
        return self.weights.get(language, self.weights.get("*", 1.0))

    def record(self) -> dict:
        """How many phrases were kept, and of which languages only some."""
        one_of = {language: 1 << level for language, level in sorted(self.levels.items())}
        return {"phrases": sum(map(len, self.words.values())), "one_phrase_kept_of": one_of}

    def _add(self, language: str, known: Counter[str], counts: Mapping[str, int]) -> None:
        level = self.levels[language]
        salt, least = bytes([level]), 1 << level
        for phrase, n in counts.items():
            if phrase not in known:
                data = phrase.encode()
                if n < least and _chance(data, salt) % least >= n:
                    continue
                self.sizes[language] += len(data)
            known[phrase] = known[phrase] + n if phrase in known else max(n, least)


def _chance(data: bytes, salt: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, salt=salt).digest(), "big")


def compiled(pattern: str) -> regex.Pattern[str]:
    """The pattern, checked to lose nothing of a text that it splits.

    Raises:
        InvalidRequest: it does not compile, has groups, or matches some character nowhere.
    """
    try:
        split = regex.compile(pattern)
    except regex.error as error:
        names = ", ".join(PATTERNS)
        raise InvalidRequest(
            f"the pattern {pattern!r} is not one of {names} and does not compile: {error}"
        ) from error
    if split.groups:
        raise InvalidRequest(f"the pattern {pattern!r} has groups: write (?:...) for (...)")
    sample = "".join(chr(c) for c in (*range(0xD800), *range(0xE000, 0x30000)))
    if left := split.sub("", sample):
        raise InvalidRequest(f"the pattern {pattern!r} would lose {left[0]!r} of a text")
    return split


def count_words(
    texts: Texts,
    pattern: str,
    result: AnyCounts,
    *,
    layouts: Sequence[str] = ("document",),
    processes: int = 1,
    report: Stages | None = None,
) -> AnyCounts:
    """Split all texts, written in the layouts in turn, into words, and count them into `result`.

    More processes change nothing but the time.
    """
    say = report or (lambda stage, done, total: None)
    what = "Counting words" if isinstance(result, WordCounts) else "Counting phrases"
    read = texts.read(lambda n: say(what, n, texts.n_bytes))
    laid_out = _in_turns(read, layouts)
    for words in in_order(partial(_count, pattern), _batches(laid_out, result.n_bytes), processes):
        result.add(words)
    result.n_broken = texts.n_broken
    if not any(result.words.values()):
        raise InvalidRequest(f"no text to learn from ({result.n_broken:,} lines were unreadable)")
    return result


def _in_turns(
    texts: Iterable[tuple[str, str]], layouts: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """The texts of each language in the layouts in turn; source code stays as it is."""
    n_texts = Counter[str]()
    for language, text in texts:
        layout = layouts[n_texts[language] % len(layouts)]
        n_texts[language] += 1
        if language.startswith(CODE):
            yield language, text
        else:
            yield from ((language, part) for part in lay_out(text, layout))


def _batches(
    texts: Iterable[tuple[str, str]], n_bytes: Counter[str]
) -> Iterator[list[tuple[str, str]]]:
    batch, size = [], 0
    for language, text in texts:
        try:
            n_bytes[language] += len(text.encode())
        except UnicodeEncodeError:  # JSON can contain "\\ud800"
            text = repair_surrogates(text)
            n_bytes[language] += len(text.encode())
        batch.append((language, text))
        size += len(text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    yield batch


def _count(pattern: str, batch: list[tuple[str, str]]) -> dict[str, Counter[str]]:
    words: dict[str, Counter[str]] = {}
    parts: dict[str, Counter[str]] = {}
    find = regex.compile(pattern).findall  # from the library's cache after the first time
    can_cut = pattern in PATTERNS.values()
    for language, text in batch:
        first, *others = CUT.split(text) if can_cut else [text]
        words.setdefault(language, Counter()).update(find(first))
        parts.setdefault(language, Counter()).update(others)
    for language, counts in words.items():
        for n, equally_often in _by_count(parts[language]).items():
            # Every part begins with the space that it was cut at.
            for word, m in Counter(find(" " + " ".join(equally_often))).items():
                counts[word] += m * n
        for word in [word for word in counts if len(word) > MAX_WORD_CHARS]:
            del counts[word]
    return words


def _by_count(counts: Mapping[str, int]) -> dict[int, list[str]]:
    groups: dict[int, list[str]] = {}
    for each, n in counts.items():
        groups.setdefault(n, []).append(each)
    return groups


def weigh(
    counts: Counts, temperature: float = 1.0, weights: Mapping[str, float] | None = None
) -> dict[str, int]:
    """The words of all languages, each with how often it is to count.

    All counts together stay as they are, up to `MAX_WEIGHED_BYTES`; only shares change. They are
    rounded by carrying the rest over to the next word: rounding each by itself would drop most
    of the languages without spaces, whose words hardly occur twice.
    """
    weights = weights or {}
    others = weights.get("*", 1.0)
    if unknown := weights.keys() - counts.words.keys() - {"*"}:
        raise InvalidRequest(f"weights for languages without texts: {', '.join(sorted(unknown))}")
    due = {
        language: n ** (1 / temperature) * weights.get(language, others)
        for language, n in counts.n_bytes.items()
    }
    if not (all_due := sum(due.values())):
        raise InvalidRequest("the weights of all languages are 0")
    scale = min(MAX_WEIGHED_BYTES, counts.n_bytes.total()) / all_due
    factors = {name: due[name] * scale / counts.n_bytes[name] for name in sorted(counts.words)}
    if {*factors.values()} == {1.0}:
        total = Counter[str]()
        for language in factors:
            total.update(counts.words[language])
        return total
    weighed: dict[str, float] = {}
    for language, factor in factors.items():
        for word, n in counts.words[language].items():
            weighed[word] = weighed.get(word, 0.0) + n * factor
    carry, whole = 0.5, {}
    for word in sorted(weighed):
        carry += weighed[word]
        n = int(carry)
        carry -= n
        if n:
            whole[word] = n
    return whole
