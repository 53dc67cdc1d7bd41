"""A conversation in the terminal: words as they come, Ctrl-C for the answer and not the program."""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from opennemo.errors import InvalidRequest, OpenNemoError
from opennemo.files import read_json, write_whole
from opennemo.llm import LLM
from opennemo.tokenizer.chat import Message

HELP = """\
/reset        begin a new conversation
/system TEXT  set the system message, and begin anew; without TEXT, show it
/save FILE    write the conversation as one line of JSON, ready for fine-tuning
/exit         leave, as Ctrl-D does; Ctrl-C stops an answer"""


def answer(
    text: str, system: str | None, load: Callable[[], LLM], sampling: Any, kept: Path | None = None
) -> None:
    """Answer one message on standard output, bare, so that the command works in a pipe."""
    messages = [*_start(system, kept), {"role": "user", "content": text}]
    with load() as llm:
        reply = llm.chat(messages, **sampling)
        for piece in reply:
            print(piece, end="", flush=True)
    print()
    _keep(kept, [*messages, reply.message])


def converse(
    model: str,
    system: str | None,
    load: Callable[[], LLM],
    sampling: dict[str, Any],
    kept: Path | None = None,
) -> None:
    """Load a model and talk to it until the user leaves; `kept` is the conversation's file."""
    console, messages = Console(), _start(system, kept)
    with suppress(ImportError):
        import readline  # noqa: F401  arrow keys and history in input()
    with console.status(f"Loading {escape(model)} ..."):
        llm = load()
    with llm:
        console.print(
            f"[bold]{escape(llm.name)}[/bold], {llm.engine.max_context:,} tokens of context. "
            "[dim]/help lists the commands, Ctrl-D leaves.[/dim]",
            highlight=False,
        )
        for message in messages[-2:] if kept else ():
            mark = "> " if message["role"] == "user" else ""
            console.print(f"[dim]{mark}{escape(str(message['content']))}[/dim]", highlight=False)
        Conversation(console, llm, messages, sampling, kept).run()


def _start(system: str | None, kept: Path | None) -> list[Message]:
    """The messages that a conversation begins with: those of its file, if it has one."""
    start = [{"role": "system", "content": system}] if system else []
    if kept is None or not kept.exists():
        return start
    messages = read_json(kept).get("messages")
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m for m in messages
    ):
        raise InvalidRequest(f"{kept}: not a conversation; remove it, or name another session")
    return start + [m for m in messages if m["role"] != "system"] if start else messages


def _keep(kept: Path | None, messages: list[Message]) -> None:
    """Write a conversation to its file, if it has one."""
    if kept is not None:
        try:
            kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            text = json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
            write_whole(kept, text.encode(), mode=0o600)
        except OSError as error:
            raise InvalidRequest(f"{kept}: {error.strerror}") from None


@dataclass
class Conversation:
    """The loop of questions and answers, and the commands between them."""

    console: Console
    llm: LLM
    messages: list[Message]
    sampling: dict[str, Any]
    kept: Path | None = None  # the file of a session

    def run(self) -> None:
        while True:
            try:
                text = input("\n> ").strip()
            except EOFError:
                self.console.print()
                return
            except KeyboardInterrupt:
                self.console.print("\n[dim]Ctrl-D or /exit leaves.[/dim]")
                continue
            if text in ("/exit", "/quit"):
                return
            try:
                if text.startswith("/"):
                    self.command(*text.split(maxsplit=1))
                elif text:
                    self.ask(text)
            except OpenNemoError as error:  # a conversation survives a message that cannot be sent
                self.console.print(f"[red]{escape(str(error))}[/red]")

    def ask(self, text: str) -> None:
        """Send one message and print the answer as it comes."""
        question: Message = {"role": "user", "content": text}
        started = time.perf_counter()
        reply = self.llm.chat([*self.messages, question], **self.sampling)
        pieces = []
        try:
            for channel, piece in reply.pieces():
                if channel == "thinking":
                    self.console.out(piece, end="", style="dim", highlight=False)
                    continue
                if not pieces and reply.answers[0].thinking:
                    self.console.print("\n")
                pieces.append(piece)
                self.console.out(piece, end="", highlight=False)
        except KeyboardInterrupt:
            reply.cancel()
        seconds = time.perf_counter() - started
        notes = {None: ", stopped", "length": ", cut off by the length limit"}
        note = notes.get(reply.finish_reason, "")
        rate = len(reply.ids) / seconds
        self.console.print(f"\n[dim]{len(reply.ids)} tokens, {rate:.1f} a second{note}[/dim]")
        answer: Message = {"role": "assistant", "content": "".join(pieces)}
        if thinking := reply.answers[0].thinking:
            answer["reasoning_content"] = thinking
        self.messages += [question, answer]
        _keep(self.kept, self.messages)

    def command(self, name: str, argument: str = "") -> None:
        system = self.messages[:1] if self.messages and self.messages[0]["role"] == "system" else []
        if name == "/help":
            self.console.print(HELP, highlight=False, markup=False)
        elif name == "/reset":
            self.messages = system
            _keep(self.kept, system)
            self.console.print("[dim]A new conversation.[/dim]")
        elif name == "/system" and argument:
            self.messages = [{"role": "system", "content": argument}]
            _keep(self.kept, self.messages)
            self.console.print("[dim]A new conversation with this system message.[/dim]")
        elif name == "/system":
            text = system[0]["content"] if system else "There is no system message."
            self.console.print(f"[dim]{escape(str(text))}[/dim]")
        elif name == "/save":
            self.save(argument)
        else:
            raise InvalidRequest(f"there is no command {name}; /help lists them")

    def save(self, name: str) -> None:
        if not name:
            raise InvalidRequest("/save needs the name of a file")
        try:
            with Path(name).expanduser().open("x", encoding="utf-8") as file:
                file.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise InvalidRequest(f"{name}: {error.strerror}") from None
        self.console.print(f"[dim]Saved {len(self.messages)} messages to {escape(name)}.[/dim]")
