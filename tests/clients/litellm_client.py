# type: ignore  (runs where other versions of its packages are installed)
"""LiteLLM with three of its providers: python litellm_client.py URL KEY MODEL."""

import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would fetch a list of prices
import litellm
from pydantic import BaseModel, Field

url, key, model = sys.argv[1:]
hello = [{"role": "user", "content": "Hello"}]
schema = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["n"],
    "additionalProperties": False,
}
tools = [{"type": "function", "function": {"name": "add", "parameters": schema}}]
litellm.telemetry = False


class Number(BaseModel):
    n: int = Field(ge=0, le=9)


for provider, base in (("openai", f"{url}/v1"), ("mistral", f"{url}/v1"), ("anthropic", url)):
    settings = {"model": f"{provider}/{model}", "api_base": base, "api_key": key, "max_retries": 0}

    def ask(messages=hello, settings=settings, **more):
        return litellm.completion(messages=messages, **settings, **more)

    whole = ask(max_tokens=8, temperature=0)
    chunks = list(ask(max_tokens=8, temperature=0, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content, provider

    calling = {"tools": tools, "tool_choice": "required", "max_tokens": 2000}
    for streamed in (False, True):
        answer = ask(**calling, stream=streamed)
        if streamed:
            answer = litellm.stream_chunk_builder(list(answer), messages=hello)
        message = answer.choices[0].message
        assert message.tool_calls, provider
        results = []
        for call in message.tool_calls:
            assert 0 <= json.loads(call.function.arguments)["n"] <= 9, provider
            results.append({"role": "tool", "tool_call_id": call.id, "content": "4"})
        dialogue = [*hello, message.model_dump(), *results]
        assert ask(dialogue, tools=tools, max_tokens=4).choices, provider

    answer = ask(response_format=Number, max_tokens=200).choices[0].message.content
    assert 0 <= Number.model_validate_json(answer).n <= 9, provider
    try:
        litellm.completion(messages=hello, **{**settings, "model": f"{provider}/gpt-4"})
        raise AssertionError("an unknown model was answered")
    except litellm.NotFoundError:
        pass
print("ok: text, streamed calls, tool loop, response_format, by openai, mistral and anthropic")
