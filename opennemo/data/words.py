"""How often each word occurs in texts of many languages: all that learning a vocabulary needs.

One idea makes it simple: once words are counted per language, the weights of languages, sampling
by temperature and bounded memory are arithmetic on counts. The order in which processes finish
changes nothing.

It does not know what a token is. Sampling by temperature: arXiv:1907.05019. Pruned counts: Manku
and Motwani, "Approximate Frequency Counts over Data Streams" (2002).
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import regex  # comes with tiktoken; reads \p{...} as the Rust libraries do

from opennemo.data.workers import in_order
from opennemo.errors import InvalidRequest
from opennemo.progress import Stages
from opennemo.texts import Texts
from opennemo.tokenizer.patterns import PATTERNS
from opennemo.tokenizer.tokenizer import repair_surrogates

# With these patterns a word may begin with a space, and nowhere else does it hold a space that is
# followed by something. So a text is cut there first, fast, and only different parts are matched.
CUT = re.compile(r" (?=\S)")
BATCH_CHARS = 4 << 20  # characters that a process counts at a time
MAX_WORD_CHARS = 1_000  # a longer word, such as an image in base64, teaches nothing
MAX_WEIGHED_BYTES = 1 << 30  # that all words together count as


@dataclass
class WordCounts:
    """How often each word occurs, by language.

    Attributes:
        n_bytes: of text, by language, in UTF-8.
        missed: by language, the most that any count may be too low because rare words were
            dropped to stay within `max_words`; a language that is not in it is counted exactly.
        n_broken: lines left out because they could not be read.
    """

    words: dict[str, Counter[str]] = field(default_factory=dict)
    n_bytes: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)
    n_broken: int = 0

    def add(self, words: Mapping[str, Counter[str]], max_words: int) -> None:
        """Add counts; then drop the rarest words of the languages that have most of them."""
        for language, counts in words.items():
            self.words.setdefault(language, Counter()).update(counts)
        while sum(map(len, self.words.values())) > max_words:
            language = max(self.words, key=lambda name: len(self.words[name]))
            counts = self.words[language]
            threshold = sorted(counts.values())[len(counts) // 2]
            frequent = {word: n for word, n in counts.items() if n > threshold}
            self.words[language] = Counter(frequent)
            self.missed[language] += threshold


def compiled(pattern: str) -> regex.Pattern[str]:
    """The pattern, sure to lose nothing of a text that is split with it.

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
    texts: Texts, pattern: str, max_words: int, *, processes: int = 1, report: Stages | None = None
) -> WordCounts:
    """Split all texts into words and count them; more processes change nothing but the time."""
    result = WordCounts()
    say = report or (lambda stage, done, total: None)
    batches = _batches(texts, result.n_bytes, lambda n: say("Counting words", n, texts.n_bytes))
    for words in in_order(partial(_count, pattern), batches, processes):
        result.add(words, max_words)
    result.n_broken = texts.n_broken
    if not any(result.words.values()):
        raise InvalidRequest(f"no text to learn from ({result.n_broken:,} lines were unreadable)")
    return result


def _batches(
    texts: Texts, n_bytes: Counter[str], report: Callable[[int], None]
) -> Iterator[list[tuple[str, str]]]:
    batch, size = [], 0
    for language, text in texts.read(report):
        try:
            n_bytes[language] += len(text.encode())
        except UnicodeEncodeError:  # JSON can say "\\ud800"
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
            # Every part began with the space that it was cut at.
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
    counts: WordCounts, temperature: float = 1.0, weights: Mapping[str, float] | None = None
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
