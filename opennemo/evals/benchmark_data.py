"""Where test data come from: the Hugging Face hub, or a folder given with --data.

The folder is laid out like the hub (`cais/mmlu/README.md`, `cais/mmlu/anatomy/test.jsonl`, ...), by
itself or as `hub/` in a folder with other files beside it (`mt_bench/question.jsonl`). The
harness's own task files load it unchanged.
"""

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from opennemo.errors import InvalidRequest
from opennemo.evals.runs import digest


class BenchmarkData:
    """Test data, local or not."""

    def __init__(self, folder: Path | None = None):
        """Raises InvalidRequest if there is no such folder."""
        self.folder = folder and folder.expanduser().resolve()
        if self.folder and not self.folder.is_dir():
            raise InvalidRequest(f"--data {folder}: there is no such folder")

    def find(self, name: str, source: str) -> Path:
        """A file beside the hub's tree; where it is missing, the error names the source."""
        if path := self.look(name):
            return path
        where = f"{name} is not in {self.folder}" if self.folder else f"{name} is needed"
        raise InvalidRequest(f"{where}: get it from {source} and name its folder with --data")

    def look(self, name: str) -> Path | None:
        """A file beside the hub's tree, if there is one."""
        folders = (self.folder, self.folder.parent) if self.folder else ()
        return next((folder / name for folder in folders if (folder / name).exists()), None)

    def lines(self, name: str, source: str) -> list[dict[str, Any]]:
        """The objects of a JSON lines file."""
        return read_lines(self.find(name, source))

    def has(self, name: str) -> bool:
        """Whether the folder has a data set of the hub; True without a folder: the hub is asked."""
        return self.folder is None or (self._root / name).is_dir()

    @property
    def _root(self) -> Path:
        """The root of the tree that is laid out like the hub."""
        assert self.folder
        return self.folder / "hub" if (self.folder / "hub").is_dir() else self.folder

    def as_hub(self) -> AbstractContextManager[None]:
        """Inside, the harness reads the folder's data sets, and the hub is not asked."""
        if self.folder is None:
            return nullcontext()
        from opennemo.evals.patches import datasets_from

        root = self._root
        states = [(file, file.stat()) for file in sorted(root.rglob("*.*"))]
        files = [(str(file), state.st_size, state.st_mtime_ns) for file, state in states]
        return datasets_from(root, f"local-{digest(files)}")


def report_lacking(lacking: Mapping[str, str], n: int) -> None:
    """Print what benchmarks lack, by name; raises InvalidRequest if all `n` lack something."""
    if len(lacking) == n:
        raise InvalidRequest("; ".join(f"{name} {lack}" for name, lack in lacking.items()))
    for name, lack in lacking.items():
        print(f"{name} is left out: it {lack}.")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file; raises InvalidRequest, which names a line that is not."""
    try:
        lines = path.read_text("utf-8").split("\n")  # not at U+2028, which texts may hold
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path}: {error}") from None
    objects = []
    for number, line in enumerate(lines, 1):
        try:
            objects += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise InvalidRequest(f"{path}, line {number}: not JSON ({error})") from None
    return objects
