"""Learn a byte-level BPE vocabulary from text in many languages, as Tekken was, or extend one.

One idea makes it simple: words.py says how often each word counts, and a Rust library turns that
into merges. The same texts and settings give the same file, byte for byte.

It does not know where texts lie (texts.py), nor how ids are made of a vocabulary (tekken.py).
BPE: arXiv:1508.07909.
"""

import json
import logging
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tokenizers

from opennemo.errors import InvalidRequest
from opennemo.tokenizer.huggingface import save_huggingface
from opennemo.tokenizer.tekken import SINGLE_BYTES, Tekken
from opennemo.tokenizer.texts import Texts
from opennemo.tokenizer.words import PATTERNS, Report, WordCounts, compiled, count_words, weigh

try:
    import rustbpe
except ImportError:  # no wheel for this platform: `tokenizers` does it, three times as slowly
    rustbpe = None

SEPARATOR = "\0"  # between words on their way into a library; a word that has it is left out


@dataclass(frozen=True, kw_only=True)
class VocabularySettings:
    """What vocabulary to learn.

    Attributes:
        vocab_size: ids in all, control tokens included.
        n_special: ids reserved for control tokens.
        pattern: a name in `PATTERNS` or a regular expression that splits text into words.
        temperature: a language of n bytes counts as n ** (1 / temperature): 1 takes the texts as
            they are, a higher one gives small languages more.
        weights: factors on top of that, by language; that of "*" is for all others.
        max_words: distinct words held in memory, about 1 kB each while merges are learned.
    """

    vocab_size: int = 131_072
    n_special: int = 1_000
    pattern: str = "tekken"
    temperature: float = 1.0
    weights: Mapping[str, float] = field(default_factory=dict)
    max_words: int = 10_000_000

    def __post_init__(self) -> None:
        if self.vocab_size <= self.n_special + 256:
            raise InvalidRequest(
                f"a vocabulary of {self.vocab_size:,} has no room for 256 bytes and "
                f"{self.n_special:,} control tokens (at least {self.n_special + 257:,})"
            )
        if not self.temperature > 0 or not all(0 <= w < math.inf for w in self.weights.values()):
            raise InvalidRequest("temperature must be above 0, weights finite and not below 0")
        if self.max_words < 1000:
            raise InvalidRequest(f"max_words is {self.max_words}, but must be 1,000 or more")


def read_settings(file: Path, **changes: int | float | str) -> VocabularySettings:
    """The settings in a TOML file, with some of them changed.

    Raises:
        InvalidRequest: it is no TOML, or has a setting that does not exist or is of another type.
    """
    try:
        settings: dict[str, Any] = tomllib.loads(file.read_text("utf-8")) | changes
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{file}: cannot be read as TOML ({error})") from error
    defaults = asdict(VocabularySettings())
    for name, value in settings.items():
        if name not in defaults:
            raise InvalidRequest(f"{file}: no setting {name!r} (there are {', '.join(defaults)})")
        kind = (int, float) if name == "temperature" else type(defaults[name])
        if not isinstance(value, kind) or isinstance(value, bool):
            raise InvalidRequest(
                f"{file}: {name} is {value!r}, but must be of the type of {defaults[name]!r}"
            )
    for language, weight in settings.get("weights", {}).items():
        if not isinstance(weight, int | float):
            raise InvalidRequest(f"{file}: the weight of {language} is {weight!r}, not a number")
    return VocabularySettings(**settings)


def learn(
    words: Iterable[tuple[str, int]], n_tokens: int, report: Report | None = None
) -> list[bytes]:
    """The first `n_tokens` tokens of more than one byte that BPE makes of these words."""
    if rustbpe is None:
        return learn_on_top(words, n_tokens, SINGLE_BYTES, lambda w: list(w.encode()), report)
    trainer = rustbpe.Tokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    with _progress_of(logging.getLogger("rustbpe"), report):
        # Some pairs make the same bytes, such as "a"+"bc" and "ab"+"c": ask for a few more.
        trainer.train_from_iterator(
            _blocks(words, lambda word: word),
            vocab_size=256 + n_tokens + n_tokens // 50 + 64,
            pattern=f"[^{SEPARATOR}]+",
        )
    ranks = trainer.get_mergeable_ranks()
    return _enough(list(dict.fromkeys(bytes(token) for token, _ in ranks))[256:], n_tokens)


