"""Judging over HTTP: marks, and what is done about judges that are wrong, silent or biased."""

import json
import re
import time

import pytest

from opennemo.errors import InvalidRequest
from opennemo.evals import report
from opennemo.evals.benchmark_data import BenchmarkData
from opennemo.evals.endpoint import LocalModel, RemoteModel
from opennemo.evals.evaluate import evaluate
from opennemo.evals.judging import (
    NO_MARK,
    Judging,
    MTBench,
    agree,
    rating,
    wild_bench,
    wild_score,
)
from opennemo.evals.runs import Run
from opennemo.evals.suites import Judges, Request
from tests.evals.conftest import SHARED, needs_shared, serving, write_lines


def asked(body: dict) -> str:
    return body["messages"][-1]["content"]


QUESTIONS = [
    {"question_id": 1, "category": "writing", "turns": ["Write a line.", "Make it shorter."]},
    {"question_id": 2, "category": "math", "turns": ["What is 2 + 2?", "And doubled?"]},
]
PROMPTS = [
    ("single-v1", "Q: {question} A: {answer}"),
    ("single-v1-multi-turn", "Q: {question_1} {question_2} A: {answer_1} {answer_2}"),
    ("single-math-v1", "Q: {question} R: {ref_answer_1} A: {answer}"),
    ("single-math-v1-multi-turn",
     "Q: {question_1} {question_2} R: {ref_answer_1} {ref_answer_2} A: {answer_1} {answer_2}"),
    ("pair-v2-multi-turn", "{question_1} {question_2} A: {answer_a_1} {answer_a_2} "
     "B: {answer_b_1} {answer_b_2}"),
    ("pair-math-v1-multi-turn", "{question_1} {question_2} {ref_answer_1} {ref_answer_2} "
     "A: {answer_a_1} {answer_a_2} B: {answer_b_1} {answer_b_2}"),
]  # fmt: skip


@pytest.fixture
def data(tmp_path) -> BenchmarkData:
    write_lines(tmp_path / "mt_bench" / "question.jsonl", QUESTIONS)
    write_lines(tmp_path / "mt_bench" / "judge_prompts.jsonl", [
        {"name": name, "system_prompt": "Judge.", "prompt_template": text} for name, text in PROMPTS
    ])  # fmt: skip
    write_lines(tmp_path / "mt_bench" / "reference_answer_gpt-4.jsonl", [
        {"question_id": 2, "choices": [{"turns": ["two and two is four", "that makes eight"]}]}
    ])  # fmt: skip
    write_lines(tmp_path / "arena_hard_v0.1" / "question.jsonl",
                [{"uid": str(i), "prompt": f"question {i}"} for i in range(3)])  # fmt: skip
    template = tmp_path / "wildbench" / "eval_template.score.v2.md"
    template.parent.mkdir()
    template.write_text("{$history}|{$user_query}|{$model_output}|{$checklist}", "utf-8")
    return BenchmarkData(tmp_path)


ANSWERS = {1: ["a line", "line"], 2: ["4", "8"]}


def test_each_turn_is_marked_with_its_prompt_and_reference(data, tmp_path):
    mark = lambda body: f"[[{len(asked(body)) % 10 + 1}]]"  # noqa: E731
    with serving(mark) as (url, bodies):
        judging = Judging(RemoteModel.connect(url, None, "none"), Run(tmp_path / "run", {}))
        bench = MTBench(data, None)
        marks = bench.grade(judging, ANSWERS)
        rows = {row.key: row for row in bench.rows(marks, "judge")}
        n_asked = len(bodies)
        assert bench.grade(judging, ANSWERS) == marks and len(bodies) == n_asked == 4  # remembered
    texts = {asked(body) for body in bodies}
    assert "Q: Write a line. A: a line" in texts
    assert "Q: What is 2 + 2? And doubled? R: two and two is four that makes eight A: 4 8" in texts
    assert all(b["temperature"] == 0 and b["model"] == "judge" for b in bodies)
    assert sorted(marks) == ["1/1", "1/2", "2/1", "2/2"]
    assert rows["MT-Bench"].score == pytest.approx(sum(marks.values()) / 4)
    assert rows["MT-Bench turn 2"].n == 2 and rows["MT-Bench math"].n == 2
    assert rows["MT-Bench"].announced["Mistral NeMo"] == 7.84


