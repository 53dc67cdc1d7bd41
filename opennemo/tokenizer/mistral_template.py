"""Mistral's chat layouts v1 to v3 as Jinja, for libraries that know no other way to lay out a chat.

The layouts are chat.py's, and the tests hold the templates to them and to `mistral-common`. One
idea makes them small: a first loop brings the messages to the normal form of messages.py, and a
second one prints it. Jinja can neither read JSON nor hash: arguments and results that are JSON text
already are repeated as they stand, and the id of a call must have its nine letters.
"""

from collections.abc import Mapping

CONTROL_TOKENS = {  # of v2 and v3
"[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]",
    "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
}  # fmt: skip

TURNS = """\
{%- set ns = namespace(system='', turns=[], last='', user=0) %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set text = message.content %}
    {%- else %}
        {%- set text = (message.content or []) | map(attribute='text') | select | join('\\n\\n') %}
    {%- endif %}
    {%- set role = 'system' if message.role == 'developer' else message.role %}
    {%- set calls = message.tool_calls or [] if role == 'assistant' else [] %}
    {%- if role == 'system' %}
        {%- set ns.system = [ns.system, text] | select | join('\\n\\n') %}
    {%- elif role == ns.last and (role == 'user'
            or role == 'assistant' and not (text and ns.turns[-1].calls)) %}
        {%- set both = [ns.turns[-1].text, text] | select | join('\\n\\n') %}
        {%- set turn = {'role': role, 'text': both, 'calls': ns.turns[-1].calls + calls} %}
        {%- set ns.turns = ns.turns[:-1] + [turn] %}
    {%- else %}
        {%- set turn = {'role': role, 'text': text, 'calls': calls,
            'id': message.tool_call_id, 'name': message.name or none} %}
        {%- set ns.turns = ns.turns + [turn] %}
    {%- endif %}
    {%- set ns.last = role %}
{%- endfor %}
{%- if not ns.turns or ns.turns[0].role != 'user' %}
    {%- set ns.turns = [{'role': 'user', 'text': '', 'calls': []}] + ns.turns %}
{%- endif %}
{%- set system = ns.system + '\\n\\n' if ns.system else '' %}
"""
V1 = """\
{{- bos_token }}
{%- for turn in ns.turns %}
    {%- if turn.role == 'user' %}
        {{- ' ' if not loop.first and loop.previtem.role == 'user' }}
        {{- '[INST] ' + (system if loop.first else '') + turn.text + ' [/INST]' }}
    {%- elif tools or turn.calls or turn.role == 'tool' %}
        {{- raise_exception('this model was not trained to use tools') }}
    {%- else %}
        {{- (' ' + turn.text if turn.text else '') + eos_token }}
    {%- endif %}
{%- endfor %}
"""
V2_AND_V3 = """\
{%- macro json_or_text(text) -%}
    {%- if text is not string -%}
        {{- text | tojson -}}
    {%- elif not text -%}
        {{- '{}' -}}
    {%- elif text[0] in '{[' or text in ['true', 'false', 'null'] or text | int | string == text
            or text | float | string == text and text[-1] in '0123456789' -%}
        {{- text -}}
    {%- else -%}
        {{- text | tojson -}}
    {%- endif -%}
{%- endmacro %}
{%- macro nine(id) -%}
    {%- if id is not string or id | length != 9 -%}
        {{- raise_exception('the id of a tool call must be nine letters or digits') -}}
    {%- endif -%}
    {{- id | tojson -}}
{%- endmacro %}
{%- for turn in ns.turns %}
    {%- if turn.role == 'user' %}
        {%- set ns.user = loop.index0 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for turn in ns.turns %}
    {%- set forgotten = %forgets and loop.index0 < ns.user %}
    {%- set calls = [] if forgotten else turn.calls %}
    {%- if turn.role == 'user' %}
        {%- if tools and loop.index0 == ns.user %}
            {{- '[AVAILABLE_TOOLS][' }}
            {%- for tool in tools %}
                {{- '{"type": "function", "function": {"name": ' + tool.function.name | tojson }}
                {{- ', "description": ' + (tool.function.description or '') | tojson }}
                {{- ', "parameters": ' + (tool.function.parameters or {}) | tojson + '}}' }}
                {{- ', ' if not loop.last }}
            {%- endfor %}
            {{- '][/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST]' + (system if loop.index0 == ns.user else '') + turn.text + '[/INST]' }}
    {%- elif forgotten and (turn.role == 'tool' or turn.calls and not turn.text.strip()) %}
    {%- elif turn.role == 'assistant' %}
        {{- (turn.text if turn.text.strip() or not turn.calls else '').rstrip(' ') }}
        {%- if calls %}
            {{- '[TOOL_CALLS][' }}
            {%- for call in calls %}
                {{- '{"name": ' + call.function.name | tojson + ', "arguments": ' }}
                {{- json_or_text(call.function.arguments or '') + %call_id + '}' }}
                {{- ', ' if not loop.last }}
            {%- endfor %}
            {{- ']' }}
        {%- endif %}
        {{- eos_token }}
    {%- else %}
        {{- '[TOOL_RESULTS]' + %result + %end_of_result + '[/TOOL_RESULTS]' }}
    {%- endif %}
{%- endfor %}
"""
# What stands in V2_AND_V3 for the places marked with %.
V2 = {
    "%forgets": "true",
    "%result": """'[{"name": ' + turn.name | tojson + ', "content": ' + json_or_text(turn.text)""",
    "%end_of_result": "'}]'",
    "%call_id": "''",
}
V3 = {
    "%forgets": "false",
    "%result": """'{"content": ' + json_or_text(turn.text) + ', "call_id": ' + nine(turn.id)""",
    "%end_of_result": "'}'",
    "%call_id": """', "id": ' + nine(call.id)""",
}


def mistral_template(version: str) -> str | None:
    """The Jinja source of one of Mistral's layouts, None for one that is not known."""
    if version == "v1":
        return TURNS + V1
    differences = {"v2": V2, "v3": V3, "v3-tekken": V3}.get(version)
    if differences is None:
        return None
    template = TURNS + V2_AND_V3
    for name, source in differences.items():
        template = template.replace(name, source)
    return template


def mistral_version(
    control: Mapping[str, int], chat_template: str | None, version: str
) -> str | None:
    """`version` if the control tokens are those of Mistral's v3, and no template says otherwise.

    v7 brought [SYSTEM_PROMPT]. A fine-tune may keep the vocabulary and change the layout. Older
    layouts are known by the templates that we write for them.
    """
    for older in ("v1", "v2"):
        if chat_template == mistral_template(older):
            return older
    is_v3 = control.keys() >= CONTROL_TOKENS and "[SYSTEM_PROMPT]" not in control
    return version if is_v3 and (chat_template is None or "[INST]" in chat_template) else None
