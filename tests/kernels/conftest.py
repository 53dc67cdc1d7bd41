"""Tests of kernels run for every set of instructions."""

from tests.instructions import instructions  # noqa: F401  a fixture
