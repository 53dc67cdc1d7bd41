"""Runs side by side: differences on the same items, their errors, and whether they may be chance.

Two models that answer the same questions differ by far less than their standard errors
suggest, so the difference is taken item by item. Its p-value is McNemar's exact one where values
are right or wrong, else of a normal distribution, and is corrected for the number of rows (Holm).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import NormalDist

from opennemo.errors import InvalidRequest
from opennemo.evals.report import Cells, score
from opennemo.evals.rows import ResultRow, mean_and_error

LEVEL = 0.05


@dataclass(frozen=True)
class Difference:
    """The difference between one row of two runs, on the items that both have."""

    n: int
    value: float  # in the row's own unit
    error: float | None
    p: float  # that a difference as large is chance


def difference(before: ResultRow, after: ResultRow) -> Difference | None:
    """None where there is no item that both have."""
    common = before.items.keys() & after.items.keys()
    steps = {key: after.items[key] - before.items[key] for key in sorted(common)}
    value, error = mean_and_error(steps, before.weights)
    if value is None:
        return None
    unit = 100 if before.percent else 1
    exact = all(v in (0.0, 1.0) for row in (before, after) for v in row.items.values())
    gains, losses = (sum(step * sign > 0 for step in steps.values()) for sign in (1, -1))
    p = mcnemar(gains, losses) if exact else _normal(value, error)
    return Difference(len(steps), unit * value, None if error is None else unit * error, p)


def mcnemar(gains: int, losses: int) -> float:
    """How likely a split as uneven is when gains and losses are equally likely."""
    n = gains + losses
    tail = sum(math.comb(n, k) for k in range(min(gains, losses) + 1)) / 2**n
    return min(1.0, 2 * tail)


def _normal(value: float, error: float | None) -> float:
    if not error:
        return 1.0 if value == 0 or error is None else 0.0
    return 2 * NormalDist().cdf(-abs(value) / error)


def holm(values: Sequence[float]) -> list[float]:
    """p-values corrected so that one false alarm in all of them stays as unlikely as in one."""
    order = sorted(range(len(values)), key=values.__getitem__)
    scaled = (min(1.0, (len(values) - rank) * values[i]) for rank, i in enumerate(order))
    return [p for _, p in sorted(zip(order, accumulate(scaled, max), strict=True))]


def side_by_side(runs: Mapping[str, Sequence[ResultRow]]) -> Cells:
    """A line for each row that all have, differences from the first run, and the mean of all."""
    (base_name, base), *others = ((name, {r.key: r for r in rows}) for name, rows in runs.items())
    keys = [k for k in base if all(k in rows for _, rows in others) and base[k].items]
    if not keys:
        raise InvalidRequest("these runs have no benchmark in common")
    columns = [
        ["benchmark", *keys, f"mean of {len(keys)}"],
        ["items", *(f"{base[key].n:,}" for key in keys), ""],
        [base_name, *(score(base[key]) for key in keys), _mean(base, keys)],
    ]
    for name, rows in others:
        steps = [difference(base[key], rows[key]) for key in keys]
        taken = [step for step in steps if step] or [Difference(0, 0.0, None, 1.0)]
        corrected = iter(holm([step.p for step in taken]))
        error = math.sqrt(sum((step.error or 0) ** 2 for step in taken)) / len(taken)
        value = sum(step.value for step in taken) / len(taken)
        shown = [_signed(step.value, step.error) if step else "-" for step in steps]
        chances = [_p(next(corrected)) if step else "" for step in steps]
        columns += [
            [name, *(score(rows[key]) for key in keys), _mean(rows, keys)],
            ["difference", *shown, _signed(value, error)],
            ["p", *chances, _p(_normal(value, error))],
        ]
    lines = [list(line) for line in zip(*columns, strict=True)]
    alike = len({base[key].percent for key in keys}) == 1 < len(keys)  # else a mean is meaningless
    return lines if alike else lines[:-1]


def _mean(rows: Mapping[str, ResultRow], keys: Sequence[str]) -> str:
    scores = [row_score for key in keys if (row_score := rows[key].score) is not None]
    return f"{sum(scores) / len(scores):.1f}" if scores else "-"


def _signed(value: float, error: float | None) -> str:
    return f"{value:+.2f}" + ("" if error is None else f" ± {error:.2f}")


def _p(value: float) -> str:
    return ("< 0.001" if value < 0.001 else f"{value:.3f}") + (" *" if value < LEVEL else "")
