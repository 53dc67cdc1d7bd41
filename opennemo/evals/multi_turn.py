"""BFCL's conversations of several turns, whose calls run on simulated services.

A turn ends with an answer that calls nothing. BFCL's checker then runs the model's calls and its
own, and compares what they return and the state of the services, turn by turn.
"""

from collections.abc import Callable, Collection, Mapping
from threading import Lock
from typing import Any

from opennemo.evals.patches import bfcl, bfcl_services
from opennemo.tokenizer.messages import Message, json_or_text

KINDS = ("base", "miss_func", "miss_param", "long_context")
CATEGORIES = tuple(f"multi_turn_{kind}" for kind in KINDS)
CHECKER = "eval_checker.multi_turn_eval"
ONE_AT_A_TIME = Lock()  # of the services, which share state, for instance mpmath's precision


def converse(question: Mapping[str, Any], ask: Callable[..., Message]) -> dict[str, Any]:
    """All turns of a question: `turns`, the calls of each step of each, and all `messages`.

    `ask` gets the messages and the functions so far; those that a question holds back are added in
    their turn. A model that still calls after BFCL's limit of steps ends the conversation there.
    """
    prompts = bfcl("constants.default_prompts")
    execute = bfcl(f"{CHECKER}.multi_turn_utils").execute_multi_turn_func_call
    functions, messages, turns = list(question["function"]), [], []
    services, id = (question["initial_config"], question["involved_classes"]), question["id"]
    with bfcl_services() as name:
        for turn, said in enumerate(question["question"]):
            if added := question["missed_function"].get(str(turn)):
                functions += added
                text = prompts.DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_FC
                said = [{"role": "user", "content": text}]
            messages += said
            turns.append(steps := [])
            while len(steps) <= prompts.MAXIMUM_STEP_LIMIT:  # one more than the limit, as in BFCL
                answer = ask(messages, functions)
                messages.append(answer)
                if not (calls := read_calls(answer)):
                    break
                declared = {function["name"] for function in functions}
                steps.append([as_python(*call, declared) for call in calls])
                with ONE_AT_A_TIME:
                    results, _ = execute(steps[-1], *services, name, id, "long_context" in id)
                messages += [
                    {"role": "tool", "tool_call_id": call["id"], "content": result}
                    for call, result in zip(answer["tool_calls"], results, strict=True)
                ]
            else:
                break
    return {"turns": turns, "messages": messages}


def judge(question: Mapping[str, Any], turns: list[list[list[str]]]) -> str | None:
    """None if the turns do what BFCL's own calls do, else the checker's name of the error."""
    check = bfcl(f"{CHECKER}.multi_turn_checker").multi_turn_checker
    truth, category = question["ground_truth"], question["id"].rpartition("_")[0]
    if len(turns) != len(truth):
        return "multi_turn:force_terminated"
    with bfcl_services() as name:
        result = check(turns, truth, question, category, name)
    return None if result["valid"] else str(result["error_type"])


def read_calls(answer: Message) -> list[tuple[str, dict[str, Any]]] | None:
    """Name and arguments of each call of an answer; None if arguments are not a JSON object."""
    calls = []
    for call in answer.get("tool_calls") or ():
        arguments = json_or_text(call["function"]["arguments"])
        if not isinstance(arguments, dict):
            return None
        calls.append((call["function"]["name"], arguments))
    return calls


def as_python(name: str, arguments: Mapping[str, Any], declared: Collection[str]) -> str:
    """A call as BFCL writes it, which gives it to `eval`.

    What a model wrote cannot run as code: the function is a declared one, each argument's name is
    an identifier before "=", and each value is the repr of a JSON value, which is a literal (or
    `nan` or `inf`, names that do not exist there). Instead of any other call stands that of a
    function that does not exist, whose error the model gets as the result.
    """
    if name not in declared or not all(key.isidentifier() for key in arguments):
        return "function_or_argument_not_declared()"
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
