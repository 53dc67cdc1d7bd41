"""Lines of chat files, in their common shapes, to conversations in one shape.

Each shape is a few lines that give OpenAI's `messages`, as plain dicts; one function, `checked`,
validates those, whatever shape the line had.

    messages                mistral-finetune's, with `tools`, `system`, `weight: 0`, `only_last`;
                            `functions` and `function_call` of OpenAI's first tools
    conversations           ShareGPT's from and value; calls and results as LLaMA-Factory has them
    instruction, output     Alpaca's, with `input`, `system`, `history`
    prompt, completion      TRL's, texts or messages; likewise question, query, answer, response
    ..., chosen, rejected   a question in any of these and two answers, a preference; or two whole
                            conversations that begin alike (`preference_of`)

It knows no files and no tokens. Sources: the README and `finetune/data/tokenize.py` of
mistral-finetune, the data formats of LLaMA-Factory and TRL; the cards of UltraFeedback, Orca's
pairs, HelpSteer3 and hh-rlhf, and NeMo-RL's datasets.
"""

import json
import re
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

QUESTIONS = ("prompt", "question", "instruction", "query", "input")
ANSWERS = ("completion", "response", "answer", "output")
CHOICES = (("chosen", "rejected"), ("chosen_response", "rejected_response"))
TRANSCRIPT = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")  # hh-rlhf's


def parse_line(line: bytes) -> dict[str, Any]:
    """The object in a line of JSON.

    Raises:
        InvalidRequest: it is not UTF-8, not JSON, or not an object.
    """
    if not line:
        raise InvalidRequest("the file is empty")
    try:
        row = json.loads(line.decode("utf-8-sig"))  # with or without Windows' mark at the start
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
    keys = [key for key in shapes if row.get(key) is not None]
    if len(keys) > 1:
        raise InvalidRequest(f"both {' and '.join(keys)} are given; there can be one")
    if keys:
        messages = _turns(row[keys[0]], keys[0])
    else:
        question, answer = _first(row, QUESTIONS), _first(row, ANSWERS)
        if question is None or answer is None or question == answer:
            raise InvalidRequest(_no_conversation(row))
        messages = _question(row, question) + _spoken(row[answer], answer)
    if row.get("only_last"):
        *earlier, last = messages
        messages = [*map(as_context, earlier), last]
    for key in ("system", "system_prompt"):
        if row.get(key):  # last, so that the places of the others stay as they are in the file
            messages.append({"role": "system", "content": row[key]})
    return messages, _tools(row)


def task_of(row: dict[str, Any]) -> tuple[list[Message], list[Tool], Message | None]:
    """The prompt, the tools, and the reference answer of a line, if there is one.

    Raises:
        InvalidRequest: the line has no shape that is known.
    """
    question = _first(row, QUESTIONS)
    if question and not any(row.get(k) for k in ("messages", "conversations", *ANSWERS)):
        messages, tools = _question(row, question), _tools(row)
        messages += [_message("system", row[k]) for k in ("system", "system_prompt") if row.get(k)]
    else:
        messages, tools = conversation_of(row)
    # A line's own system text may come last here; it is laid out first in any case.
    system = [m for m in messages if m.get("role") in ("system", "developer")]
    turns = [m for m in messages if m.get("role") not in ("system", "developer")]
    reference = None
    while turns and turns[-1].get("role") == "assistant":
        reference = turns.pop()
    if not turns or turns[-1].get("role") not in ("user", "tool"):
        raise InvalidRequest("messages: must hold what is answered, a user or tool message")
    return [*system, *turns], tools, reference


def preference_of(
    row: dict[str, Any],
) -> tuple[list[Message], list[Tool], tuple[list[Message], list[Message]]]:
    """The prompt, the tools, and the chosen and the rejected answer of a line.

    Raises:
        InvalidRequest: the line has no shape that is known.
    """
    chosen, rejected = answers = _two_answers(row)
    keys = [key for key in ("messages", "conversations", "context") if row.get(key) is not None]
    if not any(answer[0].get("role") in ["system", "developer", "user"] for answer in answers):
        if keys:
            context = _turns(row[keys[0]], keys[0])
            # Some sets repeat the chosen answer where they have messages.
            while context and context[-1:] == chosen[-1:]:
                context = context[:-1]
        elif (question := _first(row, QUESTIONS)) is not None:
            context = _question(row, question)
        else:
            raise InvalidRequest(
                "chosen and rejected are answers, and nothing says to what: there is no `prompt`, "
                "`messages` or `conversations`"
            )
    else:
        context = []
        for one, other in zip(chosen, rejected, strict=False):
            if one != other:
                break
            context.append(one)
        while context and context[-1].get("role") == "assistant":
            context.pop()  # an answer that both begin with is a part of what is compared
        answers = chosen[len(context) :], rejected[len(context) :]
        if not all(answers) or any(a[0].get("role") != "assistant" for a in answers):
            raise InvalidRequest(
                "chosen and rejected are whole conversations that do not answer the same messages"
            )
    for key in ("system", "system_prompt"):
        if row.get(key) and context[:1] != [{"role": "system", "content": row[key]}]:
            context = [*context, {"role": "system", "content": row[key]}]
    return context, _tools(row), (answers[0], answers[1])


