"""BFCL: its own checker over our calls, in this process and against our server."""

import json
from random import Random

import pytest

from opennemo.evals.endpoint import LocalModel, RemoteModel
from opennemo.evals.functions import (
    CATEGORIES,
    as_tool,
    measure,
    questions,
    verdict,
)
from opennemo.evals.patches import call_checker
from opennemo.evals.runs import Run
from opennemo.evals.suites import Calls, Request
from opennemo.llm import LLM
from opennemo.tokenizer.messages import check_tools

pytest.importorskip("bfcl_eval", reason="not installed: pip install --no-deps bfcl-eval==2026.3.23")


def calls(truth: list[dict], rng: Random) -> dict:
    """A message that makes the calls which BFCL accepts, with the first value of each argument."""
    made = []
    for call in truth:
        ((name, arguments),) = call.items()
        given = {k: _value(v[0]) for k, v in arguments.items() if v[0] != ""}
        function = {"name": name.replace(".", "_"), "arguments": json.dumps(given)}
        made.append({"id": "000000000", "type": "function", "function": function})
    rng.shuffle(made)  # parallel calls may come in any order
    return {"role": "assistant", "content": None, "tool_calls": made}


def _value(value: object) -> object:
    """BFCL writes each value inside an object as a list of those that it accepts."""
    if isinstance(value, dict):
        return {k: _value(v[0]) for k, v in value.items() if v[0] != ""}
    return [_value(v) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("category", CATEGORIES)
def test_right_calls_pass_and_wrong_ones_say_why(category):
    check, rng, wrong = call_checker(), Random(0), []
    asked = questions(category)
    assert len(asked) >= 200
    for question in asked:
        tools = check_tools([as_tool(f) for f in question["function"]])
        assert tools and "." not in tools[0]["function"]["name"]
        right = calls(question["ground_truth"], rng) if category != "irrelevance" else {}
        why = verdict(check, category, question, right)
        wrong += [why] * (why is not None)
    assert len(wrong) <= len(asked) // 100  # BFCL's own answers fail in two parallel questions
    question, right = asked[0], calls(asked[0]["ground_truth"], rng)
    if category == "irrelevance":
        some = calls([{"f": {"x": [1]}}], rng)
        assert verdict(check, category, question, some) == "a call where there is nothing to call"
        return
    assert verdict(check, category, question, {"content": "no"}) == "no call"
    broken = json.loads(json.dumps(right))
    broken["tool_calls"][0]["function"]["arguments"] = '{"nothing": 1}'
    assert verdict(check, category, question, broken)
    broken["tool_calls"][0]["function"]["arguments"] = "{"
    assert verdict(check, category, question, broken) == "arguments are not JSON"


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
