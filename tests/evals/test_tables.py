"""Tables of the harness's tasks: what cannot be measured says why."""

import re
import shutil
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")


from opennemo.errors import InvalidRequest
from opennemo.evals import tables
from opennemo.evals.benchmark_data import BenchmarkData
from opennemo.evals.benchmarks import INSTRUCTIONS, REASONING, TABLE1, Benchmark
from opennemo.evals.evaluate import evaluate
from opennemo.evals.harness import OpenNemoLM
from opennemo.evals.rows import MISSING
from opennemo.evals.suites import Request
from opennemo.evals.tables import run_tasks
from tests.evals.conftest import add_to_hub

SMALL = [b for b in TABLE1 if b.task in
         ("hellaswag", "winogrande", "nq_open", "commonsense_qa", "openbookqa")]  # fmt: skip


@pytest.fixture
def own_hub(hub, tmp_path):
    """A copy of the data, to change."""
    return shutil.copytree(hub, tmp_path / "hub")


def test_missing_data_and_unknown_tasks_are_named(llm, own_hub, tmp_path):
    shutil.rmtree(own_hub / "allenai" / "winogrande")
    broken = Benchmark(
        name="None", task="none", data="Rowan/hellaswag", folder="hellaswag", shots=0, metric="acc"
    )
    rows, items = run_tasks(OpenNemoLM(llm), [*SMALL[:2], broken], BenchmarkData(tmp_path), 2)
    assert [row.n for row in rows] == [2, 0, 0] and len(items) == 2
    assert rows[1].score is None and next(iter(rows[1].trouble)).startswith(MISSING)
    assert rows[2].score is None and "none" in next(iter(rows[2].trouble))


def test_what_is_missing_is_said_before_a_model_is_loaded(hub, tmp_path, capsys):
    def ask(**fields: Any) -> Request:
        return Request(model=str(tmp_path / "no model"), data=hub, output=tmp_path, **fields)

    with pytest.raises(InvalidRequest, match="GSM8K needs the data set openai/gsm8k of the hub"):
        evaluate(ask(suite="reasoning"), [])
    with pytest.raises(InvalidRequest, match="--tasks GSM9K: there are GSM8K, MMLU-Pro, BBH"):
        evaluate(ask(suite="reasoning", tasks=("GSM9K", "BBH")), [])
    tables.prepare(ask(suite="table1"))
    assert (
        "TriviaQA is left out: it needs the data set mandarjoshi/trivia_qa"
        in capsys.readouterr().out
    )


def test_a_run_without_a_result_is_an_error(folder, own_hub, tmp_path):
    for file in (own_hub / "allenai" / "winogrande").rglob("*.jsonl"):
        file.unlink()
    request = Request(
        model=str(folder), suite="table1", tasks=("Winogrande",), data=own_hub, output=tmp_path
    )
    with pytest.raises(InvalidRequest, match="measured nothing: no data"):
        evaluate(request, [])


class Scripted(OpenNemoLM):
    """Answers prompts by the first of its patterns that a prompt has."""

    def __init__(self, llm: Any, answers: dict[str, str]):
        super().__init__(llm)
        self.answers = answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        ends = [request.args[0][-300:] for request in requests]
        return [next(a for p, a in self.answers.items() if re.search(p, end)) for end in ends]


def test_reasoning_is_scored_by_the_last_number_letter_or_words(llm, own_hub):
    sums = [
        {"question": f"What is {a} + 1?", "answer": f"So {a + 1}.\n#### {a + 1}"} for a in (1, 2)
    ]
    add_to_hub(own_hub, "openai/gsm8k", "main", sums, "train", "test")
    choices = {"options": ["one", "two", "three"], "category": "math", "src": "", "cot_content": ""}
    asked = [choices | {"question_id": i, "question": f"Which is {word}?", "answer": letter,
                        "answer_index": i, "cot_content": f"A: The answer is ({letter})."}
             for i, (word, letter) in enumerate((("one", "A"), ("two", "B")))]  # fmt: skip
    add_to_hub(own_hub, "TIGER-Lab/MMLU-Pro", "default", asked * 3, "test", "validation")
    add_to_hub(own_hub, "SaylorTwift/bbh", "navigate", [
        {"input": f"Do you return? Take {n} steps.", "target": target}
        for n, target in ((1, "No"), (0, "Yes"))
    ], "test")  # fmt: skip
    lm = Scripted(llm, {
        r"1 \+ 1": "That makes 3, no: the answer is $2.", r"2 \+ 1": "The answer is 4.",
        r"is one": "As is known, the answer is (A).", r"is two": "the answer is C",
        r"Take 1": " We are away. So the answer is No.", r"Take 0": " So the answer is No.",
    })  # fmt: skip
    parts = {"MMLU-Pro": "mmlu_pro_math", "BBH": "bbh_cot_fewshot_navigate"}
    benchmarks = [replace(b, task=parts.get(b.name, b.task)) for b in REASONING]
    rows, items = run_tasks(lm, benchmarks, BenchmarkData(own_hub), None)
    assert {row.name: row.score for row in rows} == {"GSM8K": 50.0, "MMLU-Pro": 50.0, "BBH": 50.0}
    assert items[0]["value"] == 1.0 and "Q: What is 1 + 1?\nA:" in items[0]["prompt"]
    assert rows[0].setting == "8-shot, exact_match"


def test_instructions_are_checked_by_the_rules_of_the_harness(llm, own_hub, tmp_path, monkeypatch):
    for package in INSTRUCTIONS[0].packages:
        pytest.importorskip(package, reason=f"{package} is not installed")
    import nltk

    (tmp_path / "tokenizers" / "punkt_tab").mkdir(parents=True)  # found, so that none is fetched
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    rules = ["punctuation:no_comma", "detectable_format:number_bullet_lists"]
    add_to_hub(own_hub, "google/IFEval", "default", [
        {"key": i, "prompt": f"Task {i}", "instruction_id_list": rules,
         "kwargs": [{"num_bullets": None}, {"num_bullets": 2}]} for i in range(3)
    ], "train")  # fmt: skip
    lm = Scripted(llm, {
        "Task 0": "* one\n* two", "Task 1": "* one, really\n* two",
        "Task 2": "Sure:\n* one\n* two\n* x",
    })  # fmt: skip
    (row,), items = run_tasks(lm, INSTRUCTIONS, BenchmarkData(own_hub), None)
    assert [item["value"] for item in items] == [1.0, 0.0, 0.0]
    assert row.also["inst_level_strict_acc"] == pytest.approx(100 * 4 / 6)
    from lm_eval.tasks.ifeval.utils import InputExample, test_instruction_following_strict

    for item, (prompt, answer) in zip(items, lm.answers.items(), strict=True):
        example = InputExample(0, rules, prompt, [{}, {"num_bullets": 2}])
        judged = test_instruction_following_strict(example, answer)
        assert item["value"] == float(judged.follow_all_instructions)
