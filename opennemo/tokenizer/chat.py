"""Conversations to ids, and generated ids back to a message.

A conversation in its normal form (messages.py) is laid out as segments, each a control id or a
piece of text, trained or not, and encoded segment by segment. That one idea gives three things:
a training example and a served prompt come out of the same lines, the loss mask costs nothing,
and a user who types `[/INST]` has typed seven characters of text.

The layout is one of Mistral's, told by `Tokenizer.instruct_version` and equal to `mistral-common`
id for id, or the Jinja template that came with the model (template.py):

    v1          system text in the first user message; [INST] is itself plain text, as in Llama 2
    v2          control tokens, tools; system text in the last user message
    v3          calls and results of earlier turns are kept, and calls have ids
    v3-tekken   the same over Tekken, which puts no space anywhere: Mistral NeMo

It is not known here what a model can do, how long its context is, or how ids are sampled.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from opennemo.errors import InvalidRequest
from opennemo.tokenizer.messages import (
    TOOL_CALL_ID,
    Message,
    Tool,
    check_tools,
    hash_id,
    json_or_text,
    normalize,
)
from opennemo.tokenizer.mistral_template import CONTROL_TOKENS
from opennemo.tokenizer.template import ChatTemplate, Segment
from opennemo.tokenizer.tokenizer import Tokenizer

MISTRAL_LAYOUTS = ("v1", "v2", "v3", "v3-tekken")


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Tool] | None = None
) -> list[int]:
    """Ids (T,) of the prompt that makes a model answer the messages, BOS included.

    Raises:
        InvalidRequest: what is wrong, where (`messages[3].content`), and what is allowed.
    """
    conversation, tools = normalize(messages), check_tools(tools)
    last = conversation[-1]
    if last["role"] == "assistant" and not last.get("prefix"):
        raise InvalidRequest(
            "messages: the assistant has the last word, so there is nothing to answer; end with a "
            "user or tool message, or set `prefix: true` to have the assistant's continued"
        )
    if tokenizer.instruct_version in MISTRAL_LAYOUTS:
        segments = _mistral_layout(tokenizer, conversation, tools)
    else:
        segments = ChatTemplate(tokenizer, conversation, tools).prompt()
    return _encode(tokenizer, segments)[0]


def encode_for_training(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Tool] | None = None
) -> tuple[list[int], list[bool]]:
    """Ids (T,) of the whole conversation, and a mask (T,): True on ids that a model should write.

    Those are the assistant's turns and the EOS of each, but for turns of `weight: 0`. In Mistral's
    layouts calls that end the conversation have no id, as in mistral-finetune: nobody could learn
    to guess it.

    Raises:
        InvalidRequest: what is wrong, where, and what is allowed.
    """
    conversation, tools = normalize(messages), check_tools(tools)
    if tokenizer.instruct_version in MISTRAL_LAYOUTS:
        for call in conversation[-1].get("tool_calls", ()):
            del call["id"]
        segments = _mistral_layout(tokenizer, conversation, tools)
    else:
        segments = ChatTemplate(tokenizer, conversation, tools).lesson()
    return _encode(tokenizer, segments)


def parse_reply(tokenizer: Tokenizer, ids: Iterable[int], *, request_id: str = "") -> Message:
    """The message that generated ids stand for: role, content, and tool_calls if there are any.

    Where the vocabulary has a control token that announces calls, only that id does; elsewhere
    the text `<tool_call>` does. Calls that are not well-formed stay content: this never fails, and
    takes time linear in the ids. Calls without a usable id get one hashed from the call and
    `request_id`, which tells apart the same call made twice in a conversation.
    """
    ids = list(ids)
    content, *announced = _split_at_calls(tokenizer, ids)
    calls: list[dict] = []
    try:
        for text in announced:
            value, rest = _read_json(text)
            calls += map(_read_call, value if isinstance(value, list) else [value])
            rest = rest.removeprefix("</tool_call>")
            content += rest if rest.strip() else ""
    except (ValueError, RecursionError):
        calls = []
    if not calls:
        return {"role": "assistant", "content": tokenizer.decode(ids)}
    taken = set()
    for i, call in enumerate(calls):
        if call["id"] in taken or not TOOL_CALL_ID.fullmatch(call["id"]):
            call["id"] = hash_id(f"{request_id}/{i}/{call['function']}")
        taken.add(call["id"])
    return {"role": "assistant", "content": content.strip() or None, "tool_calls": calls}


def _encode(tokenizer: Tokenizer, segments: Iterable[Segment]) -> tuple[list[int], list[bool]]:
    ids: list[int] = []
    mask: list[bool] = []
    for value, trained in segments:
        ids += [value] if isinstance(value, int) else tokenizer.encode(value)
        mask += [trained] * (len(ids) - len(mask))
    return ids, mask


def _mistral_layout(
    tokenizer: Tokenizer, conversation: list[Message], tools: list[Tool]
) -> Iterator[Segment]:
    version, control = tokenizer.instruct_version, tokenizer.control
    if version != "v1" and (missing := sorted(CONTROL_TOKENS - control.keys())):
        raise InvalidRequest(f"messages: this vocabulary has no {missing[0]}, which layouts need")
    system, turns = "", conversation
    if turns[0]["role"] == "system":
        system, turns = turns[0]["content"], turns[1:]
    if not turns or turns[0]["role"] != "user":
        turns = [{"role": "user", "content": ""}, *turns]
    if version == "v1" and (tools or any("tool_calls" in turn for turn in turns)):
        raise InvalidRequest("tools: this model was not trained to use any; leave them out")
    users = [i for i, turn in enumerate(turns) if turn["role"] == "user"]
    system_at = users[0] if version == "v1" else users[-1]

    yield tokenizer.bos_id, False
    n_results = 0
    for i, turn in enumerate(turns):
        role, text, calls = turn["role"], turn["content"], turn.get("tool_calls")
        if version == "v2" and i < users[-1]:  # it forgets calls once the user speaks again
            if role == "tool" or (calls and not text):
                continue
            calls = None
        if role == "user":
            if system and i == system_at:
                text = f"{system}\n\n{text}"
            if version == "v1":
                yield f"[INST] {text} [/INST]", False
                continue
            if tools and i == users[-1]:
                yield control["[AVAILABLE_TOOLS]"], False
                yield _json([_definition(tool) for tool in tools]), False
                yield control["[/AVAILABLE_TOOLS]"], False
            yield control["[INST]"], False
            yield text, False
            yield control["[/INST]"], False
        elif role == "assistant":
            trained, n_results = turn.get("weight") != 0, 0
            yield text if version == "v1" else text.rstrip(" "), trained
            if calls:
                yield control["[TOOL_CALLS]"], trained
                yield _json([_call(version, call) for call in calls]), trained
            if not turn.get("prefix"):
                yield tokenizer.eos_id, trained
        else:
            n_results += 1
            if version == "v2" and n_results > 1:
                raise InvalidRequest("messages: this model takes one tool result in a turn")
            yield control["[TOOL_RESULTS]"], False
            yield _json(_result(version, turn)), False
            yield control["[/TOOL_RESULTS]"], False


def _definition(tool: Tool) -> dict:
    function = tool["function"]
    return {
        "type": "function",
        "function": {
            "name": function["name"],
            "description": function.get("description") or "",
            "parameters": function.get("parameters") or {},
        },
    }


def _call(version: str | None, call: dict) -> dict:
    id = {"id": call["id"]} if version != "v2" and "id" in call else {}
    return {**call["function"], **id}


def _result(version: str | None, turn: Message) -> Any:
    content = json_or_text(turn["content"])
    if version == "v2":
        return [{"name": turn.get("name"), "content": content}]
    return {"content": content, "call_id": turn["tool_call_id"]}


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"tools or arguments: cannot be written as JSON: {error}") from None


def _split_at_calls(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The text before all calls, then the texts that each announcement of calls begins."""
    marker, names = tokenizer.control.get("[TOOL_CALLS]"), tokenizer.control_names
    if marker is None:
        tags = {tokenizer.control.get("<tool_call>"), tokenizer.control.get("</tool_call>")}
        shown = [id for id in ids if id in tags or id not in names]
        return tokenizer.decode(shown, show_control=True).split("<tool_call>")
    runs: list[list[int]] = [[]]
    for id in ids:
        if id == marker:
            runs.append([])
        else:
            runs[-1].append(id)
    return [tokenizer.decode(run) for run in runs]


def _read_json(text: str) -> tuple[Any, str]:
    """The JSON value that a text begins with, and what follows it."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    text = text.lstrip()
    value, end = json.JSONDecoder(parse_constant=refuse).raw_decode(text)
    return value, text[end:].lstrip()


def _read_call(value: Any) -> dict:
    """One call that a model wrote, in OpenAI's shape; ValueError if it is none."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError("a call is an object with a name")
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif not isinstance(arguments, str) or not isinstance(_read_json(arguments)[0], dict):
        raise ValueError("arguments are an object, or a string that holds one")
    (value["name"] + arguments).encode()  # half a surrogate pair could not be sent to anyone
    id = value.get("id")
    return {
        "id": id if isinstance(id, str) else "",
        "type": "function",
        "function": {"name": value["name"], "arguments": arguments},
    }
