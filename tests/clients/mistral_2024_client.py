# type: ignore  (runs where other versions of its packages are installed)
"""Mistral's Python client of July 2024 (0.4), when NeMo came out: URL KEY MODEL."""

import json
import sys

from mistralai.client import MistralClient
from mistralai.exceptions import MistralAPIException
from mistralai.models.chat_completion import ChatMessage

url, key, model = sys.argv[1:]
client = MistralClient(api_key=key, endpoint=url, max_retries=0)
hello = [ChatMessage(role="user", content="Hello")]
schema = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["n"],
    "additionalProperties": False,
}
tools = [{"type": "function", "function": {"name": "add", "description": "", "parameters": schema}}]

whole = client.chat(model=model, messages=hello, max_tokens=8, random_seed=1, safe_prompt=True)
parts = client.chat_stream(
    model=model, messages=hello, max_tokens=8, random_seed=1, safe_prompt=True
)
text = "".join(part.choices[0].delta.content or "" for part in parts)
assert text == whole.choices[0].message.content
called = client.chat(model=model, messages=hello, tools=tools, tool_choice="any", max_tokens=2000)
message = called.choices[0].message
assert 0 <= json.loads(message.tool_calls[0].function.arguments)["n"] <= 9
results = [
    ChatMessage(role="tool", name="add", content="4", tool_call_id=c.id) for c in message.tool_calls
]
call = ChatMessage(role="assistant", content="", tool_calls=message.tool_calls)
again = client.chat(model=model, messages=[*hello, call, *results], max_tokens=4)
assert again.choices[0].message.content
answer = client.chat(
    model=model, messages=hello, response_format={"type": "json_object"}, max_tokens=2000
)
assert answer.choices[0].message.content.startswith("{")
assert model in [card.id for card in client.list_models().data]
try:
    client.chat(model="codestral", messages=hello)
except MistralAPIException as error:
    assert error.http_status == 404
    print("ok: text, calls, tool loop, JSON mode")
