# type: ignore  (runs where other versions of its packages are installed)
"""Mistral's Python client, 1.x or later: python mistral_client.py URL KEY MODEL."""

import json
import sys

try:
    from mistralai.client import Mistral
except ImportError:  # 1.x
    from mistralai import Mistral

url, key, model = sys.argv[1:]
client = Mistral(server_url=url, api_key=key)
hello = [{"role": "user", "content": "Hello"}]
schema = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["n"],
    "additionalProperties": False,
}
tools = [{"type": "function", "function": {"name": "add", "parameters": schema}}]
settings = {"model": model, "messages": hello, "max_tokens": 8, "random_seed": 1}

whole = client.chat.complete(**settings)
chunks = [event.data for event in client.chat.stream(**settings)]
text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
assert text == whole.choices[0].message.content
assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens

called = client.chat.complete(
    model=model, messages=hello, tools=tools, tool_choice="any", max_tokens=2000
)
message = called.choices[0].message
streamed = client.chat.stream(
    model=model, messages=hello, tools=tools, tool_choice="any", max_tokens=2000
)
deltas = [event.data.choices[0].delta for event in streamed]
for call in [call for delta in deltas for call in delta.tool_calls or []]:
    assert call.function.name == "add" and 0 <= json.loads(call.function.arguments)["n"] <= 9
assert called.choices[0].finish_reason == "tool_calls"
assert 0 <= json.loads(message.tool_calls[0].function.arguments)["n"] <= 9
results = [
    {"role": "tool", "name": "add", "content": "4", "tool_call_id": call.id}
    for call in message.tool_calls
]
again = client.chat.complete(model=model, messages=[*hello, message, *results], max_tokens=4)
assert again.choices[0].message.content

format = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
answer = client.chat.complete(model=model, messages=hello, response_format=format, max_tokens=200)
assert 0 <= json.loads(answer.choices[0].message.content)["n"] <= 9
assert model in [card.id for card in client.models.list().data]
try:
    client.chat.complete(model="codestral", messages=hello)
except Exception as error:  # noqa: BLE001  its class changed from version to version
    assert "404" in str(error) or getattr(error, "status_code", 0) == 404
    print("ok")
