"""Means and standard errors of items."""

from random import Random

import pytest

from opennemo.evals.rows import mean_and_error
from tests.evals.conftest import row


def test_means_and_errors_are_the_harness_own():
    metrics = pytest.importorskip("lm_eval.api.metrics", reason="the extra `eval` is missing")
    values = [Random(0).random() for _ in range(50)]
    mean, error = mean_and_error(row(values).items)
    assert mean == pytest.approx(metrics.mean(values))
    assert error == pytest.approx(metrics.mean_stderr(values))


def test_a_weighted_mean_is_the_ratio_of_sums():
    items, weights = {"a": 0.5, "b": 2.0}, {"a": 300.0, "b": 100.0}
    mean, error = mean_and_error(items, weights)
    assert mean == pytest.approx((150 + 200) / 400) and error
    assert mean_and_error({}) == (None, None) and mean_and_error({"a": 3.0}) == (3.0, None)
