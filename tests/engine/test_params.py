"""Every number of SamplingParams has bounds."""

import pytest

from opennemo.engine import SamplingParams
from opennemo.errors import InvalidRequest


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1), ("top_p", 0), ("max_tokens", 0), ("min_p", float("nan"))],
)
def test_numbers_out_of_bounds_are_refused_by_name(name, value):
    with pytest.raises(InvalidRequest, match=name):
        SamplingParams(**{name: value})
