# type: ignore  (runs where other versions of its packages are installed)
"""LlamaIndex: python llama_index_client.py URL KEY MODEL."""

import asyncio
import sys

from llama_index.core.agent.workflow import FunctionAgent, ToolCallResult
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.program.function_program import get_function_tool
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field

url, key, name = sys.argv[1:]
seen = []


class Number(BaseModel):
    """A number."""

    n: int = Field(ge=0, le=9)


def add(n: int) -> str:
    """Add to a number."""
    seen.append(n)
    return "4"


llm = OpenAILike(
    model=name, api_base=f"{url}/v1", api_key=key, is_chat_model=True, max_retries=0,
    is_function_calling_model=True, should_use_structured_outputs=True, context_window=8192,
    max_tokens=200, temperature=0,
)  # fmt: skip
hello = [ChatMessage(role="user", content="Hello")]
whole = llm.chat(hello)
parts = list(llm.stream_chat(hello))
assert parts[-1].message.content == whole.message.content

tool = FunctionTool.from_defaults(add)
*_, last = llm.stream_chat_with_tools([tool], chat_history=hello, tool_required=True)
calls = llm.get_tool_calls_from_response(last)
assert calls and all(isinstance(call.tool_kwargs["n"], int) for call in calls)
(call, *_) = llm.predict_and_call([tool], chat_history=hello, tool_required=True).sources
assert call.raw_output == "4" and seen

assert 0 <= llm.as_structured_llm(Number).chat(hello).raw.n <= 9
by_tool = llm.model_copy(update={"should_use_structured_outputs": False})
assert 0 <= by_tool.as_structured_llm(Number).chat(hello).raw.n <= 9
assert get_function_tool(Number).metadata.name == "Number"


async def loop():
    """The agent's own loop, over streams: the first answer calls, the second one is text."""
    agent = FunctionAgent(tools=[tool], llm=llm, initial_tool_choice="add")
    handler, called = agent.run("Hello"), []
    async for event in handler.stream_events():
        if isinstance(event, ToolCallResult):
            called.append(event.tool_output.raw_output)
    assert called and set(called) == {"4"}
    assert (await handler).response is not None


asyncio.run(loop())
print(
    "ok: text, streamed calls, tool loop (FunctionAgent), structured output by schema and by tool"
)
