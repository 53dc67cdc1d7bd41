# type: ignore  (runs where other versions of its packages are installed)
"""LangChain's classes for OpenAI and Mistral: python langchain_client.py URL KEY MODEL."""

import sys

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_mistralai import ChatMistralAI
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

url, key, name = sys.argv[1:]
hello = [HumanMessage("Hello")]


class Number(BaseModel):
    """A number."""

    n: int = Field(ge=0, le=9)


@tool(args_schema=Number)
def add(n: int) -> str:
    """Add to a number."""
    return str(n + 4)


common = {"model": name, "api_key": key, "base_url": f"{url}/v1", "max_retries": 0}
models = {
    "openai": ChatOpenAI(**common, max_tokens=1000),
    "openai, responses": ChatOpenAI(**common, max_tokens=1000, use_responses_api=True),
    "mistralai": ChatMistralAI(
        model=name, api_key=key, endpoint=f"{url}/v1", max_tokens=1000, max_retries=1
    ),
}
for which, model in models.items():
    short = model.model_copy(update={"max_tokens": 16, "temperature": 0})
    whole = short.invoke(hello)
    parts = list(short.stream(hello))
    assert "".join(part.text for part in parts) == whole.text, which
    assert whole.usage_metadata["output_tokens"], which

    calling = model.bind_tools([add], tool_choice="any")
    added = None
    for part in calling.stream(hello):
        added = part if added is None else added + part
    for message in (calling.invoke(hello), added):
        assert message.tool_calls and not message.invalid_tool_calls, which
        results = [add.invoke(call) for call in message.tool_calls]
        assert all(isinstance(result, ToolMessage) for result in results), which
        assert all(0 <= call["args"]["n"] <= 9 for call in message.tool_calls), which
        assert short.invoke([*hello, message, *results]) is not None, which

    for method in ("json_schema", "function_calling"):
        answer = model.with_structured_output(Number, method=method).invoke(hello)
        assert 0 <= answer.n <= 9, (which, method)
print("ok: text, streamed calls, tool loop, with_structured_output, by", ", ".join(models))
