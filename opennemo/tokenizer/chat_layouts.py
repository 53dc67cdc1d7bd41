"""Mistral's chat layouts, a row each: how a conversation in normal form becomes segments.

    v1          system text in the first user message; [INST] is itself plain text, as in Llama 2
    v2          control tokens, tools; system text in the last user message
    v3          calls and results of earlier turns are kept, and calls have ids
    v3-tekken   the same over Tekken, which puts no space anywhere: Mistral NeMo
    v7          system messages are turns, which stay where they are: Mistral Small 3
    v11         calls are a name and JSON behind control tokens, no array: Small 3.2
    v13         tools before the first user message, no ids, thinking: Magistral, Ministral 3
    v15         settings before the first user message: Small 4

To add a layout, add a row to LAYOUTS, and to `segments` what no row expresses yet. `mistral-common`
is the reference, which the tests compare id for id. The Jinja sources are for libraries that have
no other way to lay out a chat; the tests compare them with the rows. In them a first loop brings
messages to the normal form of messages.py, and a second one prints it. Jinja can neither read JSON
nor hash: arguments and results that are JSON already are repeated as they stand, and the id of a
call must have its nine letters.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from typing import Any

from opennemo.errors import InvalidRequest
from opennemo.tokenizer.calls import (
    ARRAY,
    ARRAY_WITHOUT_IDS,
    NAMED,
    NAMED_WITH_IDS,
    CallSyntax,
    to_json,
)
from opennemo.tokenizer.messages import PLAIN, Message, NormalForm, Part, Tool, json_or_text
from opennemo.tokenizer.tokenizer import Tokenizer

Segment = tuple[int | str, bool]
"""A control id or a piece of text, and whether a model is trained to write it."""

THINKING = ("[THINK]", "[/THINK]")
CONTROL_TOKENS = {  # of v2 and v3
    "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]",
    "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
}  # fmt: skip


def _named_result(turn: Message) -> Sequence[str]:
    return [to_json([{"name": turn.get("name"), "content": json_or_text(turn["content"])}])]


def _result_with_id(turn: Message) -> Sequence[str]:
    content = json_or_text(turn["content"])
    return [to_json({"content": content, "call_id": turn["tool_call_id"]})]


def _result_behind_id(turn: Message) -> Sequence[str]:
    return [turn["tool_call_id"], "[TOOL_CONTENT]", turn["content"]]


def _plain_result(turn: Message) -> Sequence[str]:
    return [turn["content"]]


@dataclass(frozen=True)
class ChatLayout:
    """What distinguishes a layout from the others.

    Attributes:
        source: the file of its Jinja source.
        places: the text that replaces the names marked with % in that file.
        calls: how calls are written; None for models that know neither tools nor control tokens.
        result: what a tool message becomes: text, control token, text, ..., text.
        form: the normal form of messages that it starts from.
        forgets: calls and results are left out once the user speaks again, and there is one
            result in a turn.
        tools_first: tools come before the first user message, not the last.
        has_settings: settings of the model come after the tools.
    """

    source: str
    places: Mapping[str, str] = field(default_factory=dict)
    calls: CallSyntax | None = None
    result: Callable[[Message], Sequence[str]] = _plain_result
    form: NormalForm = PLAIN
    forgets: bool = False
    tools_first: bool = False
    has_settings: bool = False

    @property
    def template(self) -> str:
        """The layout as a Jinja template."""
        folder = files("opennemo.tokenizer").joinpath("data")
        text = folder.joinpath(self.source).read_text("utf-8")
        for name in ("turns", "macros"):
            part = folder.joinpath(f"{name}.jinja").read_text("utf-8")
            text = text.replace(f"%{name}\n", part)
        for place, source in self.places.items():
            text = text.replace(place, source)
        return text

    def template_with(self, settings: Mapping[str, Mapping[str, Any]]) -> str:
        """The template with the defaults that a tokenizer has of its settings."""
        defaults = {key: choice.get("default") for key, choice in settings.items()}
        lines = [
            f"{{%- set {key} = {key} | default({to_json(value)}) %}}\n"
            for key, value in defaults.items()
            if value and self.has_settings
        ]
        return "".join(lines) + self.template

    @property
    def control(self) -> set[str]:
        """The control tokens that it requires."""
        names = set(CONTROL_TOKENS) if self.calls else set()
        if self.calls and not self.calls.is_object:
            names |= {*self.calls.marks}
        if self.form.system_stays:
            names |= {"[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"}
        return names | ({"[TOOL_CONTENT]"} if self.result is _result_behind_id else set())


V2 = ChatLayout(
    calls=ARRAY_WITHOUT_IDS,
    result=_named_result,
    forgets=True,
    source="v2-and-v3.jinja",
    places={
        "%forgets": "true",
        "%result": """'[{"name": ' + turn.name | tojson + ', "content": '""",
        "%end_of_result": "'}]'",
        "%call_id": "''",
    },
)
V3 = ChatLayout(
    calls=ARRAY,
    result=_result_with_id,
    source="v2-and-v3.jinja",
    places={
        "%forgets": "false",
        "%result": """'{"content": '""",
        "%end_of_result": """', "call_id": ' + nine(turn.id) + '}'""",
        "%call_id": """', "id": ' + nine(call.id)""",
    },
)
V7 = replace(
    V3,
    result=_result_behind_id,
    form=NormalForm(system_stays=True),
    source="v7-to-v15.jinja",
    places={
        "%thinking": "[]",
        "%joint": "'\\n\\n'",
        "%tools_at": "ns.user",
        "%settings": "",
        "%sorts": "false",
        "%result_id": "nine(result.id)[1:-1] + '[TOOL_CONTENT]'",
        "%is_list": "true",
        "%call": """'{"name": ' + name | tojson + ', "arguments": ' + arguments + ', "id": '
                + nine(call.id) + '}'""",
    },
)
V11 = replace(
    V7,
    calls=NAMED_WITH_IDS,
    form=replace(V7.form, sorts_results=True),
    places={
        **V7.places,
        "%sorts": "true",
        "%is_list": "false",
        "%call": "'[TOOL_CALLS]' + name + '[CALL_ID]' + nine(call.id)[1:-1] + '[ARGS]' + arguments",
    },
)
V13 = replace(
    V11,
    calls=NAMED,
    result=_plain_result,
    form=replace(V11.form, thinking=("system", "assistant")),
    tools_first=True,
    places={
        **V11.places,
        "%thinking": "['system', 'assistant']",
        "%tools_at": "ns.first",
        "%result_id": "''",
        "%call": "'[TOOL_CALLS]' + name + '[ARGS]' + arguments",
    },
)
V15 = replace(
    V13,
    form=replace(V13.form, joint="", thinking=("assistant",)),
    has_settings=True,
    places={
        **V13.places,
        "%thinking": "['assistant']",
        "%joint": "''",
        "%settings": """\
        {%- if (json_schema or reasoning_effort) and loop.index0 == ns.first %}
            {{- '[MODEL_SETTINGS]{' }}
            {{- '"json_schema": ' + json_schema | tojson if json_schema }}
            {{- ', ' if json_schema and reasoning_effort }}
            {{- '"reasoning_effort": ' + reasoning_effort | tojson if reasoning_effort }}
            {{- '}[/MODEL_SETTINGS]' }}
        {%- endif %}
