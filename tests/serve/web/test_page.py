"""What people do on the chat page."""

import json
import re

import pytest

expect = pytest.importorskip("playwright.sync_api").expect
LONG = {"ignore_eos": True, "max_tokens": 3500}


@pytest.mark.usefixtures("libraries")
def test_answers_are_shown_as_markdown(chat):
    page = chat.open().page
    code = "def f(x):\n    return x < 1 & 2"
    chat.ask(
        "Hi",
        f"# Title\n\nSome *words*.\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n```python\n{code}\n```",
    )
    answer = page.locator(".assistant")
    expect(answer.get_by_role("heading", name="Title", level=3)).to_be_visible()
    expect(answer.locator("em")).to_have_text("words")
    expect(answer.locator("td").last).to_have_text("2")
    expect(answer.locator("pre code")).to_have_text(code + "\n", use_inner_text=False)
    expect(answer.locator(".hljs-keyword").first).to_have_text("def")
    expect(answer.locator(".stats")).to_have_text(
        re.compile(r"^\d+ tokens · [\d.]+ tokens/s · first after [\d.]+ m?s$")
    )
    expect(page.locator("#status")).to_contain_text("Answer: # Title")
    expect(page.locator("#context .text")).to_have_text(re.compile(r"^\d{2,} / 4,096$"))
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    answer.get_by_label("Copy the code").click()
    page.wait_for_function("navigator.clipboard.readText().then((t) => t.startsWith('def f'))")


def test_an_answer_streams_and_stopping_ends_the_work_of_the_server(chat):
    page = chat.open().page
    for stop in (lambda: page.keyboard.press("Escape"), lambda: page.click("#stop")):
        chat.extra = LONG
        page.fill("#draft", "Go on for long")
        page.press("#draft", "Enter")
        expect(page.locator(".running .stats")).to_contain_text("tokens")
        expect(page.locator(".running .markdown")).not_to_be_empty()  # while it is being written
        stop()
        chat.wait()
        expect(page.locator(".assistant .stats").last).to_contain_text("stopped")
        chat.wait_until_idle()
    assert page.locator(".assistant .error").count() == 0
    expect(page.locator("#draft")).to_be_focused()

    chat.extra = LONG
    page.fill("#draft", "Go on while I look elsewhere")
    page.press("#draft", "Enter")
    page.click("#new")
    expect(page.locator("#conversations .running")).to_have_count(1)
    page.fill("#draft", "a draft")
    page.locator("#conversations .open").click()
    expect(page.locator("#draft")).to_have_value("")
    page.click("#stop")
    expect(page.locator("#conversations .running")).to_have_count(0)


def test_versions_of_answers_and_messages(chat):
    page = chat.open().page
    chat.ask("First", "one")
    chat.extra = {"structured_outputs": {"choice": ["two"]}}
    page.get_by_label("Answer again").click()
    chat.wait()
    answer, versions = page.locator(".assistant .body"), page.get_by_role("group", name="Versions")
    expect(answer).to_have_text("two")
    expect(versions).to_have_text("2 / 2")
    chat.ask("Second", "three")
    assert [m["content"] for m in chat.bodies[-1]["messages"]] == ["First", "two", "Second"]

    page.locator(".user").first.hover()
    page.get_by_label("Edit").first.click()
    editor = page.get_by_label("Edit the message")
    expect(editor).to_have_value("First")
    editor.press("Escape")
    expect(editor).to_have_count(0)
    page.get_by_label("Edit").first.click()
    editor.fill("Changed")
    chat.extra = {"structured_outputs": {"choice": ["four"]}}
    editor.press("Enter")
    chat.wait()
    assert [m["content"] for m in chat.bodies[-1]["messages"]] == ["Changed"]
    expect(page.locator("article .body")).to_have_text(["Changed", "four"])

    page.get_by_label("Previous version").first.click()
    expect(page.locator("article .body")).to_have_text(["First", "two", "Second", "three"])
    page.get_by_label("Previous version").nth(1).click()
    expect(page.locator("article .body")).to_have_text(["First", "one"])
    expect(page.get_by_label("Next version").nth(1)).to_be_focused()
    page.wait_for_timeout(500)  # after which it has been written
    page.reload()
    expect(page.locator("article .body")).to_have_text(["First", "one"])
    page.get_by_label("Next version").first.click()
    expect(page.locator("article .body")).to_have_text(["Changed", "four"])


