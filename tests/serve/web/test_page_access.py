"""axe-core finds nothing on any state of the chat page, in both themes."""

from pathlib import Path

import pytest

expect = pytest.importorskip("playwright.sync_api").expect
AXE = Path(__file__).parents[3] / "web" / "node_modules" / "axe-core" / "axe.min.js"
# Landmarks and headings are practices that axe knows besides WCAG 2.2 AA.
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
MARKDOWN = """\
# One\n\n### Three\n\n> ## Quoted\n\n## Two\n\nWords, *more*, `code`, [a link](https://a.example/).

1. first\n2. second\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n$$a^2 + b^2$$\n\n$x$

```python\n# a comment\n@wraps(f)\ndef f(x: int) -> str:\n    return "text" + str(1.5)\n```"""
LONG = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": MARKDOWN, "reasoning_content": "So be it."},
    {"role": "user", "content": "The weather?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL | {"id": "a"}, CALL | {"id": "b"}]},
    {"role": "tool", "tool_call_id": "a", "name": "get_weather", "content": '{"degrees": 3}'},
]


@pytest.fixture
def check(chat):
    """Has axe look at the page as it is, in the light and in the dark theme; fails at the end."""
    if not AXE.exists():
        pytest.skip("axe-core is not there; `make test` fetches it with npm")
    page, wrong = chat.page, []

    def run(state: str) -> None:
        for theme in ("light", "dark"):
            page.emulate_media(color_scheme=theme, reduced_motion="reduce")
            if not page.evaluate("'axe' in window"):
                page.evaluate(AXE.read_text("utf-8"))
            options = {"runOnly": RULES, "resultTypes": ["violations"]}
            found = page.evaluate("(options) => axe.run(document, options)", options)
            wrong.extend(
                f"{state}, {theme}: {rule['id']}: {node['target']} {node['failureSummary']}"
                for rule in found["violations"]
                for node in rule["nodes"]
            )

    yield run
    assert not wrong, "\n".join(wrong)


@pytest.mark.usefixtures("libraries")
def test_axe_finds_nothing(chat, check):
    page = chat.open().page
    check("welcome")
    chat.take({"messages": LONG, "metadata": {"title": "The first of all conversations"}})
    page.wait_for_selector(".hljs-keyword")
    page.wait_for_selector(".katex")
    for fold in page.locator("details").all():
        fold.evaluate("e => (e.open = true)")
    check("a conversation")
    chat.take(LONG[:4])
    check("calls that wait for results")
    page.click("#show-settings")
    page.select_option("[name=format]", "schema")
    page.fill("[name=schema]", "{")
    page.fill("[name=temperature]", "9")
    page.fill("[name=tools]", "{")
    check("settings, with mistakes")
    page.click("#show-settings")
    page.click("#new")
    page.set_input_files(
        "#attachment", {"name": "a.txt", "mimeType": "text/plain", "buffer": b"some notes"}
    )
    page.fill("#search", "first")
    check("a draft with a file, and a search")
    page.fill("#search", "nowhere")
    check("a search without result")
    page.fill("#search", "")
    chat.settings(max_tokens="12")
    page.get_by_label("Token view").click()
    chat.extra = {"ignore_eos": True}
    chat.ask("Hi")
    page.locator(".token").first.hover()
    check("tokens of an answer that was cut off")
    page.locator(".user").last.hover()
    page.get_by_label("Edit").last.click()
    check("an edit")
    page.keyboard.press("Escape")
    chat.extra = {"temperature": 77}
    chat.ask("Hi")
    check("an error")
    page.locator("#conversations li").first.hover()
    page.get_by_label("Rename").first.click()
    check("a new name")
    page.keyboard.press("Escape")
    page.get_by_label("Delete").first.click()
    check("a message with a way back")
    page.keyboard.press("?")
    check("keyboard shortcuts")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="API key").click()
    check("the key")
    page.keyboard.press("Escape")
    page.set_viewport_size({"width": 390, "height": 700})
    check("a phone")
    for panel in ("#show-sidebar", "#show-settings"):
        page.click(panel)
        check(f"a phone, {panel}")
        page.keyboard.press("Escape")
    chat.complaints.clear()  # the refused request


def test_axe_finds_nothing_while_the_model_loads_and_answers(chat, check):
    page = chat.page
    page.route("**/v1/models", lambda route: route.fulfill(
        status=503, json={"error": {"message": "The model is being loaded.", "code": "loading"}}
    ))  # fmt: skip
    chat.page.goto(chat.url)
    expect(page.locator("#notice")).to_contain_text("being loaded")
    check("loading")
    page.unroute("**/v1/models")
    chat.complaints.clear()
    chat.open()
    page.route("**/v1/chat/completions", lambda route: None)
    page.fill("#draft", "Hi")
    page.press("#draft", "Enter")
    expect(page.locator(".waiting")).to_be_visible()
    check("waiting")
    page.click("#stop")
    chat.wait()
    chat.complaints.clear()  # answers that the test made
