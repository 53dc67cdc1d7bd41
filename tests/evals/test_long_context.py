"""Long contexts: prompts that fit, needles where they belong, RULER's words, and a heat map."""

import ast
import random
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opennemo.errors import InvalidRequest
from opennemo.evals import long_context
from opennemo.evals.benchmark_data import BenchmarkData
from opennemo.evals.evaluate import evaluate
from opennemo.evals.long_context import (
    TASKS,
    WITHOUT_DATA,
    Prompt,
    documents,
    mark,
    needles,
    passkey,
    task,
)
from opennemo.evals.report import read
from opennemo.evals.runs import Run
from opennemo.evals.suites import Haystacks, Request
from tests.evals.conftest import SHARED, needs_shared

SENTENCES = [f"Sentence number {i} of a long speech." for i in range(40)]
MAKERS = {
    "passkey": passkey,
    "single": needles(None),
    "text": needles(SENTENCES, kind="uuids", hay="text"),
    "keys": needles(SENTENCES, keys=4, hay="text"),
    "among": needles(None, kind="uuids", hay="needles"),
    "values": needles(SENTENCES, values=4, hay="text"),
    "queries": needles(SENTENCES, keys=4, queries=4, hay="text"),
    "vt": long_context.variable_tracking,
    "qa": documents([(f"q{i}?", [f"answer {i}"], [f"answer {i} is here"]) for i in range(9)]),
}


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(sorted(MAKERS)), st.integers(0, 10**6), st.integers(4, 60),
       st.sampled_from([0.0, 0.25, 0.5, 1.0]))  # fmt: skip
def test_a_prompt_holds_its_answers_once_at_the_wanted_depth(name, seed, n, depth):
    prompt = MAKERS[name](random.Random(seed), n, depth)
    assert prompt == MAKERS[name](random.Random(seed), n, depth)
    assert prompt.answers and all(answer in prompt.text for answer in prompt.answers)
    assert mark(prompt, " and ".join(prompt.answers).upper()) == 1 and mark(prompt, "") == 0
    if name in ("single", "among", "passkey") and n >= 20:
        line = next(x for x in prompt.text.split("\n") if prompt.answers[0] in x)
        lines = prompt.text.split("\n")
        assert lines.index(line) / len(lines) == pytest.approx(depth, abs=0.15)


def test_marks_are_rulers():
    every = Prompt("", "", ("One", "two", "three", "four"))
    assert mark(every, "it is one, and TWO") == 0.5
    assert mark(Prompt("", "", ("a", "b"), any_of=True), "only B") == 1


def test_the_words_around_the_needles_are_rulers():
    spec = find_spec("lm_eval")
    if spec is None or spec.origin is None:
        pytest.skip("the extra `eval` is not installed")
    folder = Path(spec.origin).parent / "tasks" / "ruler"

    def constant(file: str, name: str) -> str:
        tree = ast.parse((folder / file).read_text("utf-8"))
        values = [n.value for n in ast.walk(tree) if isinstance(n, ast.Assign)
                  and getattr(n.targets[0], "id", "") == name]  # fmt: skip
        return ast.literal_eval(values[0])

    # RULER's needles share one template, whose plural it turns into a singular where it must.
    whole = constant("niah_utils.py", "TEMPLATE")
    prompt = MAKERS["queries"](random.Random(1), 30, 0.5)
    before, after = whole.split("{context}")
    assert prompt.text.startswith(before.format(type_needle_v="numbers"))
    names = prompt.text.rsplit(" for ", 1)[1].split(" mentioned")[0]
    assert prompt.text.endswith(after.format(type_needle_v="numbers", query=names))
    one = MAKERS["single"](random.Random(1), 30, 0.5)
    singular = whole.replace("Some", "A").replace("are all", "is").replace("are", "is")
    before, after = singular.split("{context}")
    assert one.text.startswith(before.format(type_needle_v="number"))
    name = one.text.rsplit(" for ", 1)[1].split(" mentioned")[0]
    assert one.text.endswith(after.format(type_needle_v="number", query=name))
    needle = constant("prepare_niah.py", "NEEDLE")
    assert needle.format(type_needle_v="numbers", key=name, value=one.answers[0]) in one.text
    for file, key, prompt in (
        ("vt_utils.py", "variable_tracking", MAKERS["vt"](random.Random(1), 30, 0.5)),
        ("qa_utils.py", None, MAKERS["qa"](random.Random(1), 5, 0.5)),
    ):
        tree = ast.parse((folder / file).read_text("utf-8"))
        config = next(ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign)
                      and getattr(n.targets[0], "id", "") == "CONFIG")  # fmt: skip
        config = config[key] if key else config
        for piece in config["template"].replace("{query}", "{context}").split("{context}"):
            assert piece.strip() in prompt.text
        for piece in config["answer_prefix"].replace("{query}", "{num_v}").split("{num_v}"):
            assert piece.strip() in prompt.begins


def asked(**settings) -> Request:
    return Request(model="tiny", suite="long", **settings)


def test_prompts_fill_their_length_and_are_never_longer(llm, tmp_path):
    options = Haystacks(lengths=(700, 1000), depths=(0.0, 1.0))
    request = asked(tasks=("passkey", "niah_single_1"), limit=1, options=options)
    outcome = long_context.measure(llm, request, Run(tmp_path, {}))
    rows, items = outcome.rows, outcome.items
    assert [(r.name, r.part, r.n) for r in rows] == [
        (name, part, 2) for name in request.tasks for part in ("700", "1,000")
    ]
    assert not any(r.trouble for r in rows) and len(items) == 8
    size = long_context.largest(llm, passkey, 992)
    prompt = long_context.fitting(llm, passkey, "x", size, 0.5, 992)
    n = len(llm.encode(f"{prompt.text} {prompt.begins}"))
    assert 992 - 32 - 2 * len(long_context.NOISE) < n <= 992 - 32
    with pytest.raises(InvalidRequest, match="too few"):
        long_context.largest(llm, passkey, 50)


def test_a_model_whose_context_is_shorter_says_so(folder, tmp_path):
    request = Request(
        model=str(folder),
        suite="long",
        tasks=("passkey",),
        limit=1,
        options=Haystacks(lengths=(512, 2048), depths=(0.0, 1.0)),
        output=tmp_path,
        kv_format="fp8",
        kv_scale=1.0,
    )
    evaluate(request, [])
    _, (short, long) = read(tmp_path)
    assert short.n == 2 and long.n == 0
    assert long.trouble == {"the model's context is 1,024 tokens": 2}
    assert (tmp_path / "heatmap.png").exists() and (tmp_path / "heatmap.svg").exists()


def test_unknown_tasks_and_missing_data_are_named(llm, tmp_path):
    run = Run(tmp_path / "run", {})
    with pytest.raises(InvalidRequest, match="niah_single_1"):
        long_context.measure(llm, asked(tasks=("niah",), options=Haystacks()), run)
    with pytest.raises(InvalidRequest, match=r"ruler/squad_dev\.jsonl"):
        task(BenchmarkData(tmp_path), "qa_1")
    options = Haystacks(lengths=(2048,))  # longer than the model's context
    outcome = long_context.measure(llm, asked(options=options), run)
    assert {row.name for row in outcome.rows} == {*WITHOUT_DATA}


@needs_shared
def test_the_published_documents_make_prompts():
    data = BenchmarkData(SHARED)
    for make, _ in (task(data, name) for name in TASKS):
        prompt = make(random.Random(3), 20, 0.5)
        assert prompt.answers and len(prompt.text) > 500
    assert len(TASKS) == 12
