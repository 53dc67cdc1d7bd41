"""A number of a report together with the items that it was computed from.

Every suite measures one value for each item, so means, standard errors, tables and comparisons of
runs are written once, and two runs can be compared item by item.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

MISSING = "no data"


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """The weighted mean of its items' values."""

    name: str  # of the benchmark
    part: str = ""  # of it: a language, a category, a length
    setting: str = ""  # what was measured, and how
    items: Mapping[str, float]  # value by item
    weights: Mapping[str, float] | None = None  # by item; bytes of texts, for instance
    percent: bool = True  # values are shares, shown as 0 to 100
    also: Mapping[str, float] = field(default_factory=dict)  # other measures of the same answers
    announced: Mapping[str, float] = field(default_factory=dict)  # by model
    trouble: Mapping[str, int] = field(default_factory=dict)  # what went wrong, how many times

    @property
    def key(self) -> str:
        return f"{self.name} {self.part}".strip()

    @property
    def n(self) -> int:
        return len(self.items)

    @property
    def score(self) -> float | None:
        """None where nothing was measured."""
        return self._scaled(mean_and_error(self.items, self.weights)[0])

    @property
    def error(self) -> float | None:
        """The standard error of the score."""
        return self._scaled(mean_and_error(self.items, self.weights)[1])

    def _scaled(self, value: float | None) -> float | None:
        return None if value is None else value * (100 if self.percent else 1)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "n": self.n, "score": self.score, "error": self.error}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "ResultRow":
        return cls(**{name: value[name] for name in cls.__dataclass_fields__})


def mean_and_error(
    values: Mapping[str, float], weights: Mapping[str, float] | None = None
) -> tuple[float | None, float | None]:
    """The weighted mean, and its standard error where there are two items or more."""
    if not values:
        return None, None
    weight = {key: 1.0 if weights is None else weights[key] for key in values}
    total, n = sum(weight.values()), len(values)
    mean = sum(weight[key] * value for key, value in values.items()) / total
    if n == 1:
        return mean, None
    squares = sum((weight[key] * (value - mean)) ** 2 for key, value in values.items())
    return mean, math.sqrt(squares * n / (n - 1)) / total


def count(reasons: Iterable[str]) -> dict[str, int]:
    """How often each reason was given, the commonest first."""
    return dict(Counter(reasons).most_common())


def gather(
    name: str, values: Mapping[str, float | str], *, parts: Callable[[str], str] | None = None,
    **settings: Any,
) -> list[ResultRow]:  # fmt: skip
    """Rows of values by item, one for each part; a text for a value says why there is none."""
    grouped: dict[str, dict[str, float | str]] = {}
    for item, value in values.items():
        grouped.setdefault(parts(item) if parts else "", {})[item] = value
    return [
        ResultRow(
            name=name,
            part=part,
            items={k: v for k, v in group.items() if not isinstance(v, str)},
            trouble=count(v for v in group.values() if isinstance(v, str)),
            **settings,
        )
        for part, group in grouped.items()
    ]