def learn_on_top(
    words: Iterable[tuple[str, int]],
    n_tokens: int,
    tokens: Sequence[bytes],
    encode: Callable[[str], Sequence[int]],
    report: Report | None = None,
) -> list[bytes]:
    """`n_tokens` more tokens for a vocabulary that makes words into ranks by `encode`.

    Each rank is written as one character, so that the `tokenizers` library, which knows nothing
    of bytes, goes on merging where the vocabulary stops.
    """
    symbol_of = [chr(c if c < 0xD800 else c + 0x800) for c in range(256, 256 + len(tokens))]
    bytes_of = dict(zip(symbol_of, tokens, strict=True))
    if report:
        report("learning merges", math.nan)
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Split(SEPARATOR, "removed")  # pyright: ignore[reportAttributeAccessIssue]
    trained.train_from_iterator(
        _blocks(words, lambda word: "".join(symbol_of[rank] for rank in encode(word))),
        tokenizers.trainers.BpeTrainer(  # pyright: ignore[reportCallIssue]
            vocab_size=len(tokens) + n_tokens + n_tokens // 50 + 64,
            initial_alphabet=symbol_of,
            show_progress=False,
        ),
    )
    merges = json.loads(trained.to_str())["model"]["merges"]
    made = (b"".join(bytes_of[symbol] for symbol in "".join(pair)) for pair in merges)
    old = set(tokens)
    return _enough([token for token in dict.fromkeys(made) if token not in old], n_tokens)


def _enough(tokens: list[bytes], n_tokens: int) -> list[bytes]:
    if len(tokens) < n_tokens:
        raise InvalidRequest(
            f"the texts are too small: they make {len(tokens):,} tokens of several bytes, "
            f"{n_tokens - len(tokens):,} fewer than the vocabulary has room for"
        )
    return tokens[:n_tokens]


def _blocks(words: Iterable[tuple[str, int]], spell: Callable[[str], str]) -> Iterator[str]:
    """The words as text, each as often as it counts: libraries take texts, not counts."""
    block, size = [], 0
    for word, n in words:
        if SEPARATOR in word:
            continue
        spelled = spell(word) + SEPARATOR
        block.append(spelled * n)
        size += len(spelled) * n
        if size >= 1 << 16:
            yield "".join(block)
            block, size = [], 0
    yield "".join(block)


@contextmanager
def _progress_of(logger: logging.Logger, report: Report | None) -> Iterator[None]:
    """Pass on what the library logs of its progress: it has no other way to tell."""

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if report and (percent := re.match(r"Progress: (\d+)%", record.getMessage())):
                report("learning merges", int(percent[1]) / 100)

    listener, level, propagate = Listener(), logger.level, logger.propagate
    logger.addHandler(listener)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(listener)
        logger.setLevel(level)
        logger.propagate = propagate


@dataclass(frozen=True)
class Trained:
    """A vocabulary, and a record of what it was learned from, to be kept beside it."""

    tokenizer: Tekken
    record: dict

    def save(self, folder: Path) -> None:
        """Write `tekken.json`, `tokenizer.json` with its config (same ids), and `training.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(folder / "tekken.json")
        save_huggingface(self.tokenizer, folder)
        record = json.dumps(self.record, indent=1, ensure_ascii=False)
        (folder / "training.json").write_text(record + "\n", encoding="utf-8")


def train(
    texts: Texts,
    settings: VocabularySettings,
    *,
    base: Tekken | None = None,
    processes: int = 1,
    report: Report | None = None,
) -> Trained:
    """Learn a vocabulary, or with `base` extend one: its ids, pattern and control tokens stay.

    Raises:
        InvalidRequest: settings that cannot be met, or texts that are unreadable or too small.
    """
    pattern = base.pattern if base else PATTERNS.get(settings.pattern, settings.pattern)
    compiled(pattern)
    n_special = base.n_special if base else settings.n_special
    known = base.tokens if base else SINGLE_BYTES
    n_tokens = settings.vocab_size - n_special - len(known)
    if n_tokens <= 0:
        raise InvalidRequest(
            f"the vocabulary to extend has {n_special + len(known):,} ids already, "
            f"{settings.vocab_size:,} is not more"
        )
    counts = count_words(texts, pattern, settings.max_words, processes=processes, report=report)
    words = weigh(counts, settings.temperature, settings.weights)
    if base:
        ranks = lambda word: [id - n_special for id in base.encode(word)]  # noqa: E731
        tokens = [*known, *learn_on_top(words, n_tokens, known, ranks, report)]
        tokenizer = Tekken(
            pattern, tokens, version=base.version, special_tokens=base.special_tokens,
            n_special=n_special,
        )  # fmt: skip
    else:
        tokens = [*known, *learn(words, n_tokens, report)]
        tokenizer = Tekken(pattern, tokens, n_special=n_special)
    return Trained(tokenizer, _record(settings, counts, len(known)))


def _record(settings: VocabularySettings, counts: WordCounts, n_known: int) -> dict:
    library = "rustbpe" if rustbpe and n_known == 256 else "tokenizers"
    return {
        "settings": asdict(settings),
        "learned_by": f"{library} {version(library)}",
        "first_new_rank": n_known,
        "unreadable_lines": counts.n_broken,
        "bytes": dict(sorted(counts.n_bytes.items())),
        "distinct_words": sum(map(len, counts.words.values())),
        "counts_too_low_by_at_most": dict(sorted(counts.missed.items())),
    }
