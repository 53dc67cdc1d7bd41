# type: ignore  (runs where other versions of its packages are installed)
"""Mistral's Python client, 1.x and 3.x: python mistral_client.py URL KEY MODEL."""

import json
import sys

import pydantic

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


class Number(pydantic.BaseModel):
    n: int  # 1.12 cannot make a schema of bounds


whole = client.chat.complete(**settings)
chunks = [event.data for event in client.chat.stream(**settings)]
text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
assert text == whole.choices[0].message.content
assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens

# A tool loop, with calls whole and streamed; "required" and "auto" say nothing of the client.
calling = {"model": model, "messages": hello, "tools": tools, "max_tokens": 2000}
for choice in ("any", "required"):
    message = client.chat.complete(**calling, tool_choice=choice).choices[0].message
    streamed = [
        event.data.choices[0] for event in client.chat.stream(**calling, tool_choice=choice)
    ]
    calls = [call for one in streamed for call in one.delta.tool_calls or []]
    assert streamed[-1].finish_reason == "tool_calls" and calls
    for call in [*calls, *message.tool_calls]:
        assert call.function.name == "add" and 0 <= json.loads(call.function.arguments)["n"] <= 9
    said = {"role": "assistant", "content": "", "tool_calls": calls}
    for asked in (message, said):
        made = calls if asked is said else message.tool_calls
        results = [
            {"role": "tool", "name": "add", "content": "4", "tool_call_id": call.id}
            for call in made
        ]
        again = client.chat.complete(model=model, messages=[*hello, asked, *results], max_tokens=4)
        assert again.choices[0].message.content

parsed = client.chat.parse(Number, model=model, messages=hello, max_tokens=200)
assert isinstance(parsed.choices[0].message.parsed.n, int)
with client.chat.parse_stream(Number, model=model, messages=hello, max_tokens=200) as stream:
    text = "".join(event.data.choices[0].delta.content or "" for event in stream)
assert isinstance(Number.model_validate_json(text).n, int)
assert model in [card.id for card in client.models.list().data]
try:
    client.chat.complete(model="codestral", messages=hello)
except Exception as error:  # noqa: BLE001  its class changed from version to version
    assert "404" in str(error) or getattr(error, "status_code", 0) == 404
    print("ok: text, streamed calls, tool loop, parse and parse_stream")
