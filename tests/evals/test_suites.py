"""A suite has one place: an entry with its options, and a module."""

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Annotated, Any

import typer
from typer.testing import CliRunner

from opennemo.cli.evals import with_suites
from opennemo.evals import report
from opennemo.evals.evaluate import evaluate
from opennemo.evals.rows import gather
from opennemo.evals.runs import Run
from opennemo.evals.suites import SUITES, Option, Outcome, Request, Suite


@dataclass(frozen=True, kw_only=True)
class Toys:
    marbles: Annotated[int, Option("how many there are.")] = 3
    swing: Annotated[bool, Option("whether there is one.")] = False


def test_a_toy_suite_is_measured_and_has_its_options(folder, tmp_path, monkeypatch):
    toys: Any = ModuleType("opennemo.evals.toys")

    def measure(llm: Any, request: Request, run: Run) -> Outcome:
        return Outcome(gather("toys", {str(i): 1.0 for i in range(request.options.marbles)}))

    toys.measure = measure
    monkeypatch.setitem(sys.modules, toys.__name__, toys)
    monkeypatch.setitem(SUITES, "toys", Suite(module="toys", options=Toys))
    evaluate(Request(model=str(folder), suite="toys", options=Toys(marbles=5), output=tmp_path), [])
    (row,) = report.read(tmp_path)[1]
    assert (row.name, row.n) == ("toys", 5)

    app = typer.Typer(rich_markup_mode=None)

    @app.command()
    @with_suites
    def run(suite: str, **own: Any) -> None:
        print(own["marbles"], own["swing"])

    shown = " ".join(CliRunner().invoke(app, ["--help"]).output.split())
    assert "toys: how many there are." in shown and "--no-swing" not in shown
    result = CliRunner().invoke(app, ["toys", "--marbles", "7", "--swing"])
    assert result.output.split() == ["7", "True"]
