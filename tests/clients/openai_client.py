# type: ignore  (runs where other versions of its packages are installed)
"""OpenAI's Python client: python openai_client.py URL KEY MODEL."""

import json
import sys

import openai

url, key, model = sys.argv[1:]
client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
hello = [{"role": "user", "content": "Hello"}]
schema = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["n"],
    "additionalProperties": False,
}
tools = [{"type": "function", "function": {"name": "add", "parameters": schema}}]
ask = client.chat.completions.create

whole = ask(model=model, messages=hello, max_tokens=8, seed=1)
stream = ask(model=model, messages=hello, max_tokens=8, seed=1, stream=True)
text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
assert text == whole.choices[0].message.content and whole.usage.total_tokens > 8

required = ask(
    model=model, messages=hello, tools=tools, tool_choice="required", parallel_tool_calls=False,
    max_tokens=500,
)  # fmt: skip
(call,) = required.choices[0].message.tool_calls
assert 0 <= json.loads(call.function.arguments)["n"] <= 9
result = {"role": "tool", "tool_call_id": call.id, "content": "4"}
again = ask(model=model, messages=[*hello, required.choices[0].message, result], max_tokens=4)
assert again.choices[0].message.content

format = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
answer = ask(model=model, messages=hello, response_format=format, max_tokens=200)
assert 0 <= json.loads(answer.choices[0].message.content)["n"] <= 9
assert model in [card.id for card in client.models.list()]
try:
    ask(model="gpt-4", messages=hello)
except openai.NotFoundError:
    print("ok")
