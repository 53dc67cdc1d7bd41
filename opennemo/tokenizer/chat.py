"""Conversations to ids, and generated ids back to a message.

A conversation in its normal form (messages.py) is laid out as segments, each a control id or a
piece of text, trained or not, and encoded segment by segment. Three things follow: a training
example and a served prompt come from the same code, the loss mask costs nothing, and a user who
types `[/INST]` has typed seven characters of text.

The layout is one of Mistral's, which `Tokenizer.instruct_version` names and chat_layouts.py lists,
or the Jinja template that came with the model (template.py).

This file does not know what a model can do, how long its context is, or how ids are sampled.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from opennemo.errors import InvalidRequest
from opennemo.tokenizer.calls import TEMPLATE_SYNTAXES, CallSyntax, read_calls
from opennemo.tokenizer.channels import Channels, Piece
from opennemo.tokenizer.chat_layouts import LAYOUTS, THINKING, ChatLayout, Segment, segments
from opennemo.tokenizer.messages import (
    TOOL_CALL_ID,
    Message,
    NormalForm,
    Tool,
    check_tools,
    hash_id,
    normalize,
)
from opennemo.tokenizer.template import ChatTemplate, takes_blocks
from opennemo.tokenizer.template import turn_end as template_turn_end
from opennemo.tokenizer.tokenizer import Tokenizer

BY_TEMPLATE = NormalForm(thinking=("assistant",))
IN_BLOCKS = NormalForm(thinking=("assistant", "system"))


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> list[int]:
    """Ids (T,) of the prompt that makes a model answer the messages, BOS included.

    Args:
        settings: values for names in `tokenizer.settings`; the others keep their defaults.

    Raises:
        InvalidRequest: what is wrong, where (`messages[3].content`), and what is allowed.
    """
    layout = LAYOUTS.get(tokenizer.instruct_version or "")
    conversation = normalize(messages, layout.form if layout else _form_of(tokenizer))
    tools, settings = check_tools(tools), _check_settings(tokenizer, layout, settings or {})
    last = conversation[-1]
    if last["role"] == "assistant" and not last.get("prefix"):
        raise InvalidRequest(
            "messages: the assistant has the last word, so there is nothing to answer; end with a "
            "user or tool message, or set `prefix: true` to have the assistant's continued"
        )
    if layout:
        return _encode(tokenizer, segments(layout, tokenizer, conversation, tools, settings))[0]
    return _encode(tokenizer, ChatTemplate(tokenizer, conversation, tools, settings).prompt())[0]


def encode_for_training(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Tool] | None = None
) -> tuple[list[int], list[bool]]:
    """Ids (T,) of the whole conversation, and a mask (T,): True on ids that a model should write.

    Those are the assistant's turns and the EOS of each, except turns of `weight: 0`. In Mistral's
    layouts calls that end the conversation have no id, as in mistral-finetune, since a model cannot
    learn to guess it.

    Raises:
        InvalidRequest: what is wrong, where, and what is allowed.
    """
    layout = LAYOUTS.get(tokenizer.instruct_version or "")
    conversation = normalize(messages, layout.form if layout else _form_of(tokenizer))
    tools, settings = check_tools(tools), _check_settings(tokenizer, layout, {})
    if layout:
        for call in conversation[-1].get("tool_calls", ()):
            del call["id"]
        return _encode(tokenizer, segments(layout, tokenizer, conversation, tools, settings))
    return _encode(tokenizer, ChatTemplate(tokenizer, conversation, tools, settings).lesson())


def _form_of(tokenizer: Tokenizer) -> NormalForm:
    """The normal form of conversations that the model's own template lays out."""
    return IN_BLOCKS if takes_blocks(tokenizer.chat_template or "") else BY_TEMPLATE


