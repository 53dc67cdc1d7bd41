"""The chat page folds what a model thinks, and sends it back with the conversation."""

from collections.abc import Iterator

import pytest

from tests.serve.conftest import KEY, Running, run_server
from tests.serve.test_thinking import THOUGHT, WORDS, thinker

expect = pytest.importorskip("playwright.sync_api").expect


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Running]:
    llm = thinker(tmp_path_factory.mktemp("thinker"), "[THINK]", THOUGHT, "[/THINK]", WORDS)
    with run_server(llm, api_key=[KEY]) as server:
        yield server


@pytest.mark.usefixtures("libraries")
def test_thinking_is_folded_and_goes_back(chat):
    page = chat.open().page
    chat.ask("Hi")
    fold = page.locator(".assistant details")
    expect(fold.locator("summary")).to_have_text("Thinking")
    expect(fold.locator(".text")).to_be_hidden()
    fold.locator("summary").click()
    expect(fold.locator(".text")).to_have_text(THOUGHT.strip())
    expect(page.locator(".assistant .markdown")).to_have_text(WORDS)
    chat.ask("And?")
    assert chat.bodies[-1]["messages"][1]["reasoning_content"] == THOUGHT