def test_a_judge_that_raves_fails_or_sleeps_is_counted_and_never_scored(data, tmp_path):
    def answer(body: dict) -> str | int:
        text = asked(body)
        if "Make it shorter" in text:
            return "Wonderful! I rate it [[eleven]] or [[99]]."
        if "doubled" in text:
            return 422
        if "2 + 2" in text:
            time.sleep(1.5)
        return "It is fine. [[8]]"

    with serving(answer) as (url, _):
        judge = RemoteModel(url, "judge", timeout=0.5)
        bench, run = MTBench(data, None), Run(tmp_path / "run", {})
        marks = bench.grade(Judging(judge, run), ANSWERS)
    assert marks["1/1"] == 8.0 and marks["1/2"] == NO_MARK
    assert "HTTP 422" in marks["2/2"] and "no answer in 0.5 s" in marks["2/1"]
    whole = bench.rows(marks, "judge")[0]
    assert (whole.n, whole.score) == (1, 8.0) and sum(whole.trouble.values()) == 3
    # What did not come is asked for again; what came, though it is nonsense, is not.
    with serving(lambda body: "[[5]]") as (url, bodies):
        marks = bench.grade(Judging(RemoteModel(url, "judge"), run), ANSWERS)
    assert len(bodies) == 2 and (marks["2/1"], marks["1/2"]) == (5.0, NO_MARK)


def test_repeats_are_asked_with_other_seeds_and_averaged(data, tmp_path):
    with serving(lambda body: f"[[{body['seed'] + 4}]]") as (url, bodies):
        judging = Judging(RemoteModel(url, "judge"), Run(tmp_path / "run", {}), repeats=3)
        marks = MTBench(data, 1).grade(judging, ANSWERS)
    assert marks == {"1/1": 5.0, "1/2": 5.0} and judging.spreads == [1.0, 1.0]
    assert len(bodies) == 6 and all(body["temperature"] > 0 for body in bodies)


def test_a_judge_that_prefers_the_first_wins_nobody_anything(data, tmp_path):
    theirs = {1: ["another", "thing"], 2: ["5", "10"]}
    with serving(lambda body: "[[A]]") as (url, _):
        judging = Judging(RemoteModel(url, "first"), Run(tmp_path / "run", {}))
        (row,) = MTBench(data, None).duel(judging, ANSWERS, theirs, "other")
    assert row.score == 50.0 and row.trouble == {"verdict changed with the order": 2}

    def fair(body: dict) -> str:  # prefers ours, wherever it stands
        return "[[A]]" if re.search("A: (a line|4)", asked(body)) else "[[B]]"

    with serving(fair) as (url, _):
        judging = Judging(RemoteModel(url, "fair"), Run(tmp_path / "fair", {}))
        (row,) = MTBench(data, None).duel(judging, ANSWERS, theirs | {2: "no answer"}, "other")
    assert (row.score, row.n, row.trouble) == (100.0, 1, {"no answer": 1})


def test_a_judge_is_calibrated_and_compared_with_given_marks(data, tmp_path):
    def right(body: dict) -> str:  # knows the reference word by word
        return "[[9]]" if asked(body).endswith("A: two and two is four") else "[[2]]"

    with serving(right) as (url, _):
        judging = Judging(RemoteModel(url, "able"), Run(tmp_path / "run", {}))
        (row,) = MTBench(data, None).calibrate(judging)
    assert row.score == 100.0 and row.n == 1
    with serving(lambda body: "[[7]]") as (url, _):
        judging = Judging(RemoteModel(url, "indifferent"), Run(tmp_path / "indifferent", {}))
        (row,) = MTBench(data, None).calibrate(judging)
    assert row.score == 0.0
    near, apart = agree({"a": 8.0, "b": 3.0, "c": NO_MARK}, {"a": 9, "b": 5, "c": 1, "d": 2})
    assert near.score == 50.0 and near.trouble == {"without a mark of both": 2}
    assert apart.score == -1.5 and near.also["correlation"] == pytest.approx(1)
    flat, _ = agree({"a": 8.0, "b": 8.0}, {"a": 9, "b": 5})
    assert flat.also == {"correlation": 0.0, "of ranks": 0.0}


