import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# Tests never assert on times, hypothesis' own included.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# Before torch is imported: the models are tiny, and with pytest-xdist each worker has one core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Before Triton is imported: without an NVIDIA GPU its interpreter runs the kernels, on the CPU.
if not shutil.which("nvidia-smi"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

TESTS = Path(__file__).parent
# Their tests need no compiled kernel, or little of one. All others wait for a minute of compiling.
WITHOUT_KERNELS = ("tokenizer", "data", "planning", "recipes", "cluster", "evals", "train")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Where workers run the whole suite, compile kernels beside their imports and first tests."""
    whole = config.args_source == config.ArgsSource.TESTPATHS
    workers = getattr(config.option, "numprocesses", None)
    if whole and workers and not hasattr(config, "workerinput"):
        subprocess.Popen(
            [sys.executable, "-m", "tests.instructions"], cwd=TESTS.parent,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what waits for nothing; workers take files in this order."""
    items.sort(key=lambda item: item.path.relative_to(TESTS).parts[0] not in WITHOUT_KERNELS)
