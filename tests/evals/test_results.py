"""Rows, comparisons, reports and runs: from values of items to what is written down."""

import csv
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opennemo.errors import InvalidRequest, OpenNemoError
from opennemo.evals import report
from opennemo.evals.benchmark_data import BenchmarkData, read_lines
from opennemo.evals.compare import difference, holm, mcnemar, side_by_side
from opennemo.evals.rows import ResultRow, gather, mean_and_error
from opennemo.evals.runs import Run, digest, fingerprint


def row(values: list[float], **fields) -> ResultRow:
    return ResultRow(**{"name": "X", "items": {str(i): v for i, v in enumerate(values)}} | fields)


def test_means_and_errors_are_the_harness_own():
    metrics = pytest.importorskip("lm_eval.api.metrics", reason="the extra `eval` is missing")
    values = [Random(0).random() for _ in range(50)]
    mean, error = mean_and_error(row(values).items)
    assert mean == pytest.approx(metrics.mean(values))
    assert error == pytest.approx(metrics.mean_stderr(values))


def test_a_weighted_mean_is_the_ratio_of_sums():
    items, weights = {"a": 0.5, "b": 2.0}, {"a": 300.0, "b": 100.0}
    mean, error = mean_and_error(items, weights)
    assert mean == pytest.approx((150 + 200) / 400) and error
    assert mean_and_error({}) == (None, None) and mean_and_error({"a": 3.0}) == (3.0, None)


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_the_exact_binomial_test(gains, losses):
    stats = pytest.importorskip("scipy.stats", reason="the extra `eval` is not installed")
    expected = stats.binomtest(gains, gains + losses).pvalue if gains + losses else 1.0
    assert mcnemar(gains, losses) == pytest.approx(expected)


def test_a_difference_is_taken_item_by_item():
    before = row([1, 0, 1, 0, 1, 0, 1, 1.0])
    after = replace(before, items={**before.items, "1": 1.0, "8": 0.0})  # one gain, one more item
    found = difference(before, after)
    assert found and (found.n, found.value, found.p) == (8, 12.5, 1.0)
    assert found.error == pytest.approx(12.5)  # far below that of either score
    assert difference(before, row([])) is None
    same = difference(row([0.2, 0.4]), row([0.2, 0.4]))
    assert same and (same.value, same.p) == (0, 1)


def test_holm_corrects_for_the_number_of_rows():
    # The worked example of Holm (1979) in most textbooks.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_runs_stand_side_by_side_and_only_what_differs_is_starred():
    rng = Random(1)
    base = [row([float(rng.random() < 0.5) for _ in range(200)], name=name) for name in "AB"]
    worse = [base[0], replace(base[1], items=dict.fromkeys(base[1].items, 0.0))]
    lines = side_by_side({"one": base, "two": worse})
    assert lines[0] == ["benchmark", "items", "one", "two", "difference", "p"]
    assert lines[1][4:] == ["+0.00 ± 0.00", "1.000"] and lines[2][5] == "< 0.001 *"
    assert lines[3][0] == "mean of 2" and lines[3][4].startswith("-")
    with pytest.raises(InvalidRequest, match="no benchmark in common"):
        side_by_side({"one": base, "two": [row([1.0], name="C")]})


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


def test_a_run_remembers_answers_and_drops_a_torn_line(tmp_path):
    run = Run(tmp_path / "run", {"limit": 3})
    run.note("a", [1.5, True])
    run.note("é", "text\nof two lines")
    with (tmp_path / "run" / "answers.jsonl").open("ab") as file:
        file.write(b'["c", "cut o')  # a kill in the middle of a line
    with pytest.raises(InvalidRequest, match="another process"):
        Run(tmp_path / "run", {"limit": 3})
    run.close()
    again = Run(tmp_path / "run", {"limit": 3})
    assert (again.n_known, again.recall("a"), again.recall("c")) == (2, [1.5, True], None)
    again.note("c", "whole")
    again.close()
    assert Run(tmp_path / "run", {"limit": 3}).recall("c") == "whole"
    with pytest.raises(InvalidRequest, match="limit 3, not 4"):
        Run(tmp_path / "run", {"limit": 4})