""",
    },
)
LAYOUTS = {
    "v1": ChatLayout(source="v1.jinja"),
    "v2": V2,
    "v3": V3,
    "v3-tekken": V3,
    "v7": V7,
    "v7-tekken": V7,
    "v11-tekken": V11,
    "v13-tekken": V13,
    "v15-tekken": V15,
}


def layout_version(
    control: Mapping[str, int],
    chat_template: str | None,
    version: str,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> str | None:
    """`version` if the control tokens are those of Mistral's v3, and no template says otherwise.

    v7 brought [SYSTEM_PROMPT]. A fine-tune may keep the vocabulary and change the layout. Other
    layouts are known by the templates that we write for them.
    """
    for name, layout in LAYOUTS.items() if chat_template else ():
        alike = name.endswith("-tekken") == version.endswith("-tekken") or name in ("v1", "v2")
        if alike and name != version and chat_template == layout.template_with(settings or {}):
            return name
    is_v3 = control.keys() >= CONTROL_TOKENS and "[SYSTEM_PROMPT]" not in control
    return version if is_v3 and (chat_template is None or "[INST]" in chat_template) else None


def segments(
    layout: ChatLayout,
    tokenizer: Tokenizer,
    conversation: list[Message],
    tools: list[Tool],
    settings: Mapping[str, Any] | None = None,
) -> Iterator[Segment]:
    """A conversation in normal form in the layout; InvalidRequest if it cannot be laid out."""
    control = tokenizer.control
    if missing := sorted(layout.control - control.keys()):
        raise InvalidRequest(f"messages: this vocabulary has no {missing[0]}, which layouts need")
    system, turns = "", conversation
    if not layout.form.system_stays:
        if turns[0]["role"] == "system":
            system, turns = turns[0]["content"], turns[1:]
        if not turns or turns[0]["role"] != "user":
            turns = [{"role": "user", "content": ""}, *turns]
    elif not any(turn["role"] in ("user", "assistant") for turn in turns):
        turns = [*turns, {"role": "user", "content": ""}]
    if not layout.calls and (tools or any("tool_calls" in turn for turn in turns)):
        raise InvalidRequest("tools: this model was not trained to use any; leave them out")
    users = [i for i, turn in enumerate(turns) if turn["role"] == "user"] or [-1]
    system_at = users[-1] if layout.calls else users[0]
    tools_at = users[0] if layout.tools_first else users[-1]

    def write(pieces: Sequence[str], trained: bool = False) -> Iterator[Segment]:
        for n, piece in enumerate(pieces):
            yield control[piece] if n % 2 else piece, trained

    yield tokenizer.bos_id, False
    n_results = 0
    for i, turn in enumerate(turns):
        role, text, calls = turn["role"], turn["content"], turn.get("tool_calls")
        if layout.forgets and i < users[-1]:
            if role == "tool" or (calls and not text):
                continue
            calls = None
        if role == "user":
            if system and i == system_at:
                text = f"{system}\n\n{text}"
            if not layout.calls:
                yield f"[INST] {text} [/INST]", False
                continue
            if tools and i == tools_at:
                definitions = to_json([_definition(tool) for tool in tools])
                yield from write(["", "[AVAILABLE_TOOLS]", definitions, "[/AVAILABLE_TOOLS]"])
            if settings and i == tools_at:
                ordered = to_json({key: settings[key] for key in sorted(settings)})
                yield from write(["", "[MODEL_SETTINGS]", ordered, "[/MODEL_SETTINGS]"])
            yield from write(["", "[INST]", text, "[/INST]"])
        elif role == "system":
            yield from write(["", "[SYSTEM_PROMPT]", *_spoken(turn, control), "[/SYSTEM_PROMPT]"])
        elif role == "assistant":
            trained, n_results = turn.get("weight") != 0, 0
            if "parts" in turn:
                yield from write(_spoken(turn, control), trained)
            else:
                yield text.rstrip(" ") if layout.calls else text, trained
            if calls and layout.calls:
                yield from write(layout.calls.write(calls, control), trained)
            if not turn.get("prefix"):
                yield tokenizer.eos_id, trained
        else:
            n_results += 1
            if layout.forgets and n_results > 1:
                raise InvalidRequest("messages: this model takes one tool result in a turn")
            yield from write(["", "[TOOL_RESULTS]", *layout.result(turn), "[/TOOL_RESULTS]"])


def _spoken(turn: Message, control: Mapping[str, int]) -> list[str]:
    """The words and the thinking of a turn: text, control token, text, ..., text."""
    if "parts" in turn and not {*THINKING} <= control.keys():
        raise InvalidRequest("messages: this model was not trained to think; leave thinking out")
    pieces, (opening, closing) = [""], THINKING
    for part in turn.get("parts", [Part(turn["content"])]):
        if part.thinking:
            pieces += [opening, part.text] + [closing, ""] * part.closed
        else:
            pieces[-1] += part.text
    return pieces


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
