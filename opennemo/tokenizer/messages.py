"""The normal form of a conversation, which every layout of chat.py starts from.

A conversation is OpenAI's `messages` list, as plain dicts, everywhere. Clients send more shapes
than models were trained on; a shape with one sensible meaning is converted here, so that later code
need not check again, and the rest is refused with the place and what is allowed there:

    developer               system; those anywhere make up one text, or stay where a layout says so
    user, user              one message, joined by an empty line; assistants likewise
    content                 a string, a list of text parts (joined by an empty line), or null
    thinking                a part of an assistant's content, or its `reasoning_content`; kept where
                            a layout has a place for it, else left out
    arguments               a JSON string or an object
    tool call ids           nine letters or digits; others are hashed, in call and result alike
    tool result             must answer a call; one that names none answers the first open one
    prefix: true            on the last message, an assistant's: the answer continues it
    weight: 0               on an assistant message: context in training, not learned

Joins and orders are those of `mistral-common`, the reference. Other fields are ignored.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from opennemo.errors import InvalidRequest

Message = dict[str, Any]
"""One entry of OpenAI's `messages`: role, content, tool_calls, tool_call_id, name."""
Tool = dict[str, Any]
"""One entry of OpenAI's `tools`: type, function (name, description, parameters)."""


class Part(NamedTuple):
    """A run of text or of thinking in a message; thinking may be left open, to be continued."""

    text: str
    thinking: bool = False
    closed: bool = True


@dataclass(frozen=True)
class NormalForm:
    """The parts of the normal form that depend on the layout.

    Attributes:
        system_stays: system messages are turns, which stay where they are.
        joint: what joins the text parts of one message.
        sorts_results: results come in the order of their calls.
        thinking: roles whose thinking is kept, as `parts` beside `content`.
    """

    system_stays: bool = False
    joint: str = "\n\n"
    sorts_results: bool = False
    thinking: tuple[str, ...] = ()