def test_settings_are_sent(chat):
    page = chat.open().page
    numbers = {
        "temperature": 0.75, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "max_tokens": 5, "seed": 7,
        "repetition_penalty": 1.1, "presence_penalty": -0.5, "frequency_penalty": 0.25,
    }  # fmt: skip
    chat.settings(
        system="Be brief.", stop="END\n---", **{name: str(v) for name, v in numbers.items()}
    )
    expect(page.locator("#active")).to_contain_text("system prompt · temperature 0.75 · top p 0.9")
    chat.ask("Hi")
    body = chat.bodies[-1]
    assert {name: body[name] for name in numbers} == numbers
    assert body["stop"] == ["END", "---"] and "tools" not in body and "logprobs" not in body
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    expect(page.locator(".stats")).to_contain_text("5 tokens")
    chat.settings(temperature="9", max_tokens="1.5")
    expect(page.locator("[name=temperature]")).to_have_attribute("aria-invalid", "true")
    chat.settings(max_tokens="4")
    chat.ask("Hi")
    assert "temperature" not in chat.bodies[-1] and chat.bodies[-1]["max_tokens"] == 4
    page.click("#show-settings")
    page.click("text=Reset")
    expect(page.locator("[name=top_p]")).to_have_value("")


def test_new_conversations_begin_with_settings_of_their_own(chat):
    page = chat.open().page
    chat.settings(system="Be brief.", temperature="0.75")
    page.click("#show-settings")
    state = page.locator("#beginning")
    expect(state).to_have_text("They begin with the usual settings.")
    page.click("text=Begin with these")
    expect(state).to_have_text("They begin with system prompt · temperature 0.75.")
    expect(page.get_by_role("button", name="Begin with these")).to_be_disabled()
    page.fill("[name=temperature]", "0.5")  # of this conversation alone
    chat.ask("Hi", "Hello")
    page.click("#new")
    expect(page.locator("[name=temperature]")).to_have_value("0.75")
    page.fill("[name=system]", "")
    page.click("text=Use those here")
    expect(page.locator("[name=system]")).to_have_value("Be brief.")
    page.reload()
    page.click("#new")
    expect(page.locator("[name=temperature]")).to_have_value("0.75")


def test_answers_have_the_form_that_is_set(chat):
    page = chat.open().page
    chat.settings(format="json", max_tokens="64")
    expect(page.locator("#active")).to_contain_text("JSON")
    chat.ask("Hi")
    assert chat.bodies[-1]["response_format"] == {"type": "json_object"}
    expect(page.locator(".assistant .body")).to_contain_text("{")
    page.click("#show-settings")
    page.select_option("[name=format]", "schema")
    page.fill("[name=schema]", "[1")
    expect(page.locator("#schema-state")).to_contain_text("Not JSON")
    expect(page.locator("#active")).to_contain_text("not valid")
    schema = {"type": "object", "properties": {"a": {"enum": [7]}}, "required": ["a"]}
    page.fill("[name=schema]", json.dumps(schema))
    expect(page.locator("#schema-state")).to_have_text("")
    page.click("#show-settings")
    chat.ask("Again")
    assert chat.bodies[-1]["response_format"]["json_schema"]["schema"] == schema
    answer = page.locator(".assistant .body").last.inner_text()
    assert json.loads(answer) == {"a": 7}
    page.locator("#conversations li").first.hover()
    with page.expect_download() as download:
        page.get_by_label("Export", exact=True).click()
    chat.take(json.loads(download.value.path().read_text()))
    expect(page.locator("[name=format]")).to_have_value("schema")
    assert json.loads(page.locator("[name=schema]").input_value()) == schema


