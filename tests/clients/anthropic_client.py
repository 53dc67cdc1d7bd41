# type: ignore  (runs where other versions of its packages are installed)
"""Anthropic's Python client: python anthropic_client.py URL KEY MODEL."""

import sys

import anthropic

url, key, model = sys.argv[1:]
client = anthropic.Anthropic(base_url=url, api_key=key, max_retries=0)
hello = [{"role": "user", "content": "Hello"}]
schema = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["n"],
    "additionalProperties": False,
}
assert client.messages.create(model=model, messages=hello, max_tokens=8).usage.output_tokens
with client.messages.stream(model=model, messages=hello, max_tokens=8) as stream:
    text = "".join(stream.text_stream)
    assert text == stream.get_final_message().content[0].text
called = client.messages.create(
    model=model, messages=hello, max_tokens=2000, tool_choice={"type": "any"},
    tools=[{"name": "add", "input_schema": schema}],
)  # fmt: skip
uses = [block for block in called.content if block.type == "tool_use"]
assert called.stop_reason == "tool_use" and 0 <= uses[0].input["n"] <= 9
results = [{"type": "tool_result", "tool_use_id": use.id, "content": "4"} for use in uses]
dialogue = [*hello, {"role": "assistant", "content": called.content}]
dialogue.append({"role": "user", "content": results})
assert client.messages.create(model=model, messages=dialogue, max_tokens=4).content
assert client.messages.count_tokens(model=model, messages=hello).input_tokens
try:
    client.messages.create(model="claude", messages=hello, max_tokens=4)
except anthropic.NotFoundError:
    print("ok")
