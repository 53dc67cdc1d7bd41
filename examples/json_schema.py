"""Answers that are valid by construction: python examples/json_schema.py"""

from typing import Literal

from pydantic import BaseModel, Field

from opennemo import LLM


class Ticket(BaseModel):
    """What a support team wants to know about a letter."""

    subject: str = Field(max_length=80)
    urgency: Literal["low", "normal", "high"]
    angry: bool


LETTERS = [
    "My heating has been out for three days and nobody answers the phone!",
    "Could you send me last year's invoice again when you find the time? Thank you.",
]

with LLM.load("smollm2-135m-instruct") as llm:
    # A list of conversations gives a list of replies, computed side by side.
    replies = llm.chat(
        [[{"role": "user", "content": f"Sort this letter, as JSON.\n\n{it}"}] for it in LETTERS],
        json_schema=Ticket,
        max_tokens=100,
    )
    for reply in replies:
        print(Ticket.model_validate_json(reply.text))

    # A regular expression, or a choice, in the same way.
    answer = llm.complete("The year of the French Revolution:", format=("regex", " 1[78][0-9]{2}"))
    print(answer.text)
