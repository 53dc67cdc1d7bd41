"""BFCL's conversations: its services, steps and functions held back, and calls that stay data."""

import ast
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from opennemo.errors import OpenNemoError
from opennemo.evals import functions
from opennemo.evals.endpoint import RemoteModel
from opennemo.evals.functions import measure, prepare, questions
from opennemo.evals.multi_turn import CATEGORIES, as_python, converse, judge
from opennemo.evals.runs import Run
from opennemo.evals.suites import Calls, Request
from opennemo.tokenizer.messages import check_tools
from tests.evals.conftest import serving

needs_bfcl = pytest.mark.skipif(
    functions.find_spec("bfcl_eval") is None,
    reason="not installed: pip install --no-deps bfcl-eval==2026.3.23",
)
LIMIT = 5


def call(name: str, /, **arguments: Any) -> dict:
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {"id": "000000000", "type": "function", "function": function}


def reference_calls(question: dict, turn: int) -> dict:
    """BFCL's own calls of a turn, which it writes as Python, with or without names."""
    held_back = [f for held in question["missed_function"].values() for f in held]
    names = {f["name"]: [*f["parameters"]["properties"]] for f in question["function"] + held_back}
    made = []
    for text in question["ground_truth"][turn]:
        node: Any = ast.parse(text, mode="eval").body
        values = [ast.literal_eval(value) for value in node.args]
        arguments = dict(zip(names[node.func.id], values, strict=False))
        arguments |= {word.arg: ast.literal_eval(word.value) for word in node.keywords}
        made.append(call(node.func.id, **arguments))
    return {"content": None, "tool_calls": made}


def script(asked: list[dict], body: dict) -> dict | str:
    """The reference calls of the turn that a request is in, then words."""
    said = [message for message in body["messages"] if message["role"] == "user"]
    question = next(q for q in asked if q["question"][0][0] == said[0])
    if body["messages"][-1]["role"] == "tool":
        return "Done."
    return reference_calls(question, len(said) - 1)


@needs_bfcl
@pytest.mark.parametrize("category", CATEGORIES)
def test_reference_calls_are_right_and_silence_is_wrong(category, tmp_path):
    asked = questions(category)
    assert len(asked) == 200
    for question in asked:
        tools = check_tools([functions.as_tool(f) for f in question["function"]])
        assert len({tool["function"]["name"] for tool in tools}) == len(tools)
    request = Request(model="m", suite="tools", tasks=(category,), limit=LIMIT, options=Calls())
    prepare(request)
    for answer, score in ((partial(script, asked[:LIMIT]), 100), (lambda _: "I cannot.", 0)):
        run = Run(tmp_path / str(score), {})
        with serving(answer) as (url, bodies):
            outcome = measure(RemoteModel(url, "m"), request, run)
            n_asked = len(bodies)
            again = measure(RemoteModel(url, "m"), request, run)
        assert len(bodies) == n_asked and again.items == outcome.items  # remembered
        (row,) = outcome.rows
        assert (row.key, row.n, row.score) == (f"BFCL {category}", LIMIT, score)
    assert {item["wrong"] for item in outcome.items} == {"multi_turn:empty_turn_model_response"}


@needs_bfcl
def test_functions_held_back_are_declared_in_their_turn():
    question = questions("multi_turn_miss_func")[0]
    ((turn, held),) = question["missed_function"].items()
    seen: list[tuple[str, set[str]]] = []

    def answer(messages: list[dict], declared: list[dict]) -> dict:
        seen.append((messages[-1]["content"], {function["name"] for function in declared}))
        return {"role": "assistant", "content": "No."}

    converse(question, answer)
    names = {function["name"] for function in held}
    assert [names <= declared for _, declared in seen] == [i >= int(turn) for i in range(len(seen))]
    assert "updated some more functions" in seen[int(turn)][0]


@needs_bfcl
def test_who_calls_without_end_is_stopped_and_wrong():
    question = questions("multi_turn_base")[0]
    endless = {"role": "assistant", "tool_calls": [call("ls")]}
    result = converse(question, lambda *_: endless)
    assert [len(steps) for steps in result["turns"]] == [21]  # BFCL's 20, and the one that is more
    assert judge(question, result["turns"]) == "multi_turn:force_terminated"


@needs_bfcl
def test_what_a_model_writes_is_never_run(tmp_path: Path):
    marker = tmp_path / "it-ran"
    code = f"open({str(marker)!r}, 'w')"
    question = questions("multi_turn_base")[0]
    calls = [
        call(f"ls({code}) or ls"), call("open", file=str(marker), mode="w"), call("print"),
        call("ls", **{f"a=True) or {code} or ls(a": True}),
        call("mkdir", dir_name=f"') or {code} or ('"), call("ls", a=float("nan")), call("ls"),
    ]  # fmt: skip
    answers = iter([{"role": "assistant", "tool_calls": calls}])
    done = {"role": "assistant", "content": "Done."}
    result = converse(question, lambda *_: next(answers, done))
    judge(question, result["turns"])
    assert not marker.exists()
    said = [m["content"] for m in result["messages"] if m["role"] == "tool"]
    unknown = "Error during execution: name 'function_or_argument_not_declared' is not defined"
    assert said[:4] == [unknown] * 4 and "'nan' is not defined" in said[5]
    assert "or ('" in said[6] or "error" in said[4]  # a folder of that name, or none


def test_calls_are_written_as_literals():
    value = ["') or (", {'a"\n': [None, True, 1.5e300, "\u2028é"]}]
    text = as_python("f", {"x": value, "y": 1}, {"f"})
    node: Any = ast.parse(text, mode="eval").body
    assert node.func.id == "f" and [word.arg for word in node.keywords] == ["x", "y"]
    assert [ast.literal_eval(word.value) for word in node.keywords] == [value, 1]
    for name, arguments in (("g", {}), ("f", {"x y": 1}), ("f", {"": 1}), ("f", {"**x": 1})):
        assert as_python(name, arguments, {"f"}) == "function_or_argument_not_declared()"


@needs_bfcl
def test_a_package_that_is_missing_is_named_before_anything_is_asked(monkeypatch):
    find = functions.find_spec
    hide = lambda name: None if name == "mpmath" else find(name)  # noqa: E731
    monkeypatch.setattr(functions, "find_spec", hide)
    prepare(Request(model="m", suite="tools", tasks=("live_simple",), options=Calls()))
    with pytest.raises(OpenNemoError, match="pip install mpmath"):
        prepare(Request(model="m", suite="tools", options=Calls()))
