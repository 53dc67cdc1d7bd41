# type: ignore  (runs where other versions of its packages are installed)
"""Instructor, over OpenAI's client: python instructor_client.py URL KEY MODEL."""

import sys

import instructor
import openai
from pydantic import BaseModel, Field

url, key, model = sys.argv[1:]
plain = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
hello = [{"role": "user", "content": "Hello"}]


class Number(BaseModel):
    """A number."""

    n: int = Field(ge=0, le=9)
    word: str = Field(max_length=20)


modes = (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA)
for mode in modes:
    client = instructor.from_openai(plain, mode=mode)
    settings = {"model": model, "messages": hello, "max_tokens": 300, "max_retries": 0}
    assert 0 <= client.chat.completions.create(response_model=Number, **settings).n <= 9, mode
    *_, last = client.chat.completions.create_partial(response_model=Number, **settings)
    assert 0 <= last.n <= 9 and last.word is not None, mode
    if mode == instructor.Mode.JSON_SCHEMA:  # whose schema lets answers have other keys
        continue
    for number in client.chat.completions.create_iterable(response_model=Number, **settings):
        assert 0 <= number.n <= 9, mode  # a list of none is a list, too
print(
    "ok: response_model, create_partial and create_iterable, as", ", ".join(m.value for m in modes)
)
