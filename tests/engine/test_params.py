"""Every number of SamplingParams has bounds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opennemo.engine import SamplingParams
from opennemo.engine.repetition import Repetition, Runs
from opennemo.errors import InvalidRequest


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1), ("top_p", 0), ("max_tokens", 0), ("min_p", float("nan"))],
)
def test_numbers_out_of_bounds_are_refused_by_name(name, value):
    with pytest.raises(InvalidRequest, match=name):
        SamplingParams(**{name: value})


@given(
    st.lists(st.integers(0, 2), max_size=24),
    st.integers(1, 6), st.integers(1, 6), st.integers(2, 5),
)  # fmt: skip
def test_a_repetition_is_a_pattern_over_and_over_at_the_end(tokens, most, least, count):
    """As vLLM finds it: the first size of a pattern that stands `count` times at the end."""
    least = min(least, most)
    detection = Repetition(max_pattern_size=most, min_pattern_size=least, min_count=count)
    runs = Runs(detection)
    for n in range(1, len(tokens) + 1):
        answer = tokens[:n]
        expected = any(
            n >= size * count and answer[-size * count :] == answer[-size:] * count
            for size in range(least, most + 1)
        )
        assert runs.add(answer[-1]) == expected


@pytest.mark.parametrize(
    ("numbers", "name"),
    [((0, 1, 2), "max_pattern_size"), ((4, 5, 2), "min_pattern_size"), ((4, 1, 1), "min_count")],
)
def test_a_repetition_has_bounds(numbers, name):
    most, least, count = numbers
    with pytest.raises(InvalidRequest, match=f"repetition_detection.{name} is"):
        Repetition(max_pattern_size=most, min_pattern_size=least, min_count=count)


def test_a_repetition_may_be_an_object():
    params = SamplingParams(repetition_detection={"max_pattern_size": 4, "min_count": 3})  # pyright: ignore[reportArgumentType]
    assert params.repetition_detection == Repetition(max_pattern_size=4, min_count=3)
    for wrong in (5, {"min_count": 3}, {"max_pattern_size": "4"}, {"max_pattern_size": 4, "n": 1}):
        with pytest.raises(InvalidRequest, match=r"repetition_detection is .*allowed is an object"):
            SamplingParams(repetition_detection=wrong)  # pyright: ignore[reportArgumentType]
