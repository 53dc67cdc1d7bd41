"""Runs side by side: differences item by item, and their significance."""

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opennemo.errors import InvalidRequest
from opennemo.evals.compare import difference, holm, mcnemar, side_by_side
from tests.evals.conftest import row


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_the_exact_binomial_test(gains, losses):
    stats = pytest.importorskip("scipy.stats", reason="the extra `eval` is not installed")
    expected = stats.binomtest(gains, gains + losses).pvalue if gains + losses else 1.0
    assert mcnemar(gains, losses) == pytest.approx(expected)


def test_a_difference_is_taken_item_by_item():
    before = row([1, 0, 1, 0, 1, 0, 1, 1.0])
    after = replace(before, items={**before.items, "1": 1.0, "8": 0.0})  # one gain, one more item
    found = difference(before, after)
    assert found and (found.n, found.value, found.p) == (8, 12.5, 1.0)
    assert found.error == pytest.approx(12.5)  # far below that of either score
    assert difference(before, row([])) is None
    same = difference(row([0.2, 0.4]), row([0.2, 0.4]))
    assert same and (same.value, same.p) == (0, 1)


def test_holm_corrects_for_the_number_of_rows():
    # The worked example of Holm (1979) in most textbooks.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_runs_stand_side_by_side_and_only_what_differs_is_starred():
    rng = Random(1)
    base = [row([float(rng.random() < 0.5) for _ in range(200)], name=name) for name in "AB"]
    worse = [base[0], replace(base[1], items=dict.fromkeys(base[1].items, 0.0))]
    lines = side_by_side({"one": base, "two": worse})
    assert lines[0] == ["benchmark", "items", "one", "two", "difference", "p"]
    assert lines[1][4:] == ["+0.00 ± 0.00", "1.000"] and lines[2][5] == "< 0.001 *"
    assert lines[3][0] == "mean of 2" and lines[3][4].startswith("-")
    with pytest.raises(InvalidRequest, match="no benchmark in common"):
        side_by_side({"one": base, "two": [row([1.0], name="C")]})
