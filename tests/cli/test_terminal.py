"""`opennemo chat` in a terminal: what is pasted, typed meanwhile and set, and where lines break."""

import io
import json

import pytest
from rich.cells import cell_len
from rich.console import Console

from opennemo.terminal import Lines
from tests.cli.conftest import Terminal, needs_terminals

PASTE, PASTED = "\x1b[200~", "\x1b[201~"


@pytest.fixture
def chat(folder, tmp_path):
    terminal = Terminal("chat", str(folder), "--max-tokens", "8", cwd=tmp_path)
    try:
        terminal.expect("Ctrl-D leaves")
        terminal.expect("> ")
        yield terminal
    finally:
        terminal.close()


@needs_terminals
def test_pastes_quotes_and_commands(chat, tmp_path):
    chat.type(f"{PASTE}one\rtwo\r\rthree{PASTED}\r")
    chat.expect("a second")
    chat.expect("> ")
    chat.type('"""four\r')
    chat.expect(". ")
    chat.type('five"""\r')
    chat.expect("a second")
    chat.expect("> ")
    for typed, said in (
        ("/set temperature 0.5", "temperature 0.5"),
        ("/set max_tokens x", "not a whole number"),
        ("/set top_p 7", "allowed is 0 to 1"),
        ("/set colour 7", "allowed are max_tokens"),
        ("/format json", "Answers are JSON"),
        ("/format nothing.json", "No such file"),
        ("/format text", "free text"),
        ("/adapter nowhere", "no folder of an"),
        ("/nonsense", "no command /nonsense"),
    ):
        chat.type(f"{typed}\r")
        chat.expect(said)
        chat.expect("> ")
    chat.type("/save talk.json\r")
    chat.expect("Saved 4")
    messages = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert [m["content"] for m in messages[::2]] == ["one\ntwo\n\nthree", "four\nfive"]
    chat.expect("> ")
    chat.type("/exit\r")
    assert chat.process.wait(60) == 0


@needs_terminals
def test_keys_pressed_during_an_answer_wait_for_the_prompt(chat):
    for setting in ("max_tokens", "min_tokens"):
        chat.type(f"/set {setting} 900\r")  # 0.3 seconds' at the very least
        chat.expect("> ")
    chat.type("Hi\r")
    chat.expect("\n")
    chat.see()
    chat.type("/he\x03")
    answer = chat.expect("a second")
    assert "/he" not in answer
    assert "stopped" in chat.expect("\n")
    chat.expect("> ")
    chat.expect("/he")
    chat.type("lp\r")
    chat.expect("begin a new")


@pytest.mark.parametrize("cut", [1, 3, 7])
def test_lines_break_between_words(cut):
    text = (
        "Es war einmal eine Müllerstochter, die Stroh zu Gold spinnen sollte.\n\n"
        "    indented code\n"
        "日本語の文章には空白がないので、どこでも改行できる。 " + "x" * 50 + " end 😀 of it"
    )
    file = io.StringIO()
    lines = Lines(Console(file=file, force_terminal=True, width=20, color_system=None))
    for start in range(0, len(text), cut):
        lines.write(text[start : start + cut])
    lines.flush()
    shown = file.getvalue()
    # The terminal itself breaks what has no blanks, at its edge.
    assert all(cell_len(line) <= 20 for line in shown.split("\n") if not {"日", "x"} & {*line})
    words = text.replace("\n", " ").split(" ")
    assert "".join(shown.split()) == "".join(text.split())
    assert all(word in shown for word in words if cell_len(word) == len(word) < 20)
    assert "\n\n    indented code\n" in shown
