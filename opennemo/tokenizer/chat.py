"""Conversations to ids, and generated ids back to a message.

A conversation in its normal form (messages.py) is laid out as segments, each a control id or a
piece of text, trained or not, and encoded segment by segment. That one idea gives three things:
a training example and a served prompt come out of the same lines, the loss mask costs nothing,
and a user who types `[/INST]` has typed seven characters of text.

The layout is one of Mistral's, which `Tokenizer.instruct_version` names and chat_layouts.py lists,
or the Jinja template that came with the model (template.py).

Not known here: what a model can do, how long its context is, how ids are sampled.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from opennemo.errors import InvalidRequest
from opennemo.tokenizer.calls import TEMPLATE_SYNTAXES, CallSyntax, read_calls
from opennemo.tokenizer.chat_layouts import LAYOUTS, ChatLayout, Segment, segments
from opennemo.tokenizer.messages import (
    PLAIN,
    TOOL_CALL_ID,
    Message,
    Tool,
    check_tools,
    hash_id,
    normalize,
)
from opennemo.tokenizer.template import ChatTemplate
from opennemo.tokenizer.template import turn_end as template_turn_end
from opennemo.tokenizer.tokenizer import Tokenizer


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> list[int]:
    """Ids (T,) of the prompt that makes a model answer the messages, BOS included.

    Args:
        settings: of those that `tokenizer.settings` has; the others are at their defaults.

    Raises:
        InvalidRequest: what is wrong, where (`messages[3].content`), and what is allowed.
    """
    layout = LAYOUTS.get(tokenizer.instruct_version or "")
    conversation = normalize(messages, layout.form if layout else PLAIN)
    tools, settings = check_tools(tools), _check_settings(tokenizer, layout, settings or {})
    last = conversation[-1]
    if last["role"] == "assistant" and not last.get("prefix"):
        raise InvalidRequest(
            "messages: the assistant has the last word, so there is nothing to answer; end with a "
            "user or tool message, or set `prefix: true` to have the assistant's continued"
        )
    if layout:
        return _encode(tokenizer, segments(layout, tokenizer, conversation, tools, settings))[0]
    return _encode(tokenizer, ChatTemplate(tokenizer, conversation, tools).prompt())[0]


def encode_for_training(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Tool] | None = None
) -> tuple[list[int], list[bool]]:
    """Ids (T,) of the whole conversation, and a mask (T,): True on ids that a model should write.

    Those are the assistant's turns and the EOS of each, but for turns of `weight: 0`. In Mistral's
    layouts calls that end the conversation have no id, as in mistral-finetune, for a model cannot
    learn to guess it.

    Raises:
        InvalidRequest: what is wrong, where, and what is allowed.
    """
    layout = LAYOUTS.get(tokenizer.instruct_version or "")
    conversation = normalize(messages, layout.form if layout else PLAIN)
    tools, settings = check_tools(tools), _check_settings(tokenizer, layout, {})
    if layout:
        for call in conversation[-1].get("tool_calls", ()):
            del call["id"]
        return _encode(tokenizer, segments(layout, tokenizer, conversation, tools, settings))
    return _encode(tokenizer, ChatTemplate(tokenizer, conversation, tools).lesson())


@lru_cache(maxsize=8)
def turn_end(tokenizer: Tokenizer) -> int | str | None:
    """What ends an answer: an id, or a text where the template writes a mark that is no token.

    None if the template writes nothing of the kind; then EOS alone ends an answer.
    """
    if tokenizer.instruct_version in LAYOUTS:
        return tokenizer.eos_id
    return template_turn_end(tokenizer)


def call_syntax(tokenizer: Tokenizer) -> CallSyntax:
    """How the model behind a tokenizer writes tool calls."""
    layout = LAYOUTS.get(tokenizer.instruct_version or "")
    if layout and layout.calls:
        return layout.calls
    # A fine-tune may keep Mistral's tokens for calls while its template spells calls in tags.
    template = tokenizer.chat_template
    for syntax in TEMPLATE_SYNTAXES:
        marks = [mark for mark in syntax.marks if mark in tokenizer.control]
        if len(marks) == len(syntax.marks) and all(m in (template or m) for m in marks):
            return syntax
    return TEMPLATE_SYNTAXES[-1]


def parse_reply(tokenizer: Tokenizer, ids: Iterable[int], *, request_id: str = "") -> Message:
    """The message that generated ids stand for: role, content, and tool_calls if there are any.

    Where the vocabulary has a control token that announces calls, only that id does; elsewhere
    the text does. Calls that are not well-formed stay content: this never fails, and takes time
    linear in the ids. Calls without a usable id get one hashed from the call and `request_id`,
    which tells apart the same call made twice in a conversation.
    """
    ids, syntax = list(ids), call_syntax(tokenizer)
    content, *announced = _split_at_calls(tokenizer, syntax, ids)
    calls: list[dict] = []
    try:
        for text in announced:
            more, rest = read_calls(syntax, text)
            calls, content = calls + more, content + rest
    except (ValueError, RecursionError):
        calls = []
    if not calls:
        return {"role": "assistant", "content": tokenizer.decode(ids)}
    used = set()
    for i, call in enumerate(calls):
        if call["id"] in used or not TOOL_CALL_ID.fullmatch(call["id"]):
            call["id"] = hash_id(f"{request_id}/{i}/{call['function']}")
        used.add(call["id"])
    return {"role": "assistant", "content": content.strip() or None, "tool_calls": calls}


def _split_at_calls(tokenizer: Tokenizer, syntax: CallSyntax, ids: list[int]) -> list[str]:
    """The text before all calls, then the texts that each announcement of calls begins."""
    announcement = tokenizer.control.get(syntax.marks[0])
    if announcement is None:
        return tokenizer.decode(ids).split(syntax.marks[0])
    runs: list[list[int]] = [[]]
    for id in ids:
        if id == announcement:
            runs.append([])
        else:
            runs[-1].append(id)
    return [tokenizer.decode(run) for run in runs]


def _check_settings(
    tokenizer: Tokenizer, layout: ChatLayout | None, asked: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings of a prompt, defaults included; InvalidRequest for what is not allowed."""
    choices = tokenizer.settings if layout and layout.has_settings else {}
    settings = {key: choice["default"] for key, choice in choices.items() if choice.get("default")}
    for key, value in asked.items():
        if value is None:
            continue
        if key not in choices:
            raise InvalidRequest(f"{key}: {value!r} was given, but this model has no such setting")
        allowed = choices[key].get("values")
        if allowed is not None and value not in allowed:
            raise InvalidRequest(f"{key}: {value!r} is not one of {', '.join(allowed)}")
        settings[key] = value
    return settings


def _encode(tokenizer: Tokenizer, pieces: Iterable[Segment]) -> tuple[list[int], list[bool]]:
    ids: list[int] = []
    mask: list[bool] = []
    for value, trained in pieces:
        ids += [value] if isinstance(value, int) else tokenizer.encode(value)
        mask += [trained] * (len(ids) - len(mask))
    return ids, mask
