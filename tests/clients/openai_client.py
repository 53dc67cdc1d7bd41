# type: ignore  (runs where other versions of its packages are installed)
"""OpenAI's Python client: python openai_client.py URL KEY MODEL."""

import json
import sys

import openai
import pydantic

url, key, model = sys.argv[1:]
client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
hello = [{"role": "user", "content": "Hello"}]
schema = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["n"],
    "additionalProperties": False,
}
tools = [{"type": "function", "function": {"name": "add", "parameters": schema, "strict": True}}]
ask = client.chat.completions.create


class Number(pydantic.BaseModel):
    n: int = pydantic.Field(ge=0, le=9)


whole = ask(model=model, messages=hello, max_tokens=8, seed=1)
stream = ask(model=model, messages=hello, max_tokens=8, seed=1, stream=True)
text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
assert text == whole.choices[0].message.content and whole.usage.total_tokens > 8

# A tool loop, streamed: the call is accumulated by the client itself.
settings = {"model": model, "tools": tools, "parallel_tool_calls": False, "max_tokens": 500}
with client.chat.completions.stream(messages=hello, tool_choice="required", **settings) as stream:
    message = stream.get_final_completion().choices[0].message
(call,) = message.tool_calls
assert 0 <= json.loads(call.function.arguments)["n"] <= 9
result = {"role": "tool", "tool_call_id": call.id, "content": "4"}
dialogue = [*hello, message, result]
assert ask(model=model, messages=dialogue, tools=tools, tool_choice="none", max_tokens=4).choices

parsed = client.chat.completions.parse(
    model=model, messages=hello, response_format=Number, max_tokens=200
)
assert 0 <= parsed.choices[0].message.parsed.n <= 9
tool = {"type": "function", "name": "add", "parameters": schema, "strict": True}
with client.responses.stream(
    model=model, input="Hello", tools=[tool], tool_choice="required", parallel_tool_calls=False,
    max_output_tokens=500,
) as stream:  # fmt: skip
    (item,) = stream.get_final_response().output
assert item.parsed_arguments["n"] <= 9
output = {"type": "function_call_output", "call_id": item.call_id, "output": "4"}
again = client.responses.parse(
    model=model, input=[*hello, item, output], text_format=Number, max_output_tokens=200
)
assert 0 <= again.output_parsed.n <= 9

assert model in [card.id for card in client.models.list()]
try:
    ask(model="gpt-4", messages=hello)
except openai.NotFoundError:
    print("ok: text, streamed calls, tool loop and parse, in Chat Completions and Responses")