# Prompts and their answers, by the names in public data sets.
SHAPES = {
    ("messages", ""): "messages (OpenAI, mistral-finetune)",
    ("conversations", ""): "conversations (ShareGPT)",
    ("instruction", ""): "instruction and output (Alpaca)",
    ("prompt", ""): "prompt and completion (TRL)",
    ("", "two conversations"): "two whole conversations (TRL, implicit prompt)",
    ("prompt", "two conversations"): "a prompt and two whole conversations (UltraFeedback)",
    ("messages", "two conversations"): "a prompt and two whole conversations (UltraFeedback)",
    ("prompt", "two texts"): "prompt, chosen and rejected as texts (TRL)",
    ("prompt", "two messages"): "prompt, chosen and rejected as messages (TRL)",
    ("question", "two texts"): "a question and two texts (Orca pairs)",
    ("conversations", "two messages"): "ShareGPT with two answers (LLaMA-Factory)",
    ("instruction", "two texts"): "Alpaca with two answers (LLaMA-Factory)",
    ("instruction", "two outputs"): "Alpaca with two outputs (LLaMA-Factory of 2023)",
    ("", "two transcripts"): "two transcripts (hh-rlhf)",
}


def shape_of(row: dict[str, Any]) -> str:
    """A good line's shape in words, with public data sets that have it."""
    if "overall_preference" in row:
        return "two responses and overall_preference (HelpSteer3)"
    if isinstance(row.get("completions"), list):
        return "ranked completions (NeMo-RL)"
    asked = _first(row, ("messages", "conversations", "interactions", "context", *QUESTIONS)) or ""
    answers = "two outputs" if _is_pair(row.get("output")) else ""
    for value in (row[keys[0]] for keys in CHOICES if keys[0] in row):
        if isinstance(value, str):
            answers = "two transcripts" if TRANSCRIPT.match(value) else "two texts"
        else:
            first = value if isinstance(value, dict) else value[0]
            role = SPEAKERS.get(str(first.get("role", first.get("from"))).lower())
            answers = "two conversations" if role in ("user", "system") else "two messages"
    asked = "" if answers == "two transcripts" else asked
    named = SHAPES.get((asked, answers))
    return named or " and ".join(filter(None, (asked, answers or _first(row, ANSWERS))))


def holds_preference(row: dict[str, Any]) -> bool:
    """Whether a line compares answers."""
    keys = ("chosen", "chosen_response", "completions", "overall_preference")
    return any(key in row for key in keys) or _is_pair(row.get("output"))


def _two_answers(row: dict[str, Any]) -> tuple[list[Message], list[Message]]:
    for keys in CHOICES:
        if any(key in row for key in keys):
            values = [row.get(key) for key in keys]
            texts = [v for v in values if isinstance(v, str) and TRANSCRIPT.match(v)]
            if len(texts) == 2:
                chosen, rejected = map(_transcript, texts)
            else:
                chosen, rejected = (_spoken(row.get(key), key) for key in keys)
            return chosen, rejected
    if _is_pair(row.get("output")):  # LLaMA-Factory's of 2023
        good, bad = row["output"]
        return _spoken(good, "output[0]"), _spoken(bad, "output[1]")
    completions = row.get("completions")
    if isinstance(completions, list) and len(completions) > 1:  # NeMo-RL's
        if not all(isinstance(c, dict) and type(c.get("rank")) is int for c in completions):
            raise InvalidRequest("completions: must be objects with a `rank` and a `completion`")
        ranked = sorted(completions, key=lambda completion: completion["rank"])
        best, worst = ranked[0].get("completion"), ranked[-1].get("completion")
        return _spoken(best, "completion"), _spoken(worst, "completion")
    if "overall_preference" in row:  # HelpSteer3's: below zero the first is better
        preference = row["overall_preference"]
        if not isinstance(preference, int | float) or not preference:
            raise InvalidRequest(f"overall_preference: {preference!r} prefers neither response")
        keys = ("response1", "response2") if preference < 0 else ("response2", "response1")
        return _spoken(row.get(keys[0]), keys[0]), _spoken(row.get(keys[1]), keys[1])
    names = ", ".join(list(row)[:5]) or "nothing"
    unpaired = "; one answer with a `label` is not a pair" if "label" in row else ""
    raise InvalidRequest(
        f"no preference: it needs `chosen` and `rejected`; found {names}{unpaired}"
    )


