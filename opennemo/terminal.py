"""A conversation in the terminal: words as they come; Ctrl-C stops the answer, not the program."""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape

from opennemo.engine import SamplingParams
from opennemo.errors import InvalidRequest, OpenNemoError
from opennemo.files import read_json, write_whole
from opennemo.llm import LLM
from opennemo.progress import count
from opennemo.tokenizer.chat import Message

HELP = """\
/reset             begin a new conversation
/system TEXT       set the system message, and begin again; without TEXT, show it
/set NAME VALUE    a setting of sampling, such as temperature 0.7; without VALUE, the model's own
                   again; without both, show what is set
/format FORM       json, or a file with a JSON schema, which answers follow; text for none
/adapter FOLDER    answer with this LoRA adapter; off for the model itself
/save FILE         write the conversation as one line of JSON, ready for fine-tuning
/exit              leave, as Ctrl-D does; Ctrl-C stops an answer
A text of several lines is pasted, or written between two \"\"\"."""
QUOTES = '"""'
# Settings of /set: the numbers among SamplingParams that change an answer.
SETTINGS = {
    one.name: int if one.type in (int, int | None) else float
    for one in fields(SamplingParams)
    if one.type in (int, float, int | None) and "logprobs" not in one.name
}
# A word ends at a blank, or is one character of a script that has no blanks.
WIDE = r"\u2e80-\u9fff\uac00-\ud7a3\uff00-\uff60"
PARTS = re.compile(rf"\n|[^\S\n]+|[{WIDE}]|[^\s{WIDE}]+")
Load = Callable[..., LLM]  # `adapters=True` makes room for some


def answer(
    text: str, system: str | None, load: Load, sampling: Any, kept: Path | None = None,
    adapter: Path | None = None,
) -> None:  # fmt: skip
    """Answer one message on standard output, as plain text, so that the command works in a pipe."""
    messages = [*_start(system, kept), {"role": "user", "content": text}]
    with load(adapters=adapter is not None) as llm:
        if adapter is not None:
            llm.load_adapter("own", adapter)
        reply = llm.chat(messages, adapter=adapter and "own", **sampling)
        for piece in reply:
            print(piece, end="", flush=True)
    print()
    _keep(kept, [*messages, reply.message])


