"""Lines of chat files, in the shapes that people have, to conversations in one shape.

Each shape is a few lines that give OpenAI's `messages`, as plain dicts; what those say is judged by
one function, `checked`, whatever the line looked like.

    messages                mistral-finetune's, with `tools`, `system`, `weight: 0`, `only_last`
    conversations           ShareGPT's from and value; calls and results as LLaMA-Factory has them
    instruction, output     Alpaca's, with `input`, `system`, `history`
    ..., chosen, rejected   any of these followed by two answers, a preference (`answer_of`)

It knows no files and no tokens. Sources: the README and `finetune/data/tokenize.py` of
mistral-finetune, the data formats of LLaMA-Factory and TRL.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from opennemo.errors import InvalidRequest
from opennemo.tokenizer.messages import Message, Tool, normalize

# Who speaks in ShareGPT's files; a function_call is the assistant's, in JSON.
SPEAKERS = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
    "assistant": "assistant", "bot": "assistant", "model": "assistant", "tool": "tool",
    "observation": "tool", "function_response": "tool", "tool_response": "tool",
    "function_call": "call", "tool_call": "call",
}  # fmt: skip


def parse_line(line: bytes) -> dict[str, Any]:
    """The object that a line of JSON says.

    Raises:
        InvalidRequest: it is not UTF-8, not JSON, or no object.
    """
    if not line:
        raise InvalidRequest("the file is empty")
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"not UTF-8 (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise InvalidRequest(f"a {type(row).__name__}; a line must be one JSON object")
    return row


def conversation_of(row: dict[str, Any]) -> tuple[list[Message], list[Tool]]:
    """The messages and tools of a line, whatever its shape; not checked beyond the shape.

    Raises:
        InvalidRequest: the line has no shape that is known.
    """
    shapes = {"messages": _messages, "interactions": _messages, "conversations": _sharegpt}
    keys = [key for key in shapes if key in row]
    if len(keys) > 1:
        raise InvalidRequest(f"both {' and '.join(keys)} are given; there can be one")
    if keys:
        turns = row[keys[0]]
        if not isinstance(turns, list) or not turns or not all(isinstance(t, dict) for t in turns):
            raise InvalidRequest(f"{keys[0]}: must be a list of at least one object")
        messages = shapes[keys[0]](turns)
    elif "instruction" in row and "output" in row:
        messages = _alpaca(row)
    else:
        names = ", ".join(list(row)[:5]) or "nothing"
        raise InvalidRequest(
            "no conversation: it needs `messages`, `conversations`, or `instruction` and `output`; "
            f"found {names}"
        )
    if row.get("only_last"):
        *earlier, last = messages
        messages = [*map(as_context, earlier), last]
    for key in ("system", "system_prompt"):
        if row.get(key):  # behind, so that the places of the others stay as they are in the file
            messages.append({"role": "system", "content": row[key]})
    return messages, _tools(row)


def checked(messages: list[Message], tools: list[Tool], *, strict: bool = True) -> list[Message]:
    """The conversation in normal form, good enough to learn from.

    A server takes some things as they come (arguments that are no JSON, a call to a tool that is
    gone), but to learn them would be to learn a mistake; unless `strict` is off they are refused.
    """
    conversation = normalize(messages)
    learned = [m for m in conversation if m["role"] == "assistant" and m.get("weight") != 0]
    if not learned:
        silent = any(m["role"] == "assistant" for m in conversation)
        why = "every assistant message has weight 0" if silent else "there is no assistant message"
        raise InvalidRequest(f"messages: nothing to learn, {why}")
    if (last := conversation[-1]["role"]) != "assistant":
        raise InvalidRequest(f"messages: must end with an assistant message, not with a {last} one")
    names = {tool["function"]["name"] for tool in tools if _is_function(tool)}
    for message in learned if strict else ():
        if not message["content"].strip() and not message.get("tool_calls"):
            raise InvalidRequest("messages: an assistant message has no words and calls no tool")
        for call in message.get("tool_calls", ()):
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            if name not in names:
                raise InvalidRequest(f"messages: calls {name!r}, which is not among the tools")
            if not isinstance(arguments, dict):
                raise InvalidRequest(f"messages: the arguments of {name!r} are no JSON object")
    return conversation


def split_at_answers(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """One conversation for each answer that is to be learned: it, and what came before as context.

    Mistral's layouts give the tools with the last question, so an earlier answer in the same
    sequence would be learned from a prompt without any. mistral-finetune learns the last one only.
    """
    is_system = [m.get("role") in ("system", "developer") for m in messages]
    system = [m for m, is_it in zip(messages, is_system, strict=True) if is_it]
    turns = [m for m, is_it in zip(messages, is_system, strict=True) if not is_it]
    speaks = [m.get("role") == "assistant" for m in turns]
    start = 0
    for end in range(1, len(turns) + 1):
        if not speaks[end - 1]:
            start = end
            continue
        answer, is_whole = turns[start:end], end == len(turns) or not speaks[end]
        if is_whole and any(m.get("weight") != 0 for m in answer):
            yield [*system, *map(as_context, turns[:start]), *answer]


def _messages(turns: list[dict]) -> list[Message]:
    """mistral-finetune's messages, whose `content` may be called `text`."""
    return [
        {**turn, "content": turn["text"]} if "content" not in turn and "text" in turn else turn
        for turn in turns
    ]


