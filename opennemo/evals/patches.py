"""Changes to other packages while ours uses them; no other file in `evals` changes a package.

    lm-eval 0.4.13           shows bars and logs of its own, with no setting against the bars
    datasets 5               finds a data set by a path only in the working directory
    bfcl-eval 2026.3.23      imports every vendor's client beside its checker of calls, and keeps
                             the simulated services of a conversation as globals of a module

Each is undone when the block ends, except BFCL's table of models, which is missing otherwise.
tests/evals/test_patches.py fails when one of these changes no longer works.
"""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

from opennemo.errors import OpenNemoError

BFCL_MODEL = "opennemo"  # in the checker's table, as one whose names have "_" for "."
CONVERSATIONS = count()
LOGGERS = ("lm_eval", "lm-eval", "datasets", "fsspec")


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Inside, lm-eval and datasets show no bars and log errors alone."""
    import datasets
    import lm_eval.api.task

    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    bars = datasets.is_progress_bar_enabled()
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with patch.object(lm_eval.api.task, "tqdm", lambda docs, **_: docs):
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if bars:
            datasets.enable_progress_bars()


@contextmanager
def datasets_from(root: Path, cache: str) -> Iterator[None]:
    """Inside, `datasets.load_dataset` reads a folder that is laid out like the hub, and no hub.

    Args:
        cache: a name for what was read; the library takes from its cache by name, whatever
            the files contain now.
    """
    import datasets
    import datasets.config

    load, caches = datasets.load_dataset, Path(datasets.config.HF_DATASETS_CACHE)

    def load_from(path: str, *arguments: Any, **options: Any) -> Any:
        if not (root / path).is_dir():
            raise FileNotFoundError(f"{path} is not in the folder")
        return load(str(root / path), *arguments, **options | {"cache_dir": caches / cache})

    with patch.object(datasets, "load_dataset", load_from):
        yield


def call_checker() -> Callable[..., dict[str, Any]]:
    """BFCL's `ast_checker`, which must be installed, beside a table of models without clients."""
    name = "bfcl_eval.constants.model_config"
    if find_spec("bfcl_eval") is None:
        raise OpenNemoError("BFCL is missing: pip install --no-deps bfcl-eval==2026.3.23")
    if name not in sys.modules:
        table: Any = ModuleType(name)
        table.MODEL_CONFIG_MAPPING = {BFCL_MODEL: SimpleNamespace(underscore_to_dot=True)}
        sys.modules[name] = table
    return bfcl("eval_checker.ast_eval.ast_checker").ast_checker


def bfcl(module: str) -> Any:
    """A module of BFCL's, which may not be installed where types are checked."""
    return import_module(f"bfcl_eval.{module}")


@contextmanager
def bfcl_services() -> Iterator[str]:
    """A model's name that no conversation had before; its services are forgotten at the end."""
    name = f"{BFCL_MODEL}{next(CONVERSATIONS)}"
    kept = vars(bfcl("eval_checker.multi_turn_eval.multi_turn_utils"))
    try:
        yield name
    finally:
        for key in [key for key in list(kept) if key.startswith(f"{name}_")]:
            del kept[key]