def test_an_answer_that_was_cut_off_goes_on(chat):
    page = chat.open().page
    page.get_by_label("Token view").click()
    chat.settings(max_tokens="4")
    chat.extra = {"ignore_eos": True}
    chat.ask("Hi")
    expect(page.locator(".stats")).to_contain_text("cut off at max tokens")
    begun = page.locator(".token").all_inner_texts()
    page.get_by_label("Token view").click()
    page.get_by_role("button", name="Continue").click()
    chat.wait()
    body = chat.bodies[-1]
    assert (
        body["continue_final_message"] and [m["role"] for m in body["messages"]][-1] == "assistant"
    )
    assert body["logprobs"] is True  # as its first part has them
    expect(page.locator(".stats")).to_contain_text("8 tokens")
    page.get_by_label("Token view").click()
    expect(page.locator(".token")).to_have_count(8)
    assert page.locator(".token").all_inner_texts()[:4] == begun
    expect(page.get_by_role("group", name="Versions")).to_have_count(0)
    chat.extra = {"structured_outputs": {"choice": ["the end"]}}
    page.get_by_role("button", name="Continue").click()
    chat.wait()
    page.get_by_label("Token view").click()
    expect(page.locator(".assistant .body")).to_contain_text("the ")
    chat.settings(format="json")
    expect(page.get_by_role("button", name="Continue")).to_have_count(0)


def test_a_call_is_answered_in_a_form(chat):
    page = chat.open().page
    page.click("#show-settings")
    state = page.locator("#tools-state")
    for text, complaint in (
        ("[{", "Not JSON"), ("{}", "Expected a list"), ('[{"type": "function"}]', "function.name"),
        ('[{"type": "function", "function": {"name": "f", "parameters": []}}]', "parameters"),
    ):  # fmt: skip
        page.fill("[name=tools]", text)
        expect(state).to_contain_text(complaint)
    expect(page.locator("#active")).to_contain_text("not valid")
    page.click("text=Insert an example")
    expect(state).to_have_text("✓ get_weather")
    page.click("#show-settings")
    chat.settings(toolChoice="required", max_tokens="400")
    chat.ask("How is the weather?")
    body = chat.bodies[-1]
    assert body["tools"][0]["function"]["name"] == "get_weather"
    assert body["tool_choice"] == "required"
    cards = page.locator(".call")
    expect(cards.first.locator("h3")).to_have_text("get_weather")
    results = [f'{{"degrees": {i}}}' for i in range(cards.count())]
    for i, result in enumerate(results):
        arguments = json.loads(cards.nth(i).locator("pre").inner_text())
        assert arguments["unit"] in ("celsius", "fahrenheit")
        cards.nth(i).locator("textarea").fill(result)
    chat.settings(max_tokens="4")
    page.get_by_role("button", name=re.compile("Send the result")).click()
    chat.wait()
    calls, *answers = chat.bodies[-1]["messages"][1:]
    assert [answer["content"] for answer in answers] == results
    assert [answer["tool_call_id"] for answer in answers] == [c["id"] for c in calls["tool_calls"]]
    assert chat.bodies[-1]["tool_choice"] == "auto"
    expect(page.locator(".calls textarea")).to_have_count(0)
    expect(page.locator(".tool summary").first).to_have_text("Result of get_weather")
    assert page.locator(".error").count() == 0


def test_tokens_and_what_else_could_have_stood_there(chat):
    page = chat.open().page
    chat.settings(max_tokens="6")
    chat.ask("Hi")
    assert "logprobs" not in chat.bodies[-1]
    page.get_by_label("Token view").click()
    expect(page.locator(".stats")).to_contain_text("answer again to see its tokens")
    chat.extra = {"ignore_eos": True}
    page.get_by_label("Answer again").click()
    chat.wait()
    assert chat.bodies[-1]["logprobs"] is True and chat.bodies[-1]["top_logprobs"] == 5
    tokens = page.locator(".token")
    expect(tokens).to_have_count(6)
    assert 0 < float(tokens.first.evaluate("t => t.style.getPropertyValue('--doubt')")) <= 1
    tokens.nth(2).hover()
    tip = page.locator("#tip")
    expect(tip).to_contain_text("log-probability")
    assert tip.locator("tr").count() in (5, 6)
    page.mouse.move(0, 0)
    expect(tip).to_be_hidden()
    page.locator(".tokens").focus()
    page.keyboard.press("ArrowRight")
    expect(tokens.first).to_have_class("token pointed")
    page.get_by_label("Token view").click()
    expect(tokens).to_have_count(0)


