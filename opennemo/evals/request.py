"""What is measured, as every suite gets it, and what a suite returns."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opennemo.errors import InvalidRequest
from opennemo.evals.rows import ResultRow


@dataclass(frozen=True, kw_only=True)
class Request:
    """A suite of questions to a model."""

    model: str  # a folder, a .gguf, an id of the hub, or the address of a server
    suite: str
    options: Any = None  # the suite's own (suites.py); None: its defaults
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    data: Path | None = None
    output: Path | None = None
    device: str | None = None
    chat: bool = False  # prompts are laid out as conversations, as instruct models are used
    model_name: str | None = None  # at a server
    key: str = "none"
    tokenizer: str | None = None  # of a server's model
    kv_format: str | None = None
    kv_scale: float | None = None

    def chosen(self, names: Sequence[str], default: Sequence[str] | None = None) -> Sequence[str]:
        """The tasks that were asked for, else the default ones, else all.

        Raises:
            InvalidRequest: a task that was asked for is not among the names.
        """
        if unknown := [task for task in self.tasks if task not in names]:
            raise InvalidRequest(f"--tasks {', '.join(unknown)}: there are {', '.join(names)}")
        return self.tasks or default or names


@dataclass(frozen=True)
class Outcome:
    """What a suite measured."""

    rows: list[ResultRow]
    items: list[dict[str, Any]] = field(default_factory=list)  # the answers one by one
    notes: list[str] = field(default_factory=list)  # what must stand beside the rows
