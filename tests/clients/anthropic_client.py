# type: ignore  (runs where other versions of its packages are installed)
"""Anthropic's Python client: python anthropic_client.py URL KEY MODEL."""

import sys

import anthropic
import pydantic

url, key, model = sys.argv[1:]
client = anthropic.Anthropic(base_url=url, api_key=key, max_retries=0)
hello = [{"role": "user", "content": "Hello"}]
schema = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["n"],
    "additionalProperties": False,
}
tools = [{"name": "add", "input_schema": schema}]


class Number(pydantic.BaseModel):
    n: int


assert client.messages.create(model=model, messages=hello, max_tokens=8).usage.output_tokens
with client.messages.stream(model=model, messages=hello, max_tokens=8) as stream:
    text = "".join(stream.text_stream)
    assert text == stream.get_final_message().content[0].text

# A tool loop, streamed.
with client.messages.stream(
    model=model, messages=hello, max_tokens=2000, tool_choice={"type": "any"}, tools=tools
) as stream:
    called = stream.get_final_message()
uses = [block for block in called.content if block.type == "tool_use"]
assert called.stop_reason == "tool_use" and 0 <= uses[0].input["n"] <= 9
results = [{"type": "tool_result", "tool_use_id": use.id, "content": "4"} for use in uses]
dialogue = [*hello, {"role": "assistant", "content": called.content}]
dialogue.append({"role": "user", "content": results})
assert client.messages.create(model=model, messages=dialogue, max_tokens=4).content

# The client's own loop: it calls the function, and asks again.
seen = []


@anthropic.beta_tool
def add(n: int) -> str:
    """Add to a number."""
    seen.append(n)
    return "4"


runner = client.beta.messages.tool_runner(
    model=model, messages=hello, max_tokens=2000, tools=[add], max_iterations=2,
    tool_choice={"type": "any", "disable_parallel_tool_use": True},
)  # fmt: skip
answers = list(runner)
assert len(answers) == 2 and seen

parsed = client.messages.parse(model=model, messages=hello, max_tokens=200, output_format=Number)
assert isinstance(parsed.parsed_output.n, int)
assert client.messages.count_tokens(model=model, messages=hello).input_tokens
assert model in [card.id for card in client.models.list()]
try:
    client.messages.create(model="claude", messages=hello, max_tokens=4)
except anthropic.NotFoundError:
    print("ok: text, streamed calls, tool loop (tool_runner too), messages.parse")
