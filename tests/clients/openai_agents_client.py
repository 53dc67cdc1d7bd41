# type: ignore  (runs where other versions of its packages are installed)
"""OpenAI's Agents SDK: python openai_agents_client.py URL KEY MODEL."""

import asyncio
import sys

import openai
from agents import (
    Agent,
    ModelBehaviorError,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from pydantic import BaseModel, Field

url, key, name = sys.argv[1:]
set_tracing_disabled(True)
client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
PROMPT = "What is the capital of Germany?"
seen = []


class Number(BaseModel):
    n: int = Field(ge=0, le=9)


@function_tool
def add(n: int) -> str:
    """Add to a number.

    Args:
        n: what to add
    """
    seen.append(n)
    return "4"


async def check(model):
    greedy = ModelSettings(temperature=0, max_tokens=100)
    calling = ModelSettings(tool_choice="required", max_tokens=1000, parallel_tool_calls=False)
    greeter = Agent(name="greeter", model=model, model_settings=greedy)
    whole = await Runner.run(greeter, PROMPT)
    streamed = Runner.run_streamed(greeter, PROMPT)
    text = ""
    async for event in streamed.stream_events():
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
            text += event.data.delta
    assert text == streamed.final_output == whole.final_output and text

    # The SDK's own loop ends where the tool has answered, or after an answer to that.
    caller = Agent(
        name="caller", model=model, model_settings=calling, tools=[add],
        tool_use_behavior="stop_on_first_tool",
    )  # fmt: skip
    for streaming in (False, True):
        seen.clear()
        if streaming:
            result = Runner.run_streamed(caller, PROMPT)
            async for _ in result.stream_events():
                pass
        else:
            result = await Runner.run(caller, PROMPT)
        assert seen and result.final_output == "4"
        try:
            again = await Runner.run(greeter, result.to_input_list())
            assert again.final_output is not None
        except ModelBehaviorError as error:  # of Responses alone: the answer is at its limit
            assert "max_output_tokens" in str(error)

    parser = Agent(name="parser", model=model, model_settings=greedy, output_type=Number)
    assert 0 <= (await Runner.run(parser, PROMPT)).final_output.n <= 9


async def main():
    for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
        await check(kind(model=name, openai_client=client))
    print("ok: text, streamed calls, tool loop, output_type, over Chat Completions and Responses")


asyncio.run(main())
