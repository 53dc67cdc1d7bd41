"""The package runs beside older PyTorch, and its parts without packages that others need."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What no part but the command line, the server, evaluation and the preparation of texts needs.
APART = [
    "anthropic", "fastapi", "fastokens", "ftfy", "gguf", "httptools", "huggingface_hub",
    "llguidance", "lm_eval", "matplotlib", "multipart", "openai", "opentelemetry",
    "prometheus_client", "py3langid", "pyarrow", "pydantic_settings", "ray", "rensa", "starlette",
    "structlog", "tensorboardX", "transformers", "triton", "typer", "uvicorn", "uvloop",
]  # fmt: skip
FALLBACKS = [
    "tests/model/test_attention.py", "tests/train/test_objectives.py",
    "tests/model/test_parallel.py::test_ranks_that_share_a_window_attend_as_one",
]  # fmt: skip
GRAPHICS = ["opennemo.kernels.gpu", "opennemo.model.gpu_step"]  # Triton is for them


def run(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def imports(*modules: str, without: list[str]) -> None:
    run(
        "import sys, importlib\n"
        f"sys.modules.update(dict.fromkeys({without}))\n"  # None: importing it raises
        "sys.path.insert(0, 'benchmarks')\n"
        f"for name in {list(modules)}: importlib.import_module(name)\n"
        "import os; os._exit(0)\n"  # unloading takes as long as importing
    )


def modules(package: str) -> list[str]:
    """Modules of a package, except those about GGUF files, grammars, recipes or a GPU."""
    files = sorted((ROOT / "opennemo" / package).glob("*.py"))
    names = [f"opennemo.{package}.{file.stem}" for file in files if file.stem != "__init__"]
    texts = dict(zip(names, (f.read_text() for f in files if f.stem != "__init__"), strict=True))
    return [
        name
        for name in names
        if not re.search(r"^(import|from) (gguf|triton|llguidance|pydantic)\b", texts[name], re.M)
        and name not in GRAPHICS
        and not re.search(r"^from opennemo\.\S*(gguf|grammar|train\.config)", texts[name], re.M)
    ]


def test_model_engine_and_training_need_few_packages():
    found = [*modules("model"), *modules("engine"), *modules("train")]
    wanted = {"opennemo.model.step", "opennemo.engine.local", "opennemo.train.trainer"}
    assert wanted <= set(found)
    imports(*found, without=[*APART, "pydantic", "rich"])


def test_benchmarks_of_a_card_need_no_more():
    imports("gpu_check", "gpu_training", without=[*APART, "pydantic", "rich"])
    imports("gpu", without=[*APART, "pydantic"])


def test_recipes_need_pydantic_besides():
    imports("opennemo.train.config", "opennemo.train.run", "training", "memory", without=APART)


@pytest.mark.slow
def test_older_pytorch_gives_the_same():
    """The very tests of what has a fallback, where PyTorch is as old as 2.11."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.older_pytorch", *FALLBACKS],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
