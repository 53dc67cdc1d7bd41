"""Learn a byte-level BPE vocabulary from text in many languages, as Tekken was, or extend one.

One idea makes it simple: words.py says how often each word counts, and merging.py turns that into
merges. The same texts and settings give the same file, byte for byte.

It does not know where texts lie (texts.py), nor how ids are made of a vocabulary (tekken.py).
BPE: arXiv:1508.07909.
"""

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from opennemo.data.merging import learn_merges
from opennemo.data.words import Report, WordCounts, compiled, count_words, weigh
from opennemo.errors import InvalidRequest
from opennemo.texts import Texts
from opennemo.tokenizer.patterns import PATTERNS
from opennemo.tokenizer.saving import save_huggingface
from opennemo.tokenizer.tekken import SINGLE_BYTES, Tekken


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
        max_words: distinct words held in memory, about 0.6 kB each while merges are learned.
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
    except (OSError, ValueError, RecursionError) as error:
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
        if not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise InvalidRequest(f"{file}: the weight of {language} is {weight!r}, not a number")
    return VocabularySettings(**settings)


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
    spell = base and (lambda word: [id - n_special for id in base.encode(word)])
    made = learn_merges(words, n_tokens, known, spell, report)
    if len(made) < n_tokens:
        raise InvalidRequest(
            f"the texts are too small: they make {len(made):,} tokens of several bytes, "
            f"{n_tokens - len(made):,} fewer than the vocabulary has room for"
        )
    layout = {"version": base.version, "special_tokens": base.special_tokens} if base else {}
    tokenizer = Tekken(pattern, [*known, *made], n_special=n_special, **layout)
    return Trained(tokenizer, _record(settings, counts, len(known)))


def _record(settings: VocabularySettings, counts: WordCounts, n_known: int) -> dict:
    return {
        "settings": asdict(settings),
        "learned_by": f"opennemo {version('opennemo')}",
        "first_new_rank": n_known,
        "unreadable_lines": counts.n_broken,
        "bytes": dict(sorted(counts.n_bytes.items())),
        "distinct_words": sum(map(len, counts.words.values())),
        "counts_too_low_by_at_most": dict(sorted(counts.missed.items())),
    }
