"""A conversation at a terminal, typed at and read as a person would."""

import json
import os
import pty
import re
import select
import time

from tests import processes
from tests.cli.conftest import needs_smollm2


class Terminal:
    """A program in a pseudo-terminal, typed at and read as a person would."""

    def __init__(self, *args: str):
        self.fd, theirs = pty.openpty()
        self.process = processes.start(
            "-m", "opennemo.cli", *args, stdin=theirs, stdout=theirs, stderr=theirs,
            env=os.environ | {"TERM": "dumb"}, session=True,
        )  # fmt: skip
        os.close(theirs)
        self.seen = ""

    def expect(self, pattern: str, seconds: float = 120) -> str:
        """Read until the pattern has come, and return what was read since the last time."""
        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self.seen)):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.seen!r}"
            if select.select([self.fd], [], [], 1)[0]:
                self.seen += os.read(self.fd, 4096).decode(errors="replace")
        text, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return text

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def exit_code(self) -> int:
        """Of the program, which must be about to end."""
        return self.process.wait(60)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)  # hangs up, which ends whatever is still there


@needs_smollm2
def test_a_person_at_a_terminal(tmp_path):
    with Terminal("chat", "--temperature", "0") as terminal:
        terminal.expect("/help lists")
        terminal.expect("> ")
        terminal.type("What is the capital of Germany?\n")
        assert "Berlin" in terminal.expect("tokens, [0-9.]+ a second")
        terminal.expect("> ")
        terminal.type("Write a very long story about the sea.\n")
        terminal.expect(r"sea\.\r?\n.{40}")
        terminal.type("\x03")  # stops the answer
        terminal.expect("a second, stopped")
        terminal.expect("> ")
        terminal.type("/nonsense\n")
        terminal.expect("no command /nonsense")
        terminal.type(f"/save {tmp_path}/talk.jsonl\n")
        terminal.expect("Saved 4 messages")
        terminal.type("/system You are a pirate.\n")
        terminal.expect("new conversation")
        terminal.type("/reset\n")
        terminal.expect("new conversation")
        terminal.expect("> ")  # Ctrl-D before the prompt is there would be lost in the terminal
        terminal.type("\x04")  # leaves
        assert terminal.exit_code() == 0
    saved = json.loads((tmp_path / "talk.jsonl").read_text())
    assert [m["role"] for m in saved["messages"]] == ["user", "assistant"] * 2


@needs_smollm2
def test_a_session_is_shown_and_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "state" / "opennemo" / "sessions" / "sea.json"
    for question in ("What is the sea?", "And a lake?"):
        with Terminal("chat", "--session", "sea", "--max-tokens", "8") as terminal:
            terminal.expect("/help lists")
            if question == "And a lake?":
                terminal.expect("> What is the sea")
            terminal.expect("> ")
            terminal.type(f"{question}\n")
            terminal.expect("tokens, [0-9.]+ a second")
            terminal.expect("> ")
            if question == "And a lake?":
                assert len(json.loads(file.read_text())["messages"]) == 4
                terminal.type("/reset\n")
                terminal.expect("A new conversation")
                terminal.expect("> ")
            terminal.type("\x04")
            assert terminal.exit_code() == 0
    assert json.loads(file.read_text()) == {"messages": []}
