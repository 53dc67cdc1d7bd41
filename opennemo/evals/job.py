"""What every suite gets beside the model, and what it returns."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from opennemo.errors import InvalidRequest
from opennemo.evals.benchmark_data import BenchmarkData
from opennemo.evals.rows import ResultRow
from opennemo.evals.runs import Run


@dataclass(frozen=True, kw_only=True)
class Job:
    """One measurement of one model."""

    run: Run
    suite: str = ""
    data: BenchmarkData = field(default_factory=BenchmarkData)
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    chat: bool = False  # prompts are laid out as conversations, as instruct models are used
    device: str | None = None

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
