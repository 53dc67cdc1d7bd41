"""Test data: where they are looked for, and what an error names."""

import pytest

from opennemo.errors import InvalidRequest
from opennemo.evals.benchmark_data import BenchmarkData, read_lines


def test_data_that_are_not_there_say_where_to_get_them(tmp_path):
    with pytest.raises(InvalidRequest, match="no such folder"):
        BenchmarkData(tmp_path / "none")
    with pytest.raises(InvalidRequest, match=r"x\.jsonl is not in .*from example.org"):
        BenchmarkData(tmp_path).find("x.jsonl", "example.org")
    with pytest.raises(InvalidRequest, match=r"x\.jsonl is needed"):
        BenchmarkData(None).find("x.jsonl", "example.org")
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n\n{"a"', "utf-8")
    with pytest.raises(InvalidRequest, match=r"x\.jsonl, line 3: not JSON"):
        read_lines(tmp_path / "x.jsonl")
