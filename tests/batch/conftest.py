"""Requests as lines, and a server that keeps batches."""

import json
import time
from pathlib import Path

import pytest

from tests.serve.conftest import folder, running, state_dir, tiny_llm  # noqa: F401  fixtures

CHAT = "/v1/chat/completions"
MODEL = "tiny-folder"


def request(i: int, *, max_tokens: int = 4, **changes) -> dict:
    messages = [{"role": "user", "content": f"Hello {i}"}]
    body = {"messages": messages, "max_tokens": max_tokens, "temperature": 1, "ignore_eos": True}
    line = {"custom_id": f"line-{i}", "method": "POST", "url": CHAT, "body": body}
    return line | changes


def jsonl(lines: list[dict]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def shared(running, tiny_llm):  # noqa: F811
    keys = ["first-key", "second-key"]
    with running(tiny_llm(), api_key=keys, max_batch_lines=1000, max_file_size=10**6) as server:
        yield server


@pytest.fixture(scope="module")
def oai(shared):
    openai = pytest.importorskip("openai")
    url = f"{shared.url}/v1"
    with openai.OpenAI(base_url=url, api_key="first-key", max_retries=0) as client:
        yield client


def upload(client, lines: list[dict]) -> str:
    return client.files.create(file=("in.jsonl", jsonl(lines)), purpose="batch").id


def tiny(i: int, **changes) -> dict:
    line = request(i, **changes)
    line["body"]["model"] = "tiny"
    return line


def finished(client, id: str):
    def is_done() -> bool:
        return client.batches.retrieve(id).status in ("completed", "failed", "cancelled", "expired")

    wait_until(is_done)
    return client.batches.retrieve(id)


def content(client, file: str) -> list[dict]:
    return [json.loads(line) for line in client.files.content(file).text.splitlines()]
