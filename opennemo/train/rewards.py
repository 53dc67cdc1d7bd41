"""Rewards for answers: functions of an attempt, by name, and how they are called.

A reward is a function of an `Attempt` that returns a number; `rl.rewards` names several, whose
weighted sum reinforcement learning raises. Those here check calls, numbers and formats by a
program; a user's own is `module:function` or `file.py:function`. Rewards are called on a thread, so
that one that never returns ends the run with an error instead of blocking it. An error names the
answer that the reward was called with.

Sources of the checks: GSM8K's `####` (arXiv:2110.14168), IFEval (arXiv:2311.07911).
"""

import importlib
import importlib.util
import json
import math
import queue
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from opennemo.errors import InvalidRequest, OpenNemoError
from opennemo.tokenizer.messages import Message, json_or_text
from opennemo.train.conversations import Task

if TYPE_CHECKING:  # pydantic is only needed for reading recipes
    from opennemo.train.config import Reward

SHOWN = 200  # characters of an answer in an error
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Attempt:
    """An answer that was drawn, and its task."""

    task: Task
    reply: Message  # content and tool_calls
    text: str  # its content, "" if there is none
    whole: bool  # it ended by itself, and was not cut off
    broken: bool  # it begins calls that are not well-formed


Function = Callable[[Attempt], Any]


def exact_call(attempt: Attempt) -> float:
    """Whether it calls what the reference calls, with the same arguments, in any order."""
    assert attempt.task.reference is not None
    return float(exact_calls(attempt.task.reference, attempt.reply))


def exact_calls(reference: Message, reply: Message) -> bool:
    """Whether a reply calls the same functions with the same arguments, in any order.

    A reference without calls asks for a reply without calls. Numbers are equal if their values are.
    """
    return _calls(reference) == _calls(reply)


def schema(attempt: Attempt) -> float:
    """Whether its calls are to declared tools, with arguments that their schemas allow.

    For a line with a `schema`: whether the text is JSON that this schema allows.
    """
    import jsonschema

    def allows(schema: Any, value: Any) -> bool:
        return jsonschema.Draft202012Validator(schema).is_valid(value)

    wanted = attempt.task.row.get("schema")
    if wanted is not None:
        try:
            value = json.loads(attempt.text)
        except (ValueError, RecursionError):
            return 0.0
        return float(allows(json_or_text(wanted) if isinstance(wanted, str) else wanted, value))
    tools = {tool["function"]["name"]: tool["function"] for tool in attempt.task.tools}
    calls = list(_functions(attempt.reply))
    if attempt.broken or not (calls or attempt.text.strip()):
        return 0.0
    for name, arguments in calls:
        strict = {"additionalProperties": False, **(tools.get(name, {}).get("parameters") or {})}
        if name not in tools or not allows(strict, arguments):
            return 0.0
    return 1.0


def number(attempt: Attempt) -> float:
    """Whether its last number is the reference's: the one after ####, or the last."""
    wanted, answered = _number(_reference_text(attempt.task)), _number(attempt.text)
    assert wanted is not None
    return float(answered is not None and math.isclose(wanted, answered, rel_tol=1e-6))


def instructions(attempt: Attempt) -> float:
    """The share of a line's `instruction_id_list` (IFEval's) that the answer follows."""
    asked = list(_instructions(attempt.task))
    return sum(bool(CHECKS[id](attempt.text, values)) for id, values in asked) / len(asked)


def form(attempt: Attempt, pattern: str | None = None) -> float:
    """Whether it is not empty, ends by itself, has no incomplete call, and matches the pattern."""
    speaks = bool(attempt.text.strip() or attempt.reply.get("tool_calls"))
    matches = pattern is None or re.fullmatch(pattern, attempt.text.strip(), re.DOTALL)
    return float(speaks and attempt.whole and not attempt.broken and bool(matches))


REWARDS: dict[str, Callable[..., Any]] = {
    "exact_call": exact_call, "schema": schema, "number": number, "instructions": instructions,
    "format": form,
}  # fmt: skip


def _relation(n: int, values: Mapping[str, Any], limit: str, relation: str = "relation") -> bool:
    return n < values[limit] if values.get(relation) == "less than" else n >= values[limit]


def _has(text: str, word: str) -> bool:
    return re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None