PLAIN = NormalForm()
ROLES = ("system", "developer", "user", "assistant", "tool")
TOOL_CALL_ID = re.compile(r"[a-zA-Z0-9]{9}")
LETTERS_AND_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def normalize(messages: Sequence[Message], form: NormalForm = PLAIN) -> list[Message]:
    """A new list: one system message or none, then user, assistant and tool messages.

    All have a string as `content`. Messages whose thinking is kept also have `parts`: all of it.
    Assistants have `tool_calls` only if they call, with `arguments` parsed where they are JSON;
    results have the `tool_call_id` of their call. Where system messages stay, they are turns.

    Raises:
        InvalidRequest: what is wrong, where (`messages[3].content`), and what is allowed.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise InvalidRequest("messages: must be a list of at least one message")
    system: list[list[Part]] = []
    turns: list[Message] = []  # their contents are lists of parts by message, joined at the end
    open_calls: list[str] = []
    call_ids: list[str] = []  # of the calls that results now answer, in order
    previous = None
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        turn = _read(message, where, form, is_last=i == len(messages) - 1)
        role, parts, calls = turn["role"], turn["content"], turn.get("tool_calls", [])
        # A system message in between keeps two users apart, as in the reference.
        merges = (role, turn.get("weight")) == previous and role in ("user", "assistant")
        previous = (role, turn.get("weight"))
        if role == "system" and not form.system_stays:
            system.append(parts)
            continue
        if role == "tool":
            turn["tool_call_id"] = _close_call(turn.get("tool_call_id"), where, open_calls)
        elif role == "assistant":
            if not merges:
                open_calls.clear()
                call_ids.clear()
            open_calls += [call["id"] for call in calls]
            call_ids += [call["id"] for call in calls]
            # Words behind a call stay behind it.
            merges = merges and not (any(p.text for p in parts) and "tool_calls" in turns[-1])
        if not merges:
            at = len(turns)
            if role == "tool" and form.sorts_results:
                while (
                    at
                    and turns[at - 1]["role"] == "tool"
                    and _is_before(turn["tool_call_id"], turns[at - 1]["tool_call_id"], call_ids)
                ):
                    at -= 1
            turns.insert(at, {**turn, "content": [parts]})
            continue
        turns[-1]["content"].append(parts)
        if calls:
            turns[-1].setdefault("tool_calls", []).extend(calls)
        if "prefix" in turn:
            turns[-1]["prefix"] = True
    for turn in turns:
        parts = _join(turn["content"], form.joint)
        text = turn["content"] = _text_of(parts)
        if any(part.thinking for part in parts):
            turn["parts"] = parts
        elif "tool_calls" in turn and not text.strip() and not form.system_stays:
            turn["content"] = ""
    parts = _join(system, form.joint)
    if not parts and (turns or form.system_stays):
        return turns
    first: Message = {"role": "system", "content": _text_of(parts)}
    if any(part.thinking for part in parts):
        first["parts"] = parts
    return [first, *turns]


def check_tools(tools: Sequence[Tool] | None) -> list[Tool]:
    """The tools as they came, after a check that a layout can print them; [] for none.

    Raises:
        InvalidRequest: what is wrong, where (`tools[0].function.name`), and what is allowed.
    """
    if tools is not None and not isinstance(tools, list | tuple):
        raise InvalidRequest("tools: must be a list")
    for i, tool in enumerate(tools or []):
        function = _function(tool, f"tools[{i}]")
        if not isinstance(function.get("description"), str | None):
            raise InvalidRequest(f"tools[{i}].function.description: must be a string")
        if not isinstance(function.get("parameters"), dict | None):
            raise InvalidRequest(f"tools[{i}].function.parameters: must be a JSON schema object")
    return list(tools or [])


def hash_id(name: str) -> str:
    """A tool call id, nine letters and digits, that depends on the name alone."""
    digest = hashlib.sha256(name.encode("utf-8", errors="surrogatepass")).digest()
    return "".join(LETTERS_AND_DIGITS[byte % 62] for byte in digest[:9])


def json_or_text(text: str) -> Any:
    """The value of a JSON text; the text itself if it is not JSON; {} for nothing."""
    try:
        return json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text


def _read(message: Message, where: str, form: NormalForm, *, is_last: bool) -> Message:
    """One message in normal form, its content as parts; a tool message may lack its id."""
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ROLES:
        raise InvalidRequest(f"{where}.role: {role!r} is not one of {', '.join(ROLES)}")
    place = "system" if role == "developer" else role
    parts = _parts(message.get("content"), f"{where}.content", place, form)
    if role == "assistant" and (thought := _reasoning(message, where, parts)):
        parts = [Part(thought, thinking=True), *parts]
    if role == "assistant" and "assistant" not in form.thinking:
        parts = [part for part in parts if not part.thinking]
    turn: Message = {"role": place, "content": parts}
    if message.get("prefix"):
        if role != "assistant" or not is_last or message.get("tool_calls"):
            raise InvalidRequest(f"{where}.prefix: only for text of the assistant's at the end")
        turn["prefix"] = True
    if role == "assistant":
        weight = message.get("weight")
        if weight not in (None, 0, 1):
            raise InvalidRequest(f"{where}.weight: {weight!r} is neither 0 nor 1")
        if weight == 0:
            turn["weight"] = 0
        if calls := _calls(message.get("tool_calls"), f"{where}.tool_calls"):
            turn["tool_calls"] = calls
    elif role == "tool":
        turn |= {key: message[key] for key in ("tool_call_id", "name") if message.get(key)}
    return turn


def _parts(content: Any, where: str, role: str, form: NormalForm) -> list[Part]:
    """The parts of one message; thinking is the assistant's, or of a role whose form keeps it."""
    if content is None or isinstance(content, str):
        return [Part(content or "")]
    thinks = role == "assistant" or role in form.thinking
    kinds = ("text", "thinking") if thinks else ("text",)
    if not isinstance(content, list | tuple):
        raise InvalidRequest(f"{where}: must be a string, a list of text parts, or null")
    parts: list[Part] = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else part
        value = part.get(kind) if kind in kinds else None
        if kind == "thinking" and isinstance(value, list):  # as Mistral's own API has it
            value = "".join(p.text for p in _parts(value, f"{where}[{i}].thinking", "user", form))
        if not isinstance(value, str):
            allowed = " and ".join(f'{{"type": "{kind}", "{kind}": ...}}' for kind in kinds)
            raise InvalidRequest(
                f"{where}[{i}]: {kind!r} is not supported, only {allowed} "
                f"{'are' if thinks else 'is'}"
            )
        closed = part.get("closed") is not False
        parts.append(Part(value, thinking=kind == "thinking", closed=closed))
    return parts