def test_a_damaged_run_is_named_and_kept(tmp_path):
    run = Run(tmp_path, {"limit": 3})
    run.note("a", 1)
    run.close()
    answers, config = tmp_path / "answers.jsonl", tmp_path / "config.json"
    answers.write_bytes(answers.read_bytes() + b'["b", \n')
    with pytest.raises(InvalidRequest, match=r"answers.jsonl, line 2: damaged"):
        Run(tmp_path, {"limit": 3})
    for text in ("", '{"settings": {', "[1]", '{"settings": {}}'):
        config.write_text(text, "utf-8")
        with pytest.raises(InvalidRequest, match=r"config.json: not what a run writes"):
            Run(tmp_path, {"limit": 3})
        (tmp_path / "results.json").write_text(text, "utf-8")
        with pytest.raises(InvalidRequest, match=r"results.json: not what a run writes"):
            report.read(tmp_path)
    assert answers.read_bytes().startswith(b'["a", 1]')


def test_questions_are_asked_once_and_failures_again(tmp_path):
    asked = []

    def ask(question: int) -> int:
        asked.append(question)
        if question == 2 and asked.count(2) == 1:
            raise OpenNemoError("no answer")
        return question * 10

    for known in (0, 3):
        run = Run(tmp_path, {})
        assert run.n_known == known
        answers = run.ask_all("Asking", [1, 2, 3, 4], key=lambda q: digest(q), ask=ask)
        run.close()
        assert [a for a in answers if not isinstance(a, OpenNemoError)] == (
            [10, 20, 30, 40] if known else [10, 30, 40]
        )
    assert sorted(asked) == [1, 2, 2, 3, 4]
    with pytest.raises(ZeroDivisionError):  # a defect of ours is not taken for an answer
        Run(tmp_path, {}).ask_all("Asking", [0], key=digest, ask=lambda q: 1 / q)


def test_a_model_that_was_written_anew_is_another(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"22")
    assert fingerprint(tmp_path) != before


def test_data_that_are_not_there_say_where_to_get_them(tmp_path):
    with pytest.raises(InvalidRequest, match="no such folder"):
        BenchmarkData(tmp_path / "none")
    with pytest.raises(InvalidRequest, match=r"x\.jsonl is not in .*from example.org"):
        BenchmarkData(tmp_path).find("x.jsonl", "example.org")
    with pytest.raises(InvalidRequest, match=r"x\.jsonl is needed"):
        BenchmarkData(None).find("x.jsonl", "example.org")
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n\n{"a"', "utf-8")
    with pytest.raises(InvalidRequest, match=r"x\.jsonl, line 3: not JSON"):
        read_lines(tmp_path / "x.jsonl")


def test_a_killed_evaluation_goes_on_where_it_was(folder, llm, hub, tmp_path):
    """SIGKILL in the middle: the same command gives the same results, and asks only the rest."""
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    from opennemo.evals.harness import OpenNemoLM
    from opennemo.evals.suites import TABLE1
    from opennemo.evals.tables import measure

    tasks = ["HellaSwag", "NaturalQuestions", "CommonsenseQA"]
    command = [sys.executable, "-m", "opennemo.cli", "eval", str(folder), "--suite", "table1"]
    command += ["--tasks", ",".join(tasks), "--data", str(hub), "-o", str(tmp_path)]
    start = lambda: subprocess.Popen(command, text=True, stdout=-1, stderr=-1)  # noqa: E731
    killed, answers = start(), tmp_path / "answers.jsonl"
    while killed.poll() is None and not (answers.exists() and answers.stat().st_size > 500):
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    n_before = answers.read_bytes().count(b"\n")
    again = start()
    out, error = again.communicate()
    assert again.returncode == 0, error
    assert "| HellaSwag | 0-shot, acc_norm | 5 |" in out and "| 83.5 |" in out
    assert report.CAVEAT in out
    assert n_before > 0 and "were answered before" in error
    wanted = [benchmark for benchmark in TABLE1 if benchmark.name in tasks]
    assert report.read(tmp_path)[1] == measure(OpenNemoLM(llm), wanted, BenchmarkData(hub), None)[0]
    keys = [json.loads(line)[0] for line in answers.read_bytes().splitlines()]
    assert len(keys) == len(set(keys))  # nothing was asked twice
