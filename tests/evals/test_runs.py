"""Runs: every answer is remembered, and asked for once."""

import pytest

from opennemo.errors import InvalidRequest, OpenNemoError
from opennemo.evals import report
from opennemo.evals.runs import Run, digest, fingerprint


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
    assert (again.n_before, again.recall("a"), again.recall("c")) == (2, [1.5, True], None)
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

    for n_before in (0, 3):
        run = Run(tmp_path, {})
        assert run.n_before == n_before
        answers = run.ask_all("Asking", [1, 2, 3, 4], key=lambda q: digest(q), ask=ask)
        run.close()
        assert [a for a in answers if not isinstance(a, OpenNemoError)] == (
            [10, 20, 30, 40] if n_before else [10, 30, 40]
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