def converse(
    model: str,
    system: str | None,
    load: Load,
    sampling: dict[str, Any],
    kept: Path | None = None,
    adapter: Path | None = None,
) -> None:
    """Load a model and talk to it until the user leaves; `kept` is the conversation's file."""
    console, messages = Console(), _start(system, kept)
    with suppress(ImportError):
        import readline  # arrow keys and history in input()

        readline.parse_and_bind("set enable-bracketed-paste on")  # a paste is one message
    with console.status(f"Loading {escape(model)} ..."):
        llm = load(adapters=adapter is not None)
    has_room = adapter is not None
    with Conversation(console, llm, load, messages, sampling, kept, has_room=has_room) as talk:
        console.print(
            f"[bold]{escape(llm.name)}[/bold], {llm.engine.max_context:,} tokens of context. "
            "[dim]/help lists the commands, Ctrl-D leaves.[/dim]",
            highlight=False,
        )
        for message in messages[-2:] if kept else ():
            mark = "> " if message["role"] == "user" else ""
            console.print(f"[dim]{mark}{escape(str(message['content']))}[/dim]", highlight=False)
        if adapter is not None:
            talk.set_adapter(str(adapter))
        talk.run()


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
    load: Load
    messages: list[Message]
    sampling: dict[str, Any]
    kept: Path | None = None  # the file of a session
    asked: dict[str, Any] = field(default_factory=dict)  # of the answer's form and its adapter
    has_room: bool = False  # for adapters

    def __enter__(self) -> "Conversation":
        return self

    def __exit__(self, *_: object) -> None:
        self.llm.close()

    def run(self) -> None:
        while True:
            try:
                text = _read()
                if text in ("/exit", "/quit"):
                    return
                if text.startswith("/"):
                    self.command(*text.split(maxsplit=1))
                elif text:
                    self.ask(text)
            except EOFError:
                self.console.print()
                return
            except KeyboardInterrupt:  # at the prompt, or between an answer and the prompt
                self.console.print("\n[dim]Ctrl-D or /exit leaves.[/dim]")
            except OpenNemoError as error:  # a conversation survives a message that cannot be sent
                self.console.print(f"[red]{escape(str(error))}[/red]", highlight=False)

    def ask(self, text: str) -> None:
        """Send one message and print the answer as it comes."""
        question: Message = {"role": "user", "content": text}
        started = time.perf_counter()
        reply = self.llm.chat([*self.messages, question], **self.sampling, **self.asked)
        pieces, lines = [], Lines(self.console)
        with _unechoed():
            try:
                for channel, piece in reply.pieces():
                    if channel == "thinking":
                        lines.write(piece, "dim")
                        continue
                    if not pieces and reply.answers[0].thinking:
                        lines.write("\n\n")
                    pieces.append(piece)
                    lines.write(piece)
            except KeyboardInterrupt:
                reply.cancel()
            lines.flush()
        seconds = time.perf_counter() - started
        notes = {
            None: ", stopped", "length": ", cut off by the length limit",
            "repetition": ", cut off as it repeated itself",
        }  # fmt: skip
        note = notes.get(reply.finish_reason, "")
        rate = len(reply.ids) / seconds
        self.console.print(
            f"\n[dim]{count(len(reply.ids), 'token')}, {rate:.1f} a second{note}[/dim]"
        )
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
        elif name == "/set":
            self.set(*argument.split(maxsplit=1))
        elif name == "/format":
            self.set_format(argument)
        elif name == "/adapter":
            self.set_adapter(argument)
        elif name == "/save":
            self.save(argument)
        else:
            raise InvalidRequest(f"there is no command {name}; /help lists them")

    def set(self, name: str = "", value: str = "") -> None:
        """Change a setting of sampling, or show what is set."""
        if name and name not in SETTINGS:
            raise InvalidRequest(f"/set {name}: allowed are {', '.join(SETTINGS)}")
        if value:
            try:
                number = SETTINGS[name](value)
            except ValueError:
                kind = "a whole number" if SETTINGS[name] is int else "a number"
                raise InvalidRequest(f"/set {name} {value}: not {kind}") from None
            replace(self.llm.defaults, **{name: number})  # checks its bounds
            self.sampling[name] = number
        elif name:
            self.sampling.pop(name, None)
        shown = ", ".join(f"{name} {value}" for name, value in self.sampling.items())
        self.console.print(f"[dim]{shown or 'all as the model has it'}[/dim]", highlight=False)

    def set_format(self, form: str) -> None:
        """What answers follow: any JSON object, a schema, or nothing."""
        if form in ("", "text"):
            self.asked.pop("format", None)
            self.console.print("[dim]Answers are free text.[/dim]")
            return
        format = ("json_object", "")
        if form != "json":
            try:
                format = ("json_schema", Path(form).expanduser().read_text("utf-8"))
            except (OSError, UnicodeDecodeError) as error:
                why = error.strerror if isinstance(error, OSError) else "not UTF-8"
                raise InvalidRequest(
                    f"/format {form}: {why}; allowed are json, text and files of a JSON schema"
                ) from None
        self.llm.grammars.compile(*format)
        self.asked["format"] = format
        what = "are JSON" if form == "json" else f"follow {form}"
        self.console.print(f"[dim]Answers {escape(what)}.[/dim]", highlight=False)

    def set_adapter(self, folder: str) -> None:
        """Answer with an adapter from now on; the first one reloads the model, with room."""
        if folder in ("", "off"):
            self.asked.pop("adapter", None)
            self.console.print("[dim]The model answers by itself.[/dim]")
            return
        path = Path(folder).expanduser()
        name = str(path.resolve())
        if not (path / "adapter_config.json").is_file():
            raise InvalidRequest(f"/adapter {folder}: no folder of an adapter")
        if not self.has_room:
            with self.console.status("Loading the model with room for adapters ..."):
                self.llm.close()  # there may not be enough memory for two
                try:
                    self.llm, self.has_room = self.load(adapters=True), True
                except OpenNemoError:
                    self.llm = self.load()
                    raise
        if name not in self.llm.engine.adapters:
            self.llm.load_adapter(name, path)
        self.asked["adapter"] = name
        self.console.print(f"[dim]Answers come with {escape(folder)}.[/dim]", highlight=False)

    def save(self, name: str) -> None:
        if not name:
            raise InvalidRequest("/save needs the name of a file")
        try:
            with Path(name).expanduser().open("x", encoding="utf-8") as file:
                file.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise InvalidRequest(f"{name}: {error.strerror}") from None
        self.console.print(
            f"[dim]Saved {count(len(self.messages), 'message')} to {escape(name)}.[/dim]"
        )


class Lines:
    """Writes text as it comes, and begins a new line before a word that would be cut in two."""

    def __init__(self, console: Console):
        self._console, self._column = console, 0
        self._blank = self._word = self._style = ""  # text held back until its word is whole

    def write(self, text: str, style: str = "") -> None:
        if not self._console.is_terminal:
            self._console.out(text, end="", highlight=False)
            return
        if style != self._style:
            self.flush()
            self._style = style
        for part in PARTS.findall(text):
            wide = cell_len(part[0]) > 1
            if part.isspace() or wide:
                self.flush()
            if part == "\n":
                self._out("\n")
            elif part.isspace():
                self._blank += part
            else:
                self._word += part
            if wide or cell_len(self._word) >= self._console.width:
                self.flush()

    def flush(self) -> None:
        """Write what is held back."""
        if not self._word:
            return
        width, text = self._console.width, self._blank + self._word
        if self._column and self._column + cell_len(text) > width:
            self._out("\n")
            text = self._word
        self._out(text)
        self._blank = self._word = ""

    def _out(self, text: str) -> None:
        self._console.out(text, end="", style=self._style or None, highlight=False)
        if text == "\n":
            self._column, self._blank = 0, ""
        else:
            self._column = (self._column + cell_len(text)) % self._console.width


def _read() -> str:
    """A message: a line, a paste of several, or lines between triple quotes."""
    text = input("\n> ").strip()
    if text.startswith(QUOTES):
        text = text.removeprefix(QUOTES)
        while not text.rstrip().endswith(QUOTES):
            text += "\n" + input(". ")
        text = text.rstrip().removesuffix(QUOTES).strip()
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


@contextmanager
def _unechoed() -> Iterator[None]:
    """Keys that are pressed meanwhile wait for the next prompt, and are not shown."""
    if not sys.stdin.isatty() or sys.platform == "win32":
        yield
        return
    import termios

    before = termios.tcgetattr(sys.stdin)
    quiet = before.copy()
    quiet[3] = quiet[3] & ~termios.ECHO | termios.NOFLSH  # Ctrl-C keeps what was typed before
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