def test_conversations_are_kept_renamed_and_deleted(chat):
    page = chat.open().page
    chat.ask("The first one", "one")
    page.keyboard.press("Control+Shift+O")
    expect(page.locator("#welcome")).to_be_visible()
    chat.ask("The second one", "two")
    names = page.locator("#conversations .open")
    expect(names).to_have_text(["The second one", "The first one"])
    page.locator("#conversations li").first.hover()
    page.get_by_label("Rename").first.click()
    page.get_by_label("Name of the conversation").fill("Another name")
    page.keyboard.press("Enter")
    page.keyboard.press("Alt+ArrowDown")
    expect(page.locator("article .body")).to_have_text(["The first one", "one"])
    page.wait_for_timeout(500)
    page.reload()
    expect(names).to_have_text(["Another name", "The first one"])
    expect(page.locator("#title")).to_have_text("Another name")
    page.locator("#conversations li").first.hover()
    page.get_by_label("Delete").first.click()
    expect(names).to_have_text(["The first one"])
    page.click("text=Undo")
    expect(names).to_have_text(["Another name", "The first one"])
    page.locator("#conversations li").first.hover()
    page.get_by_label("Delete").first.click()
    page.wait_for_timeout(500)
    page.reload()
    expect(names).to_have_text(["The first one"])


def test_adapters_are_listed_apart_from_models(chat):
    page = chat.page

    def add_adapter(route):
        response = route.fetch()
        (card,) = response.json()["data"]
        tuned = card | {"id": "tuned", "parent": card["id"]}
        route.fulfill(response=response, json={"data": [card, tuned]})

    page.route("**/v1/models", add_adapter)
    chat.open()
    expect(page.locator("#model > option")).to_have_text(["tiny"])
    expect(page.locator("#model optgroup[label='With an adapter'] option")).to_have_text(["tuned"])
    page.select_option("#model", "tuned")
    chat.ask("Hi")
    assert chat.bodies[-1]["model"] == "tuned"
    chat.complaints.clear()  # the server has no such adapter
    page.evaluate("localStorage.removeItem('model')")


def test_conversations_are_searched(chat):
    page = chat.open().page
    for title, answer in (("Über Eis", "cold water"), ("Deserts", "warm sand and WATER")):
        page.click("#new")
        chat.ask(title, answer)
    names, search = page.locator("#conversations .open"), page.get_by_role("searchbox")
    page.keyboard.press("Control+k")
    expect(search).to_be_focused()
    for words, found in (
        ("water", ["Deserts", "Über Eis"]), ("uber COLD", ["Über Eis"]), ("sand", ["Deserts"]),
        ("sand cold", []), ("", ["Deserts", "Über Eis"]),
    ):  # fmt: skip
        search.fill(words)
        expect(names).to_have_text(found)
        expect(page.locator("#none")).to_be_visible(visible=not found)
    search.fill("cold")
    expect(page.locator("#status")).to_have_text("1 of 2 conversations")


