"""BFCL: its own checker over our calls, in this process and against our server."""

import json
from dataclasses import replace
from random import Random

import pytest

from opennemo.errors import InvalidRequest
from opennemo.evals.endpoint import LocalModel, RemoteModel
from opennemo.evals.functions import (
    ONE_TURN,
    as_tool,
    measure,
    prepare,
    questions,
    verdict,
)
from opennemo.evals.patches import call_checker
from opennemo.evals.runs import Run
from opennemo.evals.suites import Calls, Request
from opennemo.llm import LLM
from opennemo.tokenizer.messages import check_tools
from tests.evals.conftest import serving

pytest.importorskip("bfcl_eval", reason="not installed: pip install --no-deps bfcl-eval==2026.3.23")


def calls(truth: list[dict], rng: Random) -> dict:
    """A message that makes the calls which BFCL accepts, with the first value of each argument."""
    made = []
    for call in truth:
        ((name, arguments),) = call.items()
        function = {"name": name.replace(".", "_"), "arguments": json.dumps(_value(arguments))}
        made.append({"id": "000000000", "type": "function", "function": function})
    rng.shuffle(made)  # parallel calls may come in any order
    return {"role": "assistant", "content": None, "tool_calls": made}


def _value(value: object) -> object:
    """BFCL writes most values inside an object as a list of those that it accepts."""
    if isinstance(value, dict):
        first = {k: v[0] if isinstance(v, list) and v else v for k, v in value.items()}
        return {k: _value(v) for k, v in first.items() if v != ""}
    return [_value(v) for v in value] if isinstance(value, list) else value


NO_TRUTH = [{"f": {"x": [1]}}]  # a call where BFCL has none to compare with


@pytest.mark.parametrize("category", ONE_TURN)
def test_right_calls_pass_and_wrong_ones_say_why(category):
    check, rng, wrong = call_checker(), Random(0), []
    asked = questions(category)
    assert len(asked) >= (16 if category.startswith("live") else 200)
    for question in asked:
        tools = check_tools([as_tool(f) for f in question["function"]])
        assert all("." not in tool["function"]["name"] for tool in tools)
        assert tools or category == "live_irrelevance"
        right = calls(question["ground_truth"] or NO_TRUTH, rng)
        why = verdict(check, category, question, {} if "irrelevance" in category else right)
        wrong += [why] * (why is not None)
    assert len(wrong) <= len(asked) // 100  # a few of BFCL's own answers fail
    question, right = asked[0], calls(asked[0]["ground_truth"] or NO_TRUTH, rng)
    broken = json.loads(json.dumps(right))
    broken["tool_calls"][0]["function"]["arguments"] = "{"
    if "irrelevance" in category:
        why = verdict(check, category, question, right)
        assert why == "a call where there is nothing to call"
        assert verdict(check, category, question, broken) is None  # as BFCL has it
        return
    assert verdict(check, category, question, {"content": "no"}) == "no call"
    assert verdict(check, category, question, broken) == "arguments are not a JSON object"
    broken["tool_calls"][0]["function"]["arguments"] = '{"nothing": 1}'
    assert category == "live_relevance" or verdict(check, category, question, broken)


@pytest.mark.parametrize(("category", "when_silent"), [
    ("live_simple", 0), ("live_parallel", 0), ("live_relevance", 0), ("live_irrelevance", 100),
])  # fmt: skip
def test_an_endpoint_is_asked_and_scored(category, when_silent, tmp_path):
    by_text = {str(q["question"][0]): q["ground_truth"] for q in questions(category)}
    right = lambda body: calls(by_text[str(body["messages"])] or NO_TRUTH, Random(0))  # noqa: E731
    request = Request(model="m", suite="tools", tasks=(category,), limit=6, options=Calls())
    scores = {}
    for name, answer in (("calls", right), ("silent", lambda _: "I cannot.")):
        with serving(answer) as (url, bodies):
            rows = measure(RemoteModel(url, "m"), request, Run(tmp_path / name, {})).rows
        assert [(row.name, row.part, row.n) for row in rows] == [("BFCL", category, 6)]
        assert len(bodies) == 6 and all(body["tools"] for body in bodies)
        scores[name] = rows[0].score
    assert scores == {"calls": 100 - when_silent, "silent": when_silent}


def test_what_must_call_is_not_asked_for_several_turns():
    request = Request(model="m", suite="tools", options=Calls(required=True))
    prepare(request)
    with pytest.raises(InvalidRequest, match=r"leave multi_turn_\* out"):
        prepare(replace(request, tasks=("multi_turn_base",)))


def test_types_become_those_of_json_schema():
    schema = {"type": "dict", "properties": {
        "type": {"type": "float"}, "all": {"type": "tuple", "items": {"type": "any"}},
        "deep": {"type": "dict", "properties": {"x": {"type": "list", "items": {"type": "float"}}}},
    }, "required": ["type"]}  # fmt: skip
    function = {"name": "a.b", "description": "", "parameters": schema}
    parameters = as_tool(function)["function"]["parameters"]
    assert parameters == {"type": "object", "required": ["type"], "properties": {
        "type": {"type": "number"}, "all": {"type": "array", "items": {"type": "string"}},
        "deep": {"type": "object", "properties": {
            "x": {"type": "array", "items": {"type": "number"}}}},
    }}  # fmt: skip


def test_with_and_without_a_grammar_in_this_process_and_on_our_server(folder, tmp_path):
    pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
    from tests.serve.conftest import run_server

    results, llm = {}, LLM.load(str(folder))  # which the server closes
    with run_server(llm) as server:
        remote = RemoteModel(f"{server.url}/v1", llm.name, tokenizer=llm.tokenizer)
        for where, model in (("here", LocalModel(llm)), ("there", remote)):
            for grammar in (True, False):
                request = Request(model=llm.name, suite="tools", tasks=("simple_python",), limit=2,
                                  options=Calls(grammar=grammar))  # fmt: skip
                outcome = measure(model, request, Run(tmp_path / f"{where}{grammar}", {}))
                rows, items = outcome.rows, outcome.items
                assert rows[0].n + sum(rows[0].trouble.values()) == 2
                results[where, grammar] = [
                    (i["id"], i["wrong"], i["answer"].get("content")) for i in items
                ]
        request = Request(model=llm.name, suite="tools", tasks=("multiple",), limit=3,
                          options=Calls(required=True))  # fmt: skip
        outcome = measure(remote, request, Run(tmp_path / "required", {}))
        rows, items = outcome.rows, outcome.items
        assert rows[0].setting == "with grammar, a call required"
        assert all(len(item["answer"].get("tool_calls") or [0]) == 1 for item in items)
    for grammar in (True, False):  # greedy answers do not depend on who carries them
        assert results["here", grammar] == results["there", grammar]
