"""Mistral's chat layouts, a row each: how a conversation in normal form becomes segments.

    v1          system text in the first user message; [INST] is itself plain text, as in Llama 2
    v2          control tokens, tools; system text in the last user message
    v3          calls and results of earlier turns are kept, and calls have ids
    v3-tekken   the same over Tekken, which puts no space anywhere: Mistral NeMo

To add a layout, add a row to LAYOUTS, and to `segments` what no row says yet. `mistral-common` is
the reference, which the tests compare id for id. The Jinja sources are for libraries that know no
other way to lay out a chat; the tests hold them to the rows. In them a first loop brings messages
to the normal form of messages.py, and a second one prints it. Jinja can neither read JSON nor
hash: arguments and results that are JSON already are repeated as they stand, and the id of a call
must have its nine letters.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from opennemo.errors import InvalidRequest
from opennemo.tokenizer.calls import ARRAY, ARRAY_WITHOUT_IDS, CallSyntax, to_json
from opennemo.tokenizer.messages import Message, Tool, json_or_text
from opennemo.tokenizer.tokenizer import Tokenizer

Segment = tuple[int | str, bool]
"""A control id or a piece of text, and whether a model is trained to write it."""

CONTROL_TOKENS = {  # of v2 and v3
    "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]",
    "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
}  # fmt: skip


@dataclass(frozen=True)
class ChatLayout:
    """What tells a layout from the others.

    Attributes:
        source: the file of its Jinja source.
        places: what stands in that file for the names marked with %.
        calls: how calls are written; None for models that know neither tools nor control tokens.
        result: what a tool message becomes, as JSON.
        forgets: calls and results are left out once the user speaks again, and there is one
            result in a turn.
    """

    source: str
    places: Mapping[str, str] = field(default_factory=dict)
    calls: CallSyntax | None = None
    result: Callable[[Message], Any] = dict
    forgets: bool = False

    @property
    def template(self) -> str:
        """The layout as a Jinja template."""
        folder = files("opennemo.tokenizer").joinpath("data")
        names = ("turns.jinja", self.source)
        text = "".join(folder.joinpath(name).read_text("utf-8") for name in names)
        for place, source in self.places.items():
            text = text.replace(place, source)
        return text


def _named_result(turn: Message) -> Any:
    return [{"name": turn.get("name"), "content": json_or_text(turn["content"])}]


def _result_with_id(turn: Message) -> Any:
    return {"content": json_or_text(turn["content"]), "call_id": turn["tool_call_id"]}


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
LAYOUTS = {"v1": ChatLayout(source="v1.jinja"), "v2": V2, "v3": V3, "v3-tekken": V3}


def layout_version(
    control: Mapping[str, int], chat_template: str | None, version: str
) -> str | None:
    """`version` if the control tokens are those of Mistral's v3, and no template says otherwise.

    v7 brought [SYSTEM_PROMPT]. A fine-tune may keep the vocabulary and change the layout. Older
    layouts are known by the templates that we write for them.
    """
    for older in ("v1", "v2"):
        if chat_template == LAYOUTS[older].template:
            return older
    is_v3 = control.keys() >= CONTROL_TOKENS and "[SYSTEM_PROMPT]" not in control
    return version if is_v3 and (chat_template is None or "[INST]" in chat_template) else None


def segments(
    layout: ChatLayout, tokenizer: Tokenizer, conversation: list[Message], tools: list[Tool]
) -> Iterator[Segment]:
    """A conversation in normal form as the layout has it; InvalidRequest if it has no place."""
    control = tokenizer.control
    if layout.calls and (missing := sorted(CONTROL_TOKENS - control.keys())):
        raise InvalidRequest(f"messages: this vocabulary has no {missing[0]}, which layouts need")
    system, turns = "", conversation
    if turns[0]["role"] == "system":
        system, turns = turns[0]["content"], turns[1:]
    if not turns or turns[0]["role"] != "user":
        turns = [{"role": "user", "content": ""}, *turns]
    if not layout.calls and (tools or any("tool_calls" in turn for turn in turns)):
        raise InvalidRequest("tools: this model was not trained to use any; leave them out")
    users = [i for i, turn in enumerate(turns) if turn["role"] == "user"]
    system_at = users[-1] if layout.calls else users[0]

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
            if tools and i == users[-1]:
                yield control["[AVAILABLE_TOOLS]"], False
                yield to_json([_definition(tool) for tool in tools]), False
                yield control["[/AVAILABLE_TOOLS]"], False
            yield control["[INST]"], False
            yield text, False
            yield control["[/INST]"], False
        elif role == "assistant":
            trained, n_results = turn.get("weight") != 0, 0
            yield text.rstrip(" ") if layout.calls else text, trained
            if calls and layout.calls:
                for n, piece in enumerate(layout.calls.write(calls, control)):
                    yield control[piece] if n % 2 else piece, trained
            if not turn.get("prefix"):
                yield tokenizer.eos_id, trained
        else:
            n_results += 1
            if layout.forgets and n_results > 1:
                raise InvalidRequest("messages: this model takes one tool result in a turn")
            yield control["[TOOL_RESULTS]"], False
            yield to_json(layout.result(turn)), False
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