def test_marks_are_read_as_published(data, tmp_path):
    assert rating("so [[7]] and [[9]]") == 7 and rating("Rating: [8.5]") == 8.5
    assert rating("[[0]]") is rating("none") is rating("[[11]]") is None
    assert wild_score('{"strengths": "x", "score": "8"}') == 8 and wild_score('"score": 3}') == 3
    assert wild_score("score 8") is None


def test_wildbench_weighs_its_kinds_and_its_stand_in_has_another_name(data, tmp_path, llm):
    score = lambda body: '{"score": "9"}' if "code" in str(body) else '{"score": "4"}'  # noqa: E731
    with serving(score) as (url, bodies):
        judging = Judging(RemoteModel(url, "judge"), Run(tmp_path / "run", {}))
        model = RemoteModel(url, "model")
        (stand_in,) = wild_bench(data, model, judging, 2)
        assert stand_in.name.startswith("Arena-Hard") and not stand_in.announced
        assert stand_in.n == 2 and stand_in.score == -20
        write_lines(tmp_path / "wildbench" / "tasks.jsonl", [
            {"session_id": "x", "primary_tag": "Coding & Debugging", "checklist": ["Does it run?"],
             "conversation_input": [{"role": "user", "content": "hello"},
             {"role": "assistant", "content": "hi"}, {"role": "user", "content": "code"}]},
            {"session_id": "y", "primary_tag": "Math", "checklist": [],
             "conversation_input": [{"role": "user", "content": "sum"}]},
        ])  # fmt: skip
        rows = {row.key: row for row in wild_bench(data, model, judging, None)}
    assert rows["WildBench coding"].score == 80 and rows["WildBench maths"].score == -20
    assert rows["WildBench"].score == 30
    assert rows["WildBench"].also["macro"] == pytest.approx((80 * 1.25 - 20) / 2.25)
    judged = [asked(b) for b in bodies if "- Does it run?" in str(b)]
    (tmp_path / "wildbench" / "tasks.jsonl").write_text("{broken\n", "utf-8")
    with pytest.raises(InvalidRequest, match=r"tasks\.jsonl, line 1"):  # no stand-in for it
        wild_bench(data, model, judging, None)
    assert judged and judged[0].startswith("USER: hello\n\nASSISTANT: hi\n\n|code|")


def test_the_chat_suite_writes_answers_marks_and_notes(data, folder, tmp_path):
    assert data.folder is not None
    with serving(lambda body: "[[6]]") as (url, _):
        asked = Request(
            model=str(folder),
            suite="chat",
            tasks=("mt-bench", "calibrate"),
            limit=1,
            data=data.folder,
            options=Judges(judge=url),
            output=tmp_path / "out",
        )
        evaluate(asked, [])
        name, rows = report.read(tmp_path / "out")
    assert name == "tiny" and rows[0].score == 6.0 and rows[0].n == 2
    items = [json.loads(x) for x in (tmp_path / "out" / "items.jsonl").read_bytes().splitlines()]
    assert len(items[0]["answers"]) == 2
    with pytest.raises(InvalidRequest, match="--judge"):
        evaluate(Request(model=str(folder), suite="chat", data=data.folder), [])


def test_a_model_that_judges_itself_is_noted(data, folder, tmp_path):
    asked = Request(
        model=str(folder),
        suite="chat",
        tasks=("mt-bench",),
        limit=1,
        data=data.folder,
        options=Judges(judge=str(folder)),
        output=tmp_path / "out",
    )
    with pytest.raises(InvalidRequest, match="measured nothing: the judge gave no mark"):
        evaluate(asked, [])
    found = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    assert "judges itself" in found["notes"][0]
    assert sum(found["rows"][0]["trouble"].values()) == 2  # a random model gives no marks


@needs_shared
def test_the_published_files_are_read(tmp_path, llm):
    bench = MTBench(BenchmarkData(SHARED), None)
    assert len(bench.questions) == 80 and len(bench.references) == 30
    answers = {q["question_id"]: ["one", "two"] for q in bench.questions}
    with serving(lambda body: "Rating: [[3]]") as (url, bodies):
        marks = bench.grade(Judging(RemoteModel(url, "judge"), Run(tmp_path, {})), answers)
    assert len(marks) == len(bodies) == 160 and set(marks.values()) == {3.0}
    assert not any("{" in asked(b).split("}")[0][:40] for b in bodies)
    reply = LocalModel(llm).ask([{"role": "user", "content": "hello"}], max_tokens=3)
    assert reply["role"] == "assistant"