# Checks of IFEval's instructions; `values` are those of its `kwargs`.
CHECKS: dict[str, Callable[[str, Mapping[str, Any]], Any]] = {
    "keywords:existence": lambda t, v: all(_has(t, word) for word in v["keywords"]),
    "keywords:forbidden_words": lambda t, v: not any(_has(t, w) for w in v["forbidden_words"]),
    "keywords:frequency": lambda t, v: _relation(
        len(re.findall(re.escape(v["keyword"]), t, re.IGNORECASE)), v, "frequency"
    ),
    "keywords:letter_frequency": lambda t, v: _relation(
        t.lower().count(v["letter"].lower()), v, "let_frequency", "let_relation"
    ),
    "length_constraints:number_words": lambda t, v: _relation(
        len(re.findall(r"\w+", t)), v, "num_words"
    ),
    "length_constraints:number_sentences": lambda t, v: _relation(
        len([s for s in re.split(r"[.!?]+(?:\s|$)", t) if s.strip()]), v, "num_sentences"
    ),
    "length_constraints:number_paragraphs": lambda t, v: (
        len([p for p in re.split(r"\s?\*\*\*\s?", t) if p.strip()]) == v["num_paragraphs"]
    ),
    "detectable_content:number_placeholders": lambda t, v: (
        len(re.findall(r"\[.*?\]", t)) >= v["num_placeholders"]
    ),
    "detectable_content:postscript": lambda t, v: (
        v["postscript_marker"].lower().replace(" ", "") in t.lower().replace(" ", "")
    ),
    "detectable_format:number_bullet_lists": lambda t, v: (
        len(re.findall(r"^\s*(?:\*[^*]|-)", t, re.MULTILINE)) == v["num_bullets"]
    ),
    "detectable_format:number_highlighted_sections": lambda t, v: (
        len(re.findall(r"\*[^\n*]+\*", t)) >= v["num_highlights"]
    ),
    "detectable_format:multiple_sections": lambda t, v: (
        len(re.findall(rf"\s?{re.escape(v['section_spliter'])}\s?\d+\s?", t)) >= v["num_sections"]
    ),
    "detectable_format:title": lambda t, v: re.search(r"<<[^\n<>]*\S[^\n<>]*>>", t),
    "detectable_format:json_format": lambda t, v: isinstance(
        json_or_text(re.sub(r"^\s*```(?:json)?|```\s*$", "", t, flags=re.IGNORECASE) or "x"),
        dict | list,
    ),
    "combination:two_responses": lambda t, v: (
        len({p.strip() for p in t.split("******") if p.strip()}) == 2
    ),
    "combination:repeat_prompt": lambda t, v: (
        t.strip().lower().startswith(v["prompt_to_repeat"].strip().lower())
    ),
    "startend:end_checker": lambda t, v: (
        t.strip().strip('"').lower().endswith(v["end_phrase"].strip().lower())
    ),
    "startend:quotation": lambda t, v: re.fullmatch(r'\s*".+"\s*', t, re.DOTALL),
    "change_case:english_capital": lambda t, v: t.isupper(),
    "change_case:english_lowercase": lambda t, v: t.islower(),
    "change_case:capital_word_frequency": lambda t, v: _relation(
        sum(w.isupper() for w in re.findall(r"\w+", t)), v, "capital_frequency", "capital_relation"
    ),
    "punctuation:no_comma": lambda t, v: "," not in t,
}