def _transcript(text: str) -> list[Message]:
    """A conversation in one text, its turns headed Human: and Assistant:."""
    _, *pieces = TRANSCRIPT.split(text)
    speakers = {"Human": "user", "Assistant": "assistant"}
    heads, contents = pieces[::2], pieces[1::2]
    return [_message(speakers[h], c) for h, c in zip(heads, contents, strict=True)]


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and [type(entry) for entry in value] == [str, str]


def _first(row: dict[str, Any], keys: Sequence[str]) -> str | None:
    return next((key for key in keys if row.get(key) is not None), None)


def _question(row: dict[str, Any], key: str) -> list[Message]:
    """The prompt: messages, or a text with its input and the earlier turns."""
    if not isinstance(row[key], str):
        return _turns(row[key], key)
    messages: list[Message] = []
    for entry in row.get("history") or []:
        if not isinstance(entry, list) or len(entry) != 2:
            raise InvalidRequest("history: must be a list of pairs, of question and answer")
        messages += [_message("user", entry[0]), _message("assistant", entry[1])]
    more = _first(row, ("input", "context")) if key == "instruction" else None
    question = f"{row[key]}\n\n{row[more]}" if more and row[more] else row[key]
    return [*messages, _message("user", question)]


def _no_conversation(row: dict[str, Any]) -> str:
    names = ", ".join(list(row)[:5]) or "nothing"
    hint = ""
    if isinstance(row.get("text"), str):
        hint = "; texts are learned with the objective text"
    elif holds_preference(row):
        hint = "; answers that are compared are learned with the objective preference"
    return (
        "no conversation: it needs `messages`, `conversations`, `prompt` and `completion`, or "
        f"`instruction` and `output`; found {names}{hint}"
    )


def checked(messages: list[Message], tools: list[Tool], *, strict: bool = True) -> list[Message]:
    """The conversation in normal form, good enough to learn from.

    A server accepts some mistakes (arguments that are not JSON, a call to a tool that is gone), but
    a model should not learn them; unless `strict` is off they are refused.
    """
    try:
        conversation = normalize(messages)
    except InvalidRequest:
        by_model = [message for message in messages if message.get("role") == "assistant"]
        if any("<tool_call>" in str(message.get("content")) for message in by_model):
            raise InvalidRequest(
                "messages: calls are text in <tool_call> tags, and results have roles of their "
                "own; write calls as `tool_calls` and definitions as `tools`"
            ) from None
        raise
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
    """One conversation for each answer that is to be learned, with the earlier turns as context.

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


def _turns(turns: Any, key: str) -> list[Message]:
    """A list of turns, spelt in either way."""
    if not isinstance(turns, list) or not turns or not all(isinstance(t, dict) for t in turns):
        raise InvalidRequest(f"{key}: must be a list of at least one object")
    sharegpt = key == "conversations" or any("from" in turn for turn in turns)
    return _sharegpt(turns) if sharegpt else _messages(turns)


def _spoken(value: Any, key: str) -> list[Message]:
    """An answer: a text, a message, or several messages."""
    if isinstance(value, str):
        return [_message("assistant", value)]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        raise InvalidRequest(f"{key}: must be a text, a message, or a list of messages")
    return _turns(value, key)


def _messages(turns: list[dict]) -> list[Message]:
    """OpenAI's messages, also as its first tools had them, and `text` for mistral-finetune's."""
    messages = []
    for turn in turns:
        if "content" not in turn and "text" in turn:
            turn = {**turn, "content": turn["text"]}
        if isinstance(turn.get("function_call"), dict):
            calls = [{"function": turn["function_call"]}]
            turn = {k: v for k, v in turn.items() if k != "function_call"} | {"tool_calls": calls}
        if turn.get("role") == "function":
            turn = {**turn, "role": "tool"}
        messages.append(turn)
    return messages


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


def as_context(message: Message) -> Message:
    return {**message, "weight": 0} if message.get("role") == "assistant" else message
