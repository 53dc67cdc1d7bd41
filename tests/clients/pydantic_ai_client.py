# type: ignore  (runs where other versions of its packages are installed)
"""Pydantic AI with its models of four protocols: python pydantic_ai_client.py URL KEY MODEL."""

import asyncio
import sys

from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, Tool, ToolOutput
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.mistral import MistralModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.mistral import MistralProvider
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.usage import UsageLimits

url, key, name = sys.argv[1:]
seen = []


class Number(BaseModel):
    """A number."""

    n: int = Field(ge=0, le=9)


def add(n: int) -> str:
    """Add to a number."""
    seen.append(n)
    return "4"


async def unless_called(_, definition):
    """Offer the tool once: a model this small would call it for ever."""
    return None if seen else definition


openai = OpenAIProvider(base_url=f"{url}/v1", api_key=key)
models = {
    "openai": OpenAIChatModel(name, provider=openai),
    "openai, responses": OpenAIResponsesModel(name, provider=openai),
    "mistral": MistralModel(name, provider=MistralProvider(base_url=url, api_key=key)),
    "anthropic": AnthropicModel(name, provider=AnthropicProvider(base_url=url, api_key=key)),
}


async def check(which, model):
    settings = {"max_tokens": 200, "temperature": 0}
    greeter = Agent(model, model_settings=settings)
    whole = await greeter.run("Hello")
    async with greeter.run_stream("Hello") as stream:
        assert await stream.get_output() == whole.output and whole.output, which

    # The result is itself a call that is required, whole and streamed.
    wanted = [ToolOutput(Number)]
    if which.startswith("openai"):
        wanted.append(NativeOutput(Number))
    for output in wanted:
        parser = Agent(model, output_type=output, model_settings=settings)
        assert 0 <= (await parser.run("Hello")).output.n <= 9, which
        async with parser.run_stream("Hello") as stream:
            assert 0 <= (await stream.get_output()).n <= 9, which

    # The loop: a tool, as long as it is offered, and then the result's own.
    seen.clear()
    tools = [Tool(add, prepare=unless_called)]
    looper = Agent(model, output_type=ToolOutput(Number), tools=tools, model_settings=settings)
    result = await looper.run("Hello", usage_limits=UsageLimits(request_limit=8))
    assert 0 <= result.output.n <= 9, which
    again = await greeter.run("And now?", message_history=result.all_messages())
    assert again.output is not None, which


async def main():
    for which, model in models.items():
        await check(which, model)
    print("ok: text, streamed calls, tool loop, results by tool and schema, by", ", ".join(models))


asyncio.run(main())
