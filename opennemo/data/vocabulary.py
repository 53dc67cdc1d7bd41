"""Learn a byte-level BPE vocabulary from text in many languages, as Tekken was, or extend one.

words.py says how often each word counts, and merging.py turns that into merges. The same texts and
settings give the same file, byte for byte.

It does not know where texts are (texts.py) or how a vocabulary encodes text (tekken.py).
BPE: arXiv:1508.07909.
"""

import tomllib
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from opennemo.data.merging import learn_merges
from opennemo.data.words import PhraseCounts, WordCounts, compiled, count_words, weigh
from opennemo.errors import InvalidRequest, named_problems
from opennemo.files import write_json
from opennemo.progress import Stages
from opennemo.texts import Texts
from opennemo.tokenizer.patterns import PATTERNS, SUPERWORDS
from opennemo.tokenizer.saving import save_huggingface
from opennemo.tokenizer.tekken import SINGLE_BYTES, Tekken


class VocabularySettings(BaseModel):
    """The vocabulary to learn.

    Attributes:
        vocab_size: ids in all, control tokens included.
        n_special: ids reserved for control tokens.
        pattern: a name in `PATTERNS` or a regular expression that splits text into words.
        temperature: a language of n bytes counts as n ** (1 / temperature): 1 takes the texts as
            they are, a higher one gives small languages more.
        weights: factors on top of that, by language; that of "*" is for all others.
        max_words: distinct words held in memory, about 0.6 kB each while merges are learned.
        layouts: how texts are written when words are counted, the texts of a language in turns.
        superwords: learn the later tokens across spaces; the pattern then splits less.
        transition: ids when that begins, by default 11 of 16.
        token_words: the most words that a superword may hold.
        superword_weights: in place of `weights` while superwords are learned; by default the same.
        sample_bytes: of different phrases that are kept to learn superwords from, each about 40
            bytes of memory.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    vocab_size: int = 131_072
    n_special: Annotated[int, Field(ge=0)] = 1_000
    pattern: str = "tekken"
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = {}
    max_words: Annotated[int, Field(ge=1000)] = 10_000_000
    layouts: Annotated[list[Literal["document", "paragraph", "sentence"]], Field(min_length=1)] = [
        "document"
    ]
    superwords: bool = False
    transition: int | None = None
    token_words: Annotated[int, Field(ge=2)] = 4
    superword_weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = {}
    sample_bytes: Annotated[int, Field(ge=10_000)] = 80_000_000

    @model_validator(mode="after")
    def _has_room(self) -> Self:
        if self.vocab_size <= self.n_special + 256:
            raise ValueError(
                f"a vocabulary of {self.vocab_size:,} has no room for 256 bytes and "
                f"{self.n_special:,} control tokens (at least {self.n_special + 257:,})"
            )
        if not self.superwords:
            return self
        if self.pattern not in SUPERWORDS:
            raise ValueError(
                f"superwords are known for the pattern {', '.join(SUPERWORDS)}, "
                f"not for {self.pattern!r}"
            )
        least = self.n_special + 257
        if not least <= self.transition_size < self.vocab_size:
            raise ValueError(
                f"transition must be from {least:,} to {self.vocab_size - 1:,}, "
                f"not {self.transition_size:,}"
            )
        return self

    @property
    def transition_size(self) -> int:
        """Ids of the vocabulary that superwords are added to."""
        return self.vocab_size * 11 // 16 if self.transition is None else self.transition


def make_settings(file: Path | None = None, **changes: Any) -> VocabularySettings:
    """The settings in a TOML file, by default none, with some of them changed.

    Raises:
        InvalidRequest: it is not TOML, or a setting is unknown or has a value that is not allowed.
    """
    where = f"{file}: " if file else ""
    try:
        tree = tomllib.loads(file.read_text("utf-8")) if file else {}
        return VocabularySettings(**(tree | changes))
    except ValidationError as error:
        raise InvalidRequest(f"{where}{named_problems(error.errors(include_url=False))}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{where}cannot be read as TOML ({error})") from error


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
        write_json(folder / "training.json", self.record)


def train(
    texts: Texts,
    settings: VocabularySettings,
    *,
    base: Tekken | None = None,
    processes: int = 1,
    report: Stages | None = None,
) -> Trained:
    """Learn a vocabulary, or with `base` extend one: its ids, pattern and control tokens stay.

    Superwords extend a vocabulary of words, whose pattern is replaced first.

    Raises:
        InvalidRequest: settings that cannot be met, or texts that are unreadable or too small.
    """
    learn = partial(_learn, texts, processes=processes, report=report)
    if not settings.superwords:
        return learn(settings, base)
    if base:
        raise InvalidRequest("superwords change the pattern, so they cannot extend a vocabulary")
    words = learn(settings.model_copy(update={"vocab_size": settings.transition_size}), None)
    first = Tekken(
        SUPERWORDS[settings.pattern], words.tokenizer.tokens, n_special=settings.n_special
    )
    trained = learn(settings, first)
    return Trained(trained.tokenizer, trained.record | {"before_superwords": words.record})


def _learn(
    texts: Texts,
    settings: VocabularySettings,
    base: Tekken | None,
    *,
    processes: int,
    report: Stages | None,
) -> Trained:
    pattern = base.pattern if base else PATTERNS.get(settings.pattern, settings.pattern)
    compiled(pattern)
    n_special = base.n_special if base else settings.n_special
    given = base.tokens if base else SINGLE_BYTES
    n_tokens = settings.vocab_size - n_special - len(given)
    if n_tokens <= 0:
        raise InvalidRequest(
            f"the vocabulary to extend has {n_special + len(given):,} ids already, "
            f"{settings.vocab_size:,} is not more"
        )
    across = pattern in SUPERWORDS.values()
    weights = settings.weights
    if across:
        weights = settings.superword_weights or weights
        counts = PhraseCounts(settings.sample_bytes, weights)
    else:
        counts = WordCounts(max_words=settings.max_words)
    counting = {"layouts": settings.layouts, "processes": processes, "report": report}
    count_words(texts, pattern, counts, **counting)
    words = weigh(counts, settings.temperature, weights)
    spell = base and (lambda word: [id - n_special for id in base.encode(word)])
    if base and across:
        base.expect_corpus()
    most_words = settings.token_words if across else None
    made = learn_merges(words, n_tokens, given, spell, report, most_words)
    if len(made) < n_tokens:
        raise InvalidRequest(
            f"the texts are too small: they make {len(made):,} tokens of several bytes, "
            f"{n_tokens - len(made):,} fewer than the vocabulary has room for"
        )
    layout = {"version": base.version, "special_tokens": base.special_tokens} if base else {}
    tokenizer = Tekken(pattern, [*given, *made], n_special=n_special, **layout)
    return Trained(tokenizer, _record(settings, counts, len(given)))


def _record(settings: VocabularySettings, counts: WordCounts | PhraseCounts, n_known: int) -> dict:
    return {
        "settings": settings.model_dump(),
        "learned_by": f"opennemo {version('opennemo')}",
        "first_new_rank": n_known,
        "unreadable_lines": counts.n_broken,
        "bytes": dict(sorted(counts.n_bytes.items())),
        **counts.record(),
    }
