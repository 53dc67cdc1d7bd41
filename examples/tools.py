"""A model that calls functions, and a loop that runs them: python examples/tools.py [MODEL]"""

import json
import sys
from datetime import date

from opennemo import LLM


def days_between(start: str, end: str) -> int:
    return (date.fromisoformat(end) - date.fromisoformat(start)).days


FUNCTIONS = {"days_between": days_between}
DAY = {"type": "string", "pattern": "[0-9]{4}-[01][0-9]-[0-3][0-9]"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "days_between",
            "description": "How many days lie between two dates.",
            "parameters": {
                "type": "object",
                "properties": {"start": DAY, "end": DAY},
                "required": ["start", "end"],
                "additionalProperties": False,
            },
        },
    }
]

with LLM.load(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-tools") as llm:
    messages = [
        {"role": "user", "content": "How many days are there from 2024-01-01 to 2024-03-01?"}
    ]
    choice = "required"  # the first answer calls; arguments always follow the schema
    for _ in range(3):
        reply = llm.chat(messages, tools=TOOLS, tool_choice=choice, max_tokens=200)
        messages.append(reply.message)
        calls = reply.message.get("tool_calls", [])
        if not calls:
            break
        for call in calls:
            function = call["function"]
            try:
                result = FUNCTIONS[function["name"]](**json.loads(function["arguments"]))
            except ValueError as error:  # the model reads what was wrong, and may try again
                result = f"error: {error}"
            print(f"{function['name']}({function['arguments']}) -> {result}")
            messages.append(
                {"role": "tool", "tool_call_id": call["id"], "content": json.dumps(result)}
            )
        choice = "auto"
    print(messages[-1]["content"] or "(no words)")
