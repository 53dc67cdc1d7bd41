"""OpenAI's client against our server: python examples/openai_client.py [BASE_URL]

In another terminal: opennemo serve smollm2-135m-instruct. Needs `pip install openai`.
"""

import os
import sys

from openai import OpenAI

base_url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
key = os.environ.get("OPENAI_API_KEY", "none")  # matters only with serve --api-key
client = OpenAI(base_url=base_url, api_key=key)
model = client.models.list().data[0].id

stream = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "Name three colours."}],
    max_tokens=40,
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    elif chunk.usage:
        print(f"\n{chunk.usage.completion_tokens} tokens")

colour = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "The colour of grass, as JSON."}],
    max_tokens=40,
    response_format={
        "type": "json_schema",
        "json_schema": {
            "name": "colour",
            "schema": {
                "type": "object",
                "properties": {"colour": {"enum": ["red", "green", "blue"]}},
                "required": ["colour"],
                "additionalProperties": False,
            },
        },
    },
)
print(colour.choices[0].message.content)
