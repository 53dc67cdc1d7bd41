"""Tables, files and plots: the same numbers in every form."""

import csv
from dataclasses import replace

import pytest

from opennemo.evals import report
from opennemo.evals.rows import gather
from tests.evals.conftest import row


def test_what_is_missing_is_counted_and_never_scored():
    (found,) = gather("X", {"a": 1.0, "b": "no answer in 1 s", "c": 0.0, "d": "no answer in 1 s"})
    assert (found.n, found.score, found.trouble) == (2, 50.0, {"no answer in 1 s": 2})
    (none,) = gather("X", {"a": "broken"})
    assert none.score is None and report.score(none) == "-"
    line = report.cells([found], "m")[1]
    assert line[-1] == "no answer in 1 s: 2"


def test_reports_hold_the_same_numbers_in_every_form(tmp_path):
    rows = [
        row([1.0, 0.0, 1.0], name="A", announced={"NeMo": 83.5}, also={"acc": 12.0}),
        row([2.5, 3.0], name="marks | of 10", percent=False, trouble={"no mark": 3}),
        row([0.7, 0.9], part="fr", percent=False, weights={"0": 10.0, "1": 30.0}),
    ]
    report.write(tmp_path, rows, "tiny", ["A note."])
    name, again = report.read(tmp_path)
    assert name == "tiny" and again == rows
    lines = list(csv.DictReader((tmp_path / "results.csv").open(newline="")))
    assert float(lines[0]["score"]) == pytest.approx(200 / 3) and lines[1]["trouble"] == "3"
    text = (tmp_path / "results.md").read_text("utf-8")
    assert "66.7 ± 33.3" in text and "2.75 ± 0.25" in text and "0.850" in text
    assert r"marks \| of 10" in text and "A note." in text and report.CAVEAT in text


def test_plots_are_written_as_png_and_svg(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `eval` is not installed")
    announced = {"NeMo": 60.0, "Gemma": 50.0, "Llama": 40.0}
    rows = [row([1.0, 0.0], part=part, announced=announced) for part in ("fr", "de")]
    other = [replace(r, items={"0": 1.0}) for r in rows]
    report.bars(tmp_path, {"one": rows, "two": other, "three": other})
    cells = {f"X/{n}/{d}/0": float(d > 0) for n in (512, 1024) for d in (0, 50, 100)}
    report.heat_map(tmp_path, gather("X", cells))
    report.bars(tmp_path / "nothing", {"one": [row([])]})  # nothing to draw
    for name in ("scores", "heatmap"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "NeMo" in (tmp_path / "scores.svg").read_text("utf-8") or name == "heatmap"
    assert not (tmp_path / "nothing").exists()