class Judge:
    """The rewards of a run, part by part."""

    def __init__(self, rewards: Sequence["Reward"], timeout: float):
        """`timeout` are the seconds that one answer's reward may take.

        Raises:
            InvalidRequest: there is no such reward, or it cannot be imported; the error names it.
        """
        self.names = [reward.name for reward in rewards]
        if len({*self.names}) < len(self.names):
            raise InvalidRequest("rl.rewards: a name is there twice")
        self.weights = np.array([reward.weight for reward in rewards])
        self.timeout = timeout
        self._functions = [_function(reward) for reward in rewards]

    def check(self, task: Task) -> str | None:
        """Why answers to a task cannot be judged; None if they can."""
        if {"exact_call", "number"} & {*self.names} and task.reference is None:
            return "there is no reference answer, which exact_call and number compare with"
        if "number" in self.names and _number(_reference_text(task)) is None:
            return "the reference answer holds no number"
        if "instructions" in self.names:
            try:
                asked = list(_instructions(task))
            except (TypeError, ValueError, AttributeError):
                return "instruction_id_list and kwargs are not a list of names and one of objects"
            if not asked:
                return "there is no instruction_id_list, which the reward instructions checks"
            for id, _ in asked:
                if id not in CHECKS:
                    return f"instruction {id!r} cannot be checked; those are {', '.join(CHECKS)}"
        return None

    def __call__(self, attempts: Sequence[Attempt]) -> np.ndarray:
        """The rewards (attempts, rewards) of each attempt, before they are weighted.

        Raises:
            OpenNemoError: a reward failed; the error names it, the line and the answer.
        """
        values: list[float] = []
        results: queue.Queue[Any] = queue.Queue()
        calls = [(f, attempt) for attempt in attempts for f in self._functions]

        def work() -> None:
            for function, attempt in calls:
                try:
                    results.put(_checked(function(attempt)))
                except BaseException as error:  # noqa: BLE001  a user's code may raise anything
                    results.put(error)
                    return

        # A daemon thread: if it hangs, the process can still end.
        threading.Thread(target=work, name="opennemo-rewards", daemon=True).start()
        for i in range(len(calls)):
            try:
                value = results.get(timeout=self.timeout)
            except queue.Empty:
                value = TimeoutError(f"did not return within {self.timeout:g} seconds")
            if isinstance(value, BaseException):
                raise OpenNemoError(self._complaint(i, calls[i][1], value)) from None
            values.append(value)
        return np.array(values).reshape(len(attempts), len(self._functions))

    def _complaint(self, i: int, attempt: Attempt, error: BaseException) -> str:
        said = str(error)
        if not isinstance(error, TimeoutError | _NoNumber):
            said = f"raised {type(error).__name__}: {error}"
        text = json.dumps(attempt.text[:SHOWN], ensure_ascii=False)
        calls = json.dumps(attempt.reply.get("tool_calls") or [], ensure_ascii=False)[:SHOWN]
        with_calls = f" with calls {calls}" if attempt.reply.get("tool_calls") else ""
        name = self.names[i % len(self.names)]
        return f"reward {name} {said}; for {attempt.task.place}, the answer {text}{with_calls}"


class _NoNumber(ValueError):
    """A reward returned something that is not a finite number."""


def _checked(value: Any) -> float:
    shape = getattr(value, "shape", ())
    if not (isinstance(value, bool | int | float) or (len(shape) == 0 and hasattr(value, "item"))):
        kind = f"a {type(value).__name__}" + (f" of shape {tuple(shape)}" if shape else "")
        raise _NoNumber(f"returned {kind}, not a number")
    number = float(value)
    if not math.isfinite(number):
        raise _NoNumber(f"returned {number}, which is not finite")
    return number


def _function(reward: "Reward") -> Function:
    name = reward.name
    if reward.pattern is not None:
        if name != "format":
            raise InvalidRequest(f"rl.rewards: {name} takes no pattern, only format does")
        try:
            re.compile(reward.pattern)
        except re.error as error:
            raise InvalidRequest(f"rl.rewards: pattern {reward.pattern!r}: {error}") from None
        return lambda attempt: form(attempt, reward.pattern)
    if name in REWARDS:
        return REWARDS[name]
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute:
        raise InvalidRequest(
            f"rl.rewards: there is no reward {name!r}; allowed are {', '.join(REWARDS)}, or "
            "module:function or file.py:function of your own"
        )
    try:
        function = getattr(_module(place), attribute)
    except Exception as error:  # noqa: BLE001  whatever a user's module does when it is imported
        raise InvalidRequest(f"rl.rewards: {name}: {type(error).__name__}: {error}") from None
    if not callable(function):
        raise InvalidRequest(f"rl.rewards: {name} is a {type(function).__name__}, not a function")
    return function


def _module(place: str) -> Any:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    spec = importlib.util.spec_from_file_location(Path(place).stem, place)
    assert spec is not None and spec.loader is not None, place
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _functions(message: Message) -> Iterator[tuple[str, Any]]:
    for call in message.get("tool_calls") or ():
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        yield name, json_or_text(arguments) if isinstance(arguments, str) else arguments


def _calls(message: Message) -> list[str]:
    return sorted(
        json.dumps([n, _plain(value)], sort_keys=True) for n, value in _functions(message)
    )


def _plain(value: Any) -> Any:
    """The same with whole numbers as integers: JSON does not distinguish 2.0 from 2."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _reference_text(task: Task) -> str:
    return str((task.reference or {}).get("content") or "").rpartition("####")[2]


def _number(text: str) -> float | None:
    numbers = NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def _instructions(task: Task) -> Iterator[tuple[str, Mapping[str, Any]]]:
    ids = task.row.get("instruction_id_list") or []
    values = task.row.get("kwargs") or [{}] * len(ids)
    for id, given in zip(ids, values, strict=True):
        yield str(id), {key: v for key, v in (given or {}).items() if v is not None}
