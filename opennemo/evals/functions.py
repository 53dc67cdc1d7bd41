"""Function calling: BFCL's questions, judged by BFCL's own checkers.

`bfcl-eval` brings 120 packages with pins, of which its checkers need one at most, so it is
installed without them (pip install --no-deps), and its table of models is replaced (patches.py).

Gorilla (arXiv:2305.15334) and the Berkeley function-calling leaderboard, version 4.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from opennemo.errors import InvalidRequest, OpenNemoError
from opennemo.evals import multi_turn
from opennemo.evals.benchmark_data import read_lines
from opennemo.evals.endpoint import ChatModel
from opennemo.evals.patches import BFCL_MODEL, bfcl, call_checker
from opennemo.evals.rows import gather
from opennemo.evals.runs import Run, digest
from opennemo.evals.suites import Calls, Outcome, Request

KINDS = ("simple", "multiple", "parallel", "parallel_multiple", "irrelevance")
LIVE = tuple(f"live_{kind}" for kind in (*KINDS, "relevance"))  # questions of BFCL's users
ONE_TURN = ("simple_python", *KINDS[1:], *LIVE)
CATEGORIES = (*ONE_TURN, *multi_turn.CATEGORIES)
# BFCL's names of types, and JSON schema's.
TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string", "list": "array"}
TYPES |= {name: name for name in ("string", "integer", "number", "boolean", "array", "object")}


def prepare(request: Request) -> None:
    """Raises OpenNemoError if a package is missing, or if options do not go together."""
    if request.options.required and not request.options.grammar:
        raise InvalidRequest("--required needs the grammar, which --no-grammar leaves out")
    several = set(_chosen(request)) & set(multi_turn.CATEGORIES)
    if several and request.options.required:
        raise InvalidRequest("--required lets no turn end: leave multi_turn_* out of --tasks")
    call_checker()
    if several and find_spec("mpmath") is None:
        raise InvalidRequest("BFCL's multi_turn_* need mpmath: pip install mpmath")


def measure(model: ChatModel, request: Request, run: Run) -> Outcome:
    """Share of questions whose calls are right, by category, and the calls one by one.

    With `required` an answer must be a call, and only one where one is expected; BFCL leaves both
    to the model.
    """
    options: Calls = request.options
    grammar, required, check = options.grammar, options.required, call_checker()

    def ask(asked: tuple[str, dict[str, Any]]) -> Any:
        category, question = asked

        def answer(messages: list[dict[str, Any]], functions: Sequence[Mapping[str, Any]]) -> Any:
            only = {"tool_choice": "required", "parallel_tool_calls": "parallel" in category}
            settings = {"temperature": 0.0, "max_tokens": 512}
            settings |= only if required and functions else {}
            return model.ask(messages, [as_tool(f) for f in functions], grammar, **settings)

        if category in multi_turn.CATEGORIES:
            return multi_turn.converse(question, answer)
        return answer(question["question"][0], question["function"])

    asked = [(c, q) for c in _chosen(request) for q in questions(c)[: request.limit]]
    answers = run.ask_all(
        f"Calls of {model.name}", asked,
        key=lambda a: digest("tools", model.name, grammar, required, a), ask=ask,
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


def _chosen(request: Request) -> Sequence[str]:
    return request.chosen(CATEGORIES, ONE_TURN if request.options.required else None)


def verdict(
    check: Callable[..., dict[str, Any]], category: str, question: Mapping[str, Any], answer: Any
) -> str | None:
    """None if the answer's calls are right, else the checker's name of the error."""
    if category in multi_turn.CATEGORIES:
        return multi_turn.judge(question, answer["turns"])
    calls = multi_turn.read_calls(answer)
    if "irrelevance" in category:  # to BFCL, a call that cannot be read is not one
        return "a call where there is nothing to call" if calls else None
    if calls is None:
        return "arguments are not a JSON object"
    if not calls:
        return "no call"
    if "relevance" in category:
        return None
    made, language = [{name: given} for name, given in calls], bfcl("constants.enums").Language
    described, truth = question["function"], question["ground_truth"]
    result = check(described, made, truth, language.PYTHON, category, BFCL_MODEL)
    return None if result["valid"] else str(result.get("error_type") or "wrong")


def questions(category: str) -> list[dict[str, Any]]:
    """BFCL's questions, each with its `ground_truth` and the functions that it declares."""
    folder = Path(bfcl("data").__path__[0])
    lines = read_lines(folder / f"BFCL_v4_{category}.json")
    answers = folder / "possible_answer" / f"BFCL_v4_{category}.json"
    truth = {a["id"]: a["ground_truth"] for a in read_lines(answers)} if answers.exists() else {}
    asked = [q | {"ground_truth": truth.get(q["id"], [])} for q in lines]
    return _with_services(asked, folder) if category in multi_turn.CATEGORIES else asked


def _with_services(asked: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Questions with the functions of their services, apart from those held back, by turn."""
    files = bfcl("constants.executable_backend_config").MULTI_TURN_FUNC_DOC_FILE_MAPPING
    described = {name: read_lines(folder / "multi_turn_func_doc" / files[name]) for name in files}
    for question in asked:
        functions = {f["name"]: f for name in question["involved_classes"] for f in described[name]}
        question["missed_function"] = {
            turn: [functions.pop(name) for name in names]
            for turn, names in question.get("missed_function", {}).items()
        }
        question["function"] = list(functions.values())
    return asked


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