def _reasoning(message: Message, where: str, parts: list[Part]) -> str:
    """The thinking beside the content, as OpenAI's clients send it back."""
    given = {k: message[k] for k in ("reasoning_content", "reasoning") if message.get(k)}
    for key, value in given.items():
        if not isinstance(value, str):
            raise InvalidRequest(f"{where}.{key}: must be a string")
        if any(part.thinking for part in parts) or {*given.values()} != {value}:
            raise InvalidRequest(f"{where}.{key}: the message has other thinking beside it")
    return next(iter(given.values()), "")


def _join(messages: Sequence[Sequence[Part]], joint: str) -> list[Part]:
    """The parts of consecutive messages, with no two texts side by side and no empty one."""
    joined: list[Part] = []
    for parts in messages:
        between = "\n\n"
        for part in parts:
            if part.thinking:
                joined.append(part)
            elif part.text:
                if joined and not joined[-1].thinking:
                    part = Part(joined.pop().text + between + part.text)
                joined.append(part)
                between = joint
    return joined


def _text_of(parts: Sequence[Part]) -> str:
    return "\n\n".join(part.text for part in parts if not part.thinking)


def _is_before(id: str, other: str, call_ids: list[str]) -> bool:
    """Whether a result belongs before another one, by the order of their calls."""
    return id in call_ids and (other not in call_ids or call_ids.index(id) < call_ids.index(other))


def _calls(calls: Any, where: str) -> list[dict]:
    if not isinstance(calls, list | tuple | None):
        raise InvalidRequest(f"{where}: must be a list")
    normal = []
    for i, call in enumerate(calls or []):
        function = _function(call, f"{where}[{i}]")
        arguments = function.get("arguments")
        if not isinstance(arguments, str | dict | None):
            raise InvalidRequest(
                f"{where}[{i}].function.arguments: must be a JSON string or an object"
            )
        if not isinstance(arguments, dict):
            arguments = json_or_text(arguments or "")
        normal.append(
            {
                "id": _nine(call.get("id"), f"{where}[{i}].id") or hash_id(f"{where}[{i}]"),
                "type": "function",
                "function": {"name": function["name"], "arguments": arguments},
            }
        )
    return normal


def _function(entry: Any, where: str) -> dict:
    """The function that an entry of `tools` or `tool_calls` is about."""
    kind = entry.get("type", "function") if isinstance(entry, dict) else entry
    if kind != "function":
        raise InvalidRequest(f'{where}.type: {kind!r} is not supported, only "function" is')
    function = entry.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidRequest(f"{where}.function.name: must be a string")
    return function


def _nine(id: Any, where: str) -> str | None:
    """An id as Mistral's models know them; None for none ("null", to Mistral's own client)."""
    if id in (None, "", "null"):
        return None
    if not isinstance(id, str):
        raise InvalidRequest(f"{where}: must be a string")
    return id if TOOL_CALL_ID.fullmatch(id) else hash_id(id)


def _close_call(id: Any, where: str, open_calls: list[str]) -> str:
    """The id of the call that a result answers, which is then no longer open."""
    if not open_calls:
        raise InvalidRequest(f"{where}: a tool message must answer a call made just before")
    id = _nine(id, f"{where}.tool_call_id") or open_calls[0]
    # The reference counts results and does not compare ids, so an unknown id is let through.
    open_calls.remove(id if id in open_calls else open_calls[0])
    return id