def test_an_export_is_a_request_and_comes_back_the_same(chat):
    page = chat.open().page
    chat.settings(system="Be kind.", temperature="0.5", max_tokens="8", stop="X")
    chat.ask("Hello", "Hi")
    page.locator("#conversations li").first.hover()
    with page.expect_download() as download:
        page.get_by_label("Export", exact=True).click()
    assert download.value.suggested_filename == "Hello.json"
    body = json.loads(download.value.path().read_text())
    assert body["messages"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
    ]
    with chat.server.client() as http:  # any client can go on with it
        body["messages"].append({"role": "user", "content": "More"})
        assert http.post("/v1/chat/completions", json=body).status_code == 200
        del body["messages"][-1]

    call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    other = [
        {"role": "user", "content": [{"type": "text", "text": "Call it"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "done"},
        {"role": "assistant", "content": "It is done."},
    ]
    chat.take([{"messages": other}, body])
    expect(page.locator("#conversations .open")).to_have_text(["Call it", "Hello", "Hello"])
    expect(page.locator("article")).to_have_count(4)
    page.locator("#conversations .open").nth(1).click()
    expect(page.locator("[name=temperature]")).to_have_value("0.5")
    with page.expect_download() as download:
        page.click("text=Export all")
    exported = json.loads(download.value.path().read_text())
    assert exported[0]["messages"][1] == other[1] | {"content": ""}
    assert exported[1] == exported[2] == body
    for wrong, complaint in (
        ({"x": 1}, "expected"), ([{"role": "robot"}], "messages[0].role"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
    ):  # fmt: skip
        chat.take(wrong)
        expect(page.locator("#toast")).to_contain_text(complaint)
    expect(page.locator("#conversations .open")).to_have_count(3)


@pytest.mark.parametrize("width", [390, 320])
def test_a_phone_is_wide_enough(chat, width):
    page = chat.page
    page.set_viewport_size({"width": width, "height": 700})
    chat.open()

    def fits() -> bool:
        return page.evaluate(
            """[document.documentElement, document.querySelector("#scroller")]
            .every((e) => e.scrollWidth <= e.clientWidth)"""
        )

    assert fits()
    row = "| " + " | ".join("a wide cell" for _ in range(12)) + " |"
    wide = f"{'w' * 300}\n\n```python\n{'x' * 300}\n```\n\n{row}\n{'|---' * 12}|\n{row}"
    chat.take([{"role": "user", "content": "u" * 300}, {"role": "assistant", "content": wide}])
    expect(page.locator("article")).to_have_count(2)
    assert fits()
    chat.ask("Hi", "Hello")
    assert fits()
    for button in ("#show-sidebar", "#show-settings"):
        page.click(button)
        panel = page.locator("#" + page.locator(button).get_attribute("aria-controls"))
        expect(panel).to_be_in_viewport(ratio=0.95)
        assert fits()
        page.keyboard.press("Escape")
        expect(panel).not_to_be_in_viewport()
    page.click("#show-sidebar")
    page.locator("#scrim").click(position={"x": width - 5, "y": 300})
    expect(page.locator("#scrim")).to_be_hidden()


@pytest.mark.usefixtures("libraries")
def test_arabic_runs_from_right_to_left(chat):
    page = chat.open().page
    arabic = "عاصمة فرنسا هي **باريس**."
    chat.ask(
        "ما هي عاصمة فرنسا؟", f"{arabic}\n\n1. {arabic}\n\n```python\nprint(1)\n```\n\nEnglish."
    )
    for selector, direction in (
        (".user .text", "rtl"), (".assistant p >> nth=0", "rtl"), (".assistant ol", "rtl"),
        (".assistant pre", "ltr"), (".assistant p >> nth=-1", "ltr"), ("#title", "rtl"),
    ):  # fmt: skip
        found = page.locator(selector).evaluate("e => getComputedStyle(e).direction")
        assert found == direction, selector
    page.fill("#draft", "مرحبا")
    assert page.locator("#draft").evaluate("e => e.matches(':dir(rtl)')")


def test_the_keyboard_is_enough(chat):
    page = chat.open().page
    draft = page.locator("#draft")
    expect(draft).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    expect(draft).to_have_value("one\ntwo")
    chat.extra = {"structured_outputs": {"choice": ["yes"]}}
    page.keyboard.press("Enter")
    chat.wait()
    assert chat.bodies[-1]["messages"][-1]["content"] == "one\ntwo"
    page.keyboard.press("ArrowUp")
    expect(page.get_by_label("Edit the message")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_label("Edit").first).to_be_focused()
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keyboard shortcuts")).to_be_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("Control+.")
    expect(page.locator("[name=system]")).to_be_focused()
    page.keyboard.press("Control+.")
    expect(page.locator("#show-settings")).to_be_focused()
    assert (
        page.locator("#show-settings").evaluate("e => getComputedStyle(e).outlineStyle") != "none"
    )
    page.keyboard.press("/")
    expect(draft).to_be_focused()
    nameless = page.locator("button, input, textarea, select, a").evaluate_all(
        """all => all.filter((e) => !(e.ariaLabel || e.innerText || e.labels?.length))
        .map((e) => e.outerHTML)"""
    )
    assert not nameless


def test_light_and_dark(chat):
    page = chat.open().page
    page.emulate_media(color_scheme="dark")
    background = "() => getComputedStyle(document.documentElement).backgroundColor"
    dark = page.evaluate(background)
    page.locator("#theme").click()
    light = page.evaluate(background)
    assert light != dark
    page.reload()
    assert page.evaluate(background) == light
    expect(page.locator("#theme")).to_have_attribute("aria-label", "Theme: light")
    page.locator("#theme").click()
    assert page.evaluate(background) == dark
