"""The chat page in a real browser, against a real server.

The model is tiny and random, so where the words matter a grammar makes it say them: the page's own
request gets `structured_outputs` on its way. No test may leave an error in the console, or ask any
host but the server for anything.
"""

import json
import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest

from opennemo.serve.app import WEB

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-sync", "--disable-background-networking", "--disable-component-update",
    "--disable-dev-shm-usage",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if path is None:
        pytest.skip("there is no Chromium; `make browser` installs one")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def libraries() -> None:
    """For tests of what the page's libraries do."""
    if not (WEB / "vendor").is_dir():
        pytest.skip("the page's libraries are not there; `make test` fetches them with npm")


class Chat:
    """The page, and what goes between it and the server."""

    def __init__(self, page: Any, server: Any):
        self.page, self.server, self.url = page, server, f"{server.url}/"
        self.bodies: list[dict[str, Any]] = []  # of requests for answers, as the page sent them
        self.extra: dict[str, Any] = {}  # what they get besides
        self.foreign: list[str] = []
        self.complaints: list[str] = []
        page.context.on("request", self._on_request)
        page.on("console", lambda m: m.type == "error" and self.complaints.append(m.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: (self.complaints.append("a dialog"), dialog.dismiss()))
        page.route("**/v1/chat/completions", self._on_answer)

    def _on_request(self, request: Any) -> None:
        if not request.url.startswith((self.url, "blob:")):
            self.foreign.append(request.url)

    def _on_answer(self, route: Any) -> None:
        body = json.loads(route.request.post_data)
        self.bodies.append(body)
        route.continue_(post_data=json.dumps(body | self.extra))

    def open(self, key: str | None = "the server's") -> "Chat":
        if key:
            self.page.add_init_script(f"sessionStorage.setItem('key', '{self.server.key}')")
        self.page.goto(self.url)
        if key:
            self.page.wait_for_selector("#model option", state="attached")
        return self

    def ask(self, text: str, answer: str | None = None) -> None:
        """Send a message; `answer` is what the model shall say to it."""
        if answer is not None:
            self.extra = {"structured_outputs": {"choice": [answer]}}
        self.page.fill("#draft", text)
        self.page.press("#draft", "Enter")
        self.wait()

    def wait(self) -> None:
        self.page.wait_for_selector("#send", state="visible", timeout=20_000)

    def wait_until_idle(self) -> None:
        while self.server.service.active:
            time.sleep(0.01)

    def settings(self, **values: str) -> None:
        self.page.click("#show-settings")
        for name, value in values.items():
            field = self.page.locator(f"[name={name}]")
            is_choice = name in ("toolChoice", "format")
            field.select_option(value) if is_choice else field.fill(value)
        self.page.click("#show-settings")

    def take(self, conversation: Any) -> None:
        """Import a conversation."""
        file = {
            "name": "a.json",
            "mimeType": "application/json",
            "buffer": json.dumps(conversation).encode(),
        }
        self.page.set_input_files("#file", file)


@pytest.fixture
def chat(browser, server) -> Iterator[Chat]:
    context = browser.new_context(viewport={"width": 1200, "height": 800}, reduced_motion="reduce")
    context.set_default_timeout(10_000)
    chat = Chat(context.new_page(), server)
    yield chat
    context.close()
    assert not chat.foreign, "the page asked other hosts"
    assert not chat.complaints
    chat.wait_until_idle()  # what was still being answered is given up with the page
