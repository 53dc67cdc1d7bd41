"""Function calling: BFCL's questions, judged by BFCL's own checker of calls (its AST categories).

`bfcl-eval` brings 120 packages with pins, of which the checker needs none, so it is installed
without them (pip install --no-deps) and two of its modules are stood in for: the table of models,
which imports every vendor's client, has one entry here.

Gorilla (arXiv:2305.15334) and the Berkeley function-calling leaderboard, version 4.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from opennemo.errors import OpenNemoError
from opennemo.evals.benchmark_data import read_lines
from opennemo.evals.endpoint import ChatModel
from opennemo.evals.rows import ResultRow, gather
from opennemo.evals.runs import Run, digest

CATEGORIES = ("simple_python", "multiple", "parallel", "parallel_multiple", "irrelevance")
MODEL = "opennemo"  # in the checker's table, as one whose names have "_" for "."
# BFCL's names of types, and JSON schema's.
TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string", "list": "array"}
TYPES |= {name: name for name in ("string", "integer", "number", "boolean", "array", "object")}


def measure(
    model: ChatModel,
    run: Run,
    categories: Sequence[str],
    limit: int | None,
    *,
    grammar: bool = True,
    required: bool = False,
) -> tuple[list[ResultRow], list[dict[str, Any]]]:
    """Share of questions whose calls are right, by category, and the calls one by one.

    Args:
        grammar: whether calls are held to the tools and their arguments.
        required: whether an answer must be a call, and but one where one is asked for; BFCL
            leaves both to the model.
    """

    def settings(category: str) -> dict[str, Any]:
        only = {"tool_choice": "required", "parallel_tool_calls": "parallel" in category}
        return {"temperature": 0.0, "max_tokens": 512} | (only if required else {})

    check, questions = _checker(), []
    for category in categories:
        questions += [(category, q) for q in _questions(category)[:limit]]
    asked = [
        (q["question"][0], [_tool(f) for f in q["function"]], settings(category))
        for category, q in questions
    ]
    answers = run.ask_all(
        f"Calls of {model.name}", asked,
        key=lambda a: digest("tools", model.name, grammar, a),
        ask=lambda a: model.ask(a[0], a[1], grammar, **a[2]),
    )  # fmt: skip
    values: dict[str, float | str] = {}
    items = []
    for (category, question), answer in zip(questions, answers, strict=True):
        key = f"{category}/{question['id']}"
        if isinstance(answer, OpenNemoError):
            values[key] = str(answer)
            continue
        why = verdict(check, category, question, answer)
        values[key] = float(why is None)
        items.append({"id": key, "value": values[key], "answer": answer, "wrong": why})
    setting = ("with grammar" if grammar else "without grammar") + ", a call required" * required
    return gather("BFCL", values, parts=lambda i: i.split("/")[0], setting=setting), items


def verdict(
    check: Callable[..., dict[str, Any]], category: str, question: Mapping[str, Any], answer: Any
) -> str | None:
    """None if the answer's calls are right, else the checker's word for what is wrong."""
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

    found = check(
        question["function"], calls, question["ground_truth"], Language.PYTHON, category, MODEL
    )
    return None if found["valid"] else str(found.get("error_type") or "wrong")


def _checker() -> Callable[..., dict[str, Any]]:
    """BFCL's `ast_checker`, without the clients that its package imports beside it.

    Raises:
        OpenNemoError: the package is not installed.
    """
    name = "bfcl_eval.constants.model_config"
    if find_spec("bfcl_eval") is None:
        raise OpenNemoError("BFCL is missing: pip install --no-deps bfcl-eval==2026.3.23")
    if name not in sys.modules:
        table = ModuleType(name)
        table.MODEL_CONFIG_MAPPING = {MODEL: SimpleNamespace(underscore_to_dot=True)}  # pyright: ignore
        sys.modules[name] = table
    from bfcl_eval.eval_checker.ast_eval import ast_checker  # pyright: ignore[reportMissingImports]

    return ast_checker.ast_checker


def _questions(category: str) -> list[dict[str, Any]]:
    spec = find_spec("bfcl_eval")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "data"
    questions = read_lines(folder / f"BFCL_v4_{category}.json")
    answers = folder / "possible_answer" / f"BFCL_v4_{category}.json"
    known = {a["id"]: a["ground_truth"] for a in read_lines(answers)} if answers.exists() else {}
    return [q | {"ground_truth": known.get(q["id"], [])} for q in questions]


def _tool(function: Mapping[str, Any]) -> dict[str, Any]:
    """BFCL's description of a function as OpenAI's, whose names have no dots."""
    described = {"name": function["name"].replace(".", "_"), "description": function["description"]}
    return {
        "type": "function",
        "function": {**described, "parameters": _schema(function["parameters"])},
    }


def _schema(value: Any) -> Any:
    """A schema with JSON schema's names of types all the way down."""
    if not isinstance(value, Mapping):
        return value
    schema = {key: _schema(v) for key, v in value.items() if key not in ("properties", "type")}
    schema["type"] = TYPES.get(value.get("type", "string"), "string")
    if "properties" in value:
        schema["properties"] = {name: _schema(v) for name, v in value["properties"].items()}
    return schema
