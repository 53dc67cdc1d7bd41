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
from opennemo.llm import LLM
from opennemo.tokenizer.chat import Message

HELP = """\
/reset        begin a new conversation
/system TEXT  set the system message, and begin anew; without TEXT, show it
/save FILE    write the conversation as one line of JSON, ready for fine-tuning
/exit         leave, as Ctrl-D does; Ctrl-C stops an answer"""


def answer(text: str, system: str | None, load: Callable[[], LLM], sampling: Any) -> None:
    """Answer one message on standard output, bare, so that the command works in a pipe."""
    with load() as llm:
        for piece in llm.chat([*_start(system), {"role": "user", "content": text}], **sampling):
            print(piece, end="", flush=True)
    print()


def converse(
    model: str, system: str | None, load: Callable[[], LLM], sampling: dict[str, Any]
) -> None:
    """Load a model and talk to it until the user leaves."""
    console = Console()
    with suppress(ImportError):
        import readline  # noqa: F401  arrow keys and history in input()
    with console.status(f"Loading {escape(model)} ..."):
        llm = load()
    with llm:
        console.print(
            f"[bold]{escape(llm.name)}[/bold], {llm.engine.max_context:,} tokens of context. "
            "[dim]/help tells what else there is, Ctrl-D leaves.[/dim]",
            highlight=False,
        )
        Conversation(console, llm, _start(system), sampling).run()


def _start(system: str | None) -> list[Message]:
    return [{"role": "system", "content": system}] if system else []


@dataclass
class Conversation:
    """The loop of questions and answers, and the commands between them."""

    console: Console
    llm: LLM
    messages: list[Message]
    sampling: dict[str, Any]

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
            for piece in reply:
                pieces.append(piece)
                self.console.out(piece, end="", highlight=False)
        except KeyboardInterrupt:
            reply.cancel()
        seconds = time.perf_counter() - started
        notes = {None: ", stopped", "length": ", cut off by the length limit"}
        note = notes.get(reply.finish_reason, "")
        rate = len(reply.ids) / seconds
        self.console.print(f"\n[dim]{len(reply.ids)} tokens, {rate:.1f} a second{note}[/dim]")
        self.messages += [question, {"role": "assistant", "content": "".join(pieces)}]

    def command(self, name: str, argument: str = "") -> None:
        system = self.messages[:1] if self.messages and self.messages[0]["role"] == "system" else []
        if name == "/help":
            self.console.print(HELP, highlight=False, markup=False)
        elif name == "/reset":
            self.messages = system
            self.console.print("[dim]A new conversation.[/dim]")
        elif name == "/system" and argument:
            self.messages = [{"role": "system", "content": argument}]
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
