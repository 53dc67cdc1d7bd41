"""Function calling: BFCL's questions, judged by BFCL's own checker of calls (its AST categories).

`bfcl-eval` brings 120 packages with pins, of which the checker needs none, so it is installed
without them (pip install --no-deps), and its table of models is replaced (patches.py).

Gorilla (arXiv:2305.15334) and the Berkeley function-calling leaderboard, version 4.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from opennemo.errors import InvalidRequest, OpenNemoError
from opennemo.evals.benchmark_data import read_lines
from opennemo.evals.endpoint import ChatModel
from opennemo.evals.patches import BFCL_MODEL, call_checker
from opennemo.evals.rows import gather
from opennemo.evals.runs import Run, digest
from opennemo.evals.suites import Calls, Outcome, Request

CATEGORIES = ("simple_python", "multiple", "parallel", "parallel_multiple", "irrelevance")
# BFCL's names of types, and JSON schema's.
TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string", "list": "array"}
TYPES |= {name: name for name in ("string", "integer", "number", "boolean", "array", "object")}


def prepare(request: Request) -> None:
    """Raises InvalidRequest without BFCL, or if options do not go together."""
    if request.options.required and not request.options.grammar:
        raise InvalidRequest("--required needs the grammar, which --no-grammar leaves out")
    request.chosen(CATEGORIES)
    call_checker()


def measure(model: ChatModel, request: Request, run: Run) -> Outcome:
    """Share of questions whose calls are right, by category, and the calls one by one.

    With `required` an answer must be a call, and only one where one is expected; BFCL leaves both
    to the model.
    """
    options: Calls = request.options
    categories, grammar, required = request.chosen(CATEGORIES), options.grammar, options.required

    def settings(category: str) -> dict[str, Any]:
        only = {"tool_choice": "required", "parallel_tool_calls": "parallel" in category}
        return {"temperature": 0.0, "max_tokens": 512} | (only if required else {})

    check, asked = call_checker(), []
    for category in categories:
        asked += [(category, q) for q in questions(category)[: request.limit]]
    prompts = [
        (q["question"][0], [as_tool(f) for f in q["function"]], settings(category))
        for category, q in asked
    ]
    answers = run.ask_all(
        f"Calls of {model.name}", prompts,
        key=lambda a: digest("tools", model.name, grammar, a),
        ask=lambda a: model.ask(a[0], a[1], grammar, **a[2]),
    )  # fmt: skip
    values: dict[str, float | str] = {}
    items = []
    for (category, question), answer in zip(asked, answers, strict=True):
        key = f"{category}/{question['id']}"
        if isinstance(answer, OpenNemoError):
            values[key] = str(answer)
            continue
        why = verdict(check, category, question, answer)
        values[key] = float(why is None)
        items.append({"id": key, "value": values[key], "answer": answer, "wrong": why})
    setting = ("with grammar" if grammar else "without grammar") + ", a call required" * required
    rows = gather("BFCL", values, parts=lambda i: i.split("/")[0], setting=setting)
    return Outcome(rows, items)


def verdict(
    check: Callable[..., dict[str, Any]], category: str, question: Mapping[str, Any], answer: Any
) -> str | None:
    """None if the answer's calls are right, else the checker's name of the error."""
    calls = []
    for call in answer.get("tool_calls") or ():
        try:
            arguments = json.loads(call["function"]["arguments"])
        except ValueError:
            return "arguments are not JSON"
        calls.append({call["function"]["name"]: arguments})
    if category == "irrelevance":
        return "a call where there is nothing to call" if calls else None
    if not calls:
        return "no call"
    from bfcl_eval.constants.enums import Language  # pyright: ignore[reportMissingImports]

    result = check(
        question["function"], calls, question["ground_truth"], Language.PYTHON, category, BFCL_MODEL
    )
    return None if result["valid"] else str(result.get("error_type") or "wrong")


def questions(category: str) -> list[dict[str, Any]]:
    """BFCL's questions, each with its `ground_truth`."""
    import bfcl_eval  # pyright: ignore[reportMissingImports]

    folder = Path(bfcl_eval.__path__[0]) / "data"
    lines = read_lines(folder / f"BFCL_v4_{category}.json")
    answers = folder / "possible_answer" / f"BFCL_v4_{category}.json"
    truth = {a["id"]: a["ground_truth"] for a in read_lines(answers)} if answers.exists() else {}
    return [q | {"ground_truth": truth.get(q["id"], [])} for q in lines]


def as_tool(function: Mapping[str, Any]) -> dict[str, Any]:
    """BFCL's description of a function as OpenAI's, whose names have no dots."""
    described = {"name": function["name"].replace(".", "_"), "description": function["description"]}
    described["parameters"] = _schema(function["parameters"])
    return {"type": "function", "function": described}


def _schema(value: Any) -> Any:
    """A schema with JSON schema's names of types all the way down."""
    if not isinstance(value, Mapping):
        return value
    schema = {key: _schema(v) for key, v in value.items() if key not in ("properties", "type")}
    schema["type"] = TYPES.get(value.get("type", "string"), "string")
    if "properties" in value:
        schema["properties"] = {name: _schema(v) for name, v in value["properties"].items()}
    return schema
