"""`opennemo eval` on the command line: both commands, and one line for whatever is wrong."""

import subprocess
import sys

import pytest

from opennemo.cli import main
from opennemo.evals import report
from opennemo.evals.rows import ResultRow
from tests.evals.conftest import write_lines


def command(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["opennemo", "eval", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_a_model_needs_no_word_before_it(folder, tmp_path, monkeypatch, capsys):
    write_lines(tmp_path / "texts.jsonl", [{"text": "in the winter"}])
    options = ["--suite", "ppl", "--texts", tmp_path / "texts.jsonl"]
    assert command(monkeypatch, folder, *options, "-o", tmp_path / "a") == 0
    assert command(monkeypatch, "run", *options, "-o", tmp_path / "b", folder) == 0
    out = capsys.readouterr().out
    assert out.count("bits per byte") == 2 and f"Wrote {tmp_path / 'a'}" in out
    assert report.read(tmp_path / "a") == report.read(tmp_path / "b")


def test_compare_reads_runs(tmp_path, monkeypatch, capsys):
    for name, value in (("one", 1.0), ("two", 0.0)):
        (tmp_path / name).mkdir()
        rows = [ResultRow(name="X", items={str(i): value for i in range(9)})]
        report.write(tmp_path / name, rows, name)
    assert command(monkeypatch, "compare", tmp_path / "one", tmp_path / "two", "-o", tmp_path) == 0
    assert (
        "| X | 9 | 100.0 ± 0.0 | 0.0 ± 0.0 | -100.00 ± 0.00 | 0.004 * |" in capsys.readouterr().out
    )
    assert (tmp_path / "comparison.md").exists() and (tmp_path / "scores.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--suite", "ppl", "--texts", "x"], "nowhere does not exist"),
        (["compare", "one"], "name two runs or more"),
        (["compare", "one", "two"], "one: no run that is done"),
        (["x", "--suite", "long", "--lengths", "4k"], "--lengths 4k: expected numbers"),
        (["x", "--suite", "none"], "--suite none: there are table1"),
        (["x", "--suite", "ppl", "--replicas", "2"], "need --engine ray"),
        (["http://x/v1", "--suite", "ppl", "--engine", "ray"], "needs the model itself"),
    ],
)
def test_what_is_wrong_takes_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_help_needs_no_model_and_no_extra():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "opennemo.cli", "eval", "--help"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "compare" in done.stdout
    assert "torch" not in done.stderr and "lm_eval" not in done.stderr
