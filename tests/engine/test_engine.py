"""Requests that every engine refuses, with a reason."""

import pytest

from opennemo.engine import LocalEngine, SamplingParams
from opennemo.errors import InvalidRequest


def test_bad_requests_are_refused_with_a_reason(model):
    engine = LocalEngine(model, [])
    for prompt, message in (([], "empty"), ([320], "vocabulary"), ([-1], "vocabulary")):
        with pytest.raises(InvalidRequest, match=message):
            engine.submit(prompt, SamplingParams(), print)
    with pytest.raises(InvalidRequest, match="stop_ids"):
        engine.submit([1], SamplingParams(stop_ids=frozenset({320})), print)
    with pytest.raises(InvalidRequest, match="logit_bias"):
        engine.submit([1], SamplingParams(logit_bias={320: 1.0}), print)
    with pytest.raises(InvalidRequest, match="n is 17, allowed is 1 to 16"):
        engine.submit([1], SamplingParams(), print, n=17)