@lru_cache(maxsize=8)
def turn_end(tokenizer: Tokenizer) -> int | str | None:
    """What ends an answer: an id, or a text where the template writes a mark that is not a token.

    None if the template writes neither; then only EOS ends an answer.
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


def thinking_marks(tokenizer: Tokenizer) -> tuple[str, str] | None:
    """The marks around the thinking of the model behind a tokenizer; None if it does not think.

    A layout says so, or a template that writes both marks.
    """
    layout, template = LAYOUTS.get(tokenizer.instruct_version or ""), tokenizer.chat_template or ""
    if layout:
        thinks = layout.form.thinking and {*THINKING} <= tokenizer.control.keys()
        return THINKING if thinks else None
    for marks in (THINKING, ("<think>", "</think>")):
        if all(mark in template for mark in marks):
            return marks
    return None


def is_thinking(tokenizer: Tokenizer, ids: Sequence[int]) -> bool:
    """Whether a prompt ends within thinking, which the answer then continues."""
    opening, closing = thinking_marks(tokenizer) or ("", "")
    if not opening:
        return False
    text = tokenizer.decode(ids[-64:], show_control=True)
    control = tokenizer.control
    if opening in control and closing in control:
        last = next((id for id in reversed(ids) if id in (control[opening], control[closing])), -1)
        return last == control[opening]
    return text.rstrip().endswith(opening)


def parse_reply(
    tokenizer: Tokenizer, ids: Iterable[int], *, request_id: str = "", begun: bool = False
) -> Message:
    """The message that generated ids stand for: role, content, and tool_calls if there are any.

    Where the vocabulary has a control token that announces calls, only that id does; elsewhere
    the text does. Calls that are not well-formed stay content: this never fails, and takes time
    linear in the ids. Calls without a usable id get one hashed from the call and `request_id`,
    which distinguishes the same call made twice in a conversation. Thinking becomes
    `reasoning_content`; with `begun` the prompt has opened it.
    """
    ids, syntax = list(ids), call_syntax(tokenizer)
    is_control = syntax.marks[0] in tokenizer.control
    marks = thinking_marks(tokenizer)
    channels = Channels(tokenizer, syntax if is_control else None, marks, begun=begun)
    pieces = [piece for id in ids for piece in channels.push(id)] + channels.flush()
    thinking = "".join(text for channel, text in pieces if channel == "thinking")
    spoken = [piece for piece in pieces if piece[0] != "thinking"]
    (content, *_), *announced = _split_at_calls(syntax, spoken, is_control=is_control)
    calls: list[dict] = []
    try:
        for words in announced:
            more, rest = read_calls(syntax, *words)
            calls, content = calls + more, content + rest
    except (ValueError, RecursionError):
        calls = []
    message: Message = {"role": "assistant", "content": content.strip() or None}
    if not calls:
        words = "".join(text for channel, text in spoken if channel != "mark")
        message["content"] = words if thinking else tokenizer.decode(ids)
    if thinking:
        message["reasoning_content"] = thinking
    used = set()
    for i, call in enumerate(calls):
        if call["id"] in used or not TOOL_CALL_ID.fullmatch(call["id"]):
            call["id"] = hash_id(f"{request_id}/{i}/{call['function']}")
        used.add(call["id"])
    return message | ({"tool_calls": calls} if calls else {})


def _split_at_calls(
    syntax: CallSyntax, pieces: Sequence[Piece], *, is_control: bool
) -> list[list[str]]:
    """The text before all calls, then what each announcement of calls begins.

    Each is text, control token, text, ..., text.
    """
    announcement, runs = syntax.marks[0], [[""]]
    if not is_control:
        return [[text] for text in "".join(text for _, text in pieces).split(announcement)]
    for channel, text in pieces:
        if channel == "mark" and text == announcement:
            runs.append([""])
        elif channel == "mark":
            runs[-1] += [text, ""]
        else:
            runs[-1][-1] += text
    return runs


def _check_settings(
    tokenizer: Tokenizer, layout: ChatLayout | None, asked: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings of a prompt, defaults included; InvalidRequest for what is not allowed."""
    has_settings = layout is None or layout.has_settings
    choices = tokenizer.settings if has_settings else {}
    settings = tokenizer.defaults if has_settings else {}
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
