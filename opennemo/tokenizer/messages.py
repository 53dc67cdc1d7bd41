"""The normal form of a conversation, which every layout of chat.py starts from.

A conversation is OpenAI's `messages` list, as plain dicts, everywhere. Clients send more shapes
than models were trained on; what has one sensible meaning is brought to one form here, so that
nothing behind it asks again, and the rest is refused with the place and what is allowed there:

    developer               system; system messages anywhere make up one system text
    user, user              one message, joined by an empty line; assistants likewise
    content                 a string, a list of text parts (joined by an empty line), or null
    arguments               a JSON string or an object
    tool call ids           nine letters or digits; others are hashed, in call and result alike
    tool result             must answer a call; one that names none answers the first open one
    prefix: true            on the last message, an assistant's: the answer goes on from it
    weight: 0               on an assistant message: context in training, not learned

Joins and orders are those of `mistral-common`, the reference. Other fields are ignored.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

from opennemo.errors import InvalidRequest

Message = dict[str, Any]
"""One entry of OpenAI's `messages`: role, content, tool_calls, tool_call_id, name."""
Tool = dict[str, Any]
"""One entry of OpenAI's `tools`: type, function (name, description, parameters)."""

ROLES = ("system", "developer", "user", "assistant", "tool")
TOOL_CALL_ID = re.compile(r"[a-zA-Z0-9]{9}")
LETTERS_AND_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def normalize(messages: Sequence[Message]) -> list[Message]:
    """A new list: one system message or none, then user, assistant and tool messages.

    All have a string as `content`. Assistants have `tool_calls` only if they call, with
    `arguments` parsed where they are JSON; results have the `tool_call_id` of their call.

    Raises:
        InvalidRequest: what is wrong, where (`messages[3].content`), and what is allowed.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise InvalidRequest("messages: must be a list of at least one message")
    system: list[str] = []
    turns: list[Message] = []  # their contents are lists of texts, which are joined at the end
    open_calls: list[str] = []
    previous = None
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        turn = _read(message, where, is_last=i == len(messages) - 1)
        role, text, calls = turn["role"], turn["content"], turn.get("tool_calls", [])
        # A system message in between keeps two users apart, as in the reference.
        merges = (role, turn.get("weight")) == previous and role in ("user", "assistant")
        previous = (role, turn.get("weight"))
        if role == "system":
            system.append(text)
            continue
        if role == "tool":
            turn["tool_call_id"] = _close_call(turn.get("tool_call_id"), where, open_calls)
        elif role == "assistant":
            if not merges:
                open_calls.clear()
            open_calls += [call["id"] for call in calls]
            # Words behind a call stay behind it.
            merges = merges and not (text and "tool_calls" in turns[-1])
        if not merges:
            turns.append({**turn, "content": [text]})
            continue
        turns[-1]["content"].append(text)
        if calls:
            turns[-1].setdefault("tool_calls", []).extend(calls)
        if "prefix" in turn:
            turns[-1]["prefix"] = True
    for turn in turns:
        text = "\n\n".join(filter(None, turn["content"]))
        turn["content"] = "" if "tool_calls" in turn and not text.strip() else text
    text = "\n\n".join(filter(None, system))
    return [{"role": "system", "content": text}, *turns] if text or not turns else turns


def check_tools(tools: Sequence[Tool] | None) -> list[Tool]:
    """The tools as they came, once it is sure that a layout can print them; [] for none.

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


def _read(message: Message, where: str, *, is_last: bool) -> Message:
    """One message by itself in normal form, but for the id that a tool message may lack."""
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ROLES:
        raise InvalidRequest(f"{where}.role: {role!r} is not one of {', '.join(ROLES)}")
    turn: Message = {"role": role, "content": _text(message.get("content"), f"{where}.content")}
    if message.get("prefix"):
        if role != "assistant" or not is_last or message.get("tool_calls"):
            raise InvalidRequest(f"{where}.prefix: only for text of the assistant's at the end")
        turn["prefix"] = True
    if role == "developer":
        turn["role"] = "system"
    elif role == "assistant":
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


def _text(content: Any, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list | tuple):
        raise InvalidRequest(f"{where}: must be a string, a list of text parts, or null")
    texts: list[str] = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else part
        if kind != "text" or not isinstance(part.get("text"), str):
            raise InvalidRequest(
                f'{where}[{i}]: {kind!r} is not supported, only {{"type": "text", "text": ...}} is'
            )
        texts.append(part["text"])
    return "\n\n".join(filter(None, texts))


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
    """The id of the call that a result answers, which is open no longer."""
    if not open_calls:
        raise InvalidRequest(f"{where}: a tool message must answer a call made just before")
    id = _nine(id, f"{where}.tool_call_id") or open_calls[0]
    # The reference counts results and does not compare ids, so an unknown id is let through.
    open_calls.remove(id if id in open_calls else open_calls[0])
    return id