def _sharegpt(turns: list[dict]) -> list[Message]:
    messages: list[Message] = []
    for i, turn in enumerate(turns):
        speaker = turn.get("from", turn.get("role"))
        role = SPEAKERS.get(str(speaker).lower().replace("-", "_"))
        content = turn.get("value", turn.get("content"))
        if role is None:
            speakers = ", ".join(SPEAKERS)
            raise InvalidRequest(f"conversations[{i}].from: {speaker!r} is not one of {speakers}")
        message = _message(role, content)
        if role == "call":
            message = {**_message("assistant", ""), "tool_calls": _calls(content, i)}
        if "weight" in turn:
            message["weight"] = turn["weight"]
        messages.append(message)
    return messages


def _calls(text: Any, i: int) -> list[dict]:
    try:
        value = json.loads(text)
        return [{"function": call} for call in (value if isinstance(value, list) else [value])]
    except (TypeError, ValueError, RecursionError):
        raise InvalidRequest(f"conversations[{i}].value: a function call must be JSON") from None


def _alpaca(row: dict[str, Any]) -> list[Message]:
    instruction, more = row["instruction"], row.get("input")
    messages: list[Message] = []
    for entry in row.get("history") or []:
        if not isinstance(entry, list) or len(entry) != 2:
            raise InvalidRequest("history: must be a list of pairs, of question and answer")
        messages += [_message("user", entry[0]), _message("assistant", entry[1])]
    question = f"{instruction}\n\n{more}" if more else instruction
    return [*messages, _message("user", question), _message("assistant", row["output"])]


def _message(role: str, content: Any) -> Message:
    return {"role": role, "content": content}


def _tools(row: dict[str, Any]) -> list[Tool]:
    tools = next((row[k] for k in ("tools", "available_tools", "functions") if row.get(k)), [])
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise InvalidRequest("tools: a string that is not JSON") from None
    if not isinstance(tools, list):
        raise InvalidRequest("tools: must be a list")
    bare = [isinstance(t, dict) and "function" not in t and "name" in t for t in tools]
    return [
        {"type": "function", "function": tool} if is_bare else tool
        for tool, is_bare in zip(tools, bare, strict=True)
    ]


def _is_function(tool: Any) -> bool:
    function = tool.get("function") if isinstance(tool, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def answer_of(row: dict[str, Any], key: str) -> list[Message]:
    """An answer may be a text, a message, or several messages."""
    value = row.get(key)
    if isinstance(value, str):
        value = {"role": "assistant", "content": value}
    answer: list[Any] = value if isinstance(value, list) else [value]
    if not answer or not all(isinstance(m, dict) for m in answer):
        raise InvalidRequest(f"{key}: must be a text, a message, or a list of messages")
    return answer


def as_context(message: Message) -> Message:
    return {**message, "weight": 0} if message.get("role") == "assistant" else message
