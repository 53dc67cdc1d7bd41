"""`opennemo chat` and `generate` without a terminal."""

import json
import os

from tests import tiny
from tests.cli.conftest import needs_smollm2, opennemo


@needs_smollm2
def test_chat_without_a_terminal_answers_once():
    done = opennemo("chat", "--temperature", "0", input=b"Say hello.\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and b"\x1b" not in done.stdout


@needs_smollm2
def test_a_session_goes_on_where_it_was_and_is_private(tmp_path):
    env = os.environ | {
        "XDG_STATE_HOME": str(tmp_path / "state"), "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }  # fmt: skip
    chat = ("chat", "--session", "notes", "--max-tokens", "12", "--temperature", "0")
    for question in (b"What is the capital of France?", b"And of Spain?"):
        done = opennemo(*chat, input=question, env=env)
        assert done.returncode == 0, done.stderr
    file = tmp_path / "state" / "opennemo" / "sessions" / "notes.json"
    messages = json.loads(file.read_text())["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2
    assert messages[2]["content"] == "And of Spain?" and messages[3]["content"]
    assert file.stat().st_mode & 0o777 == 0o600
    assert list((tmp_path / "cache" / "opennemo" / "prefixes").glob("*.kv"))
    for damage in ("{", '{"messages": [1]}', "{}"):
        file.write_text(damage)
        done = opennemo(*chat, input=b"Hi", env=env)
        assert done.returncode == 2 and b"notes.json" in done.stderr
        assert done.stderr.count(b"\n") == 1 and file.read_text() == damage
    done = opennemo("chat", "--session", "../x", input=b"Hi", env=env)
    assert done.returncode == 2 and b"--session" in done.stderr


def test_an_answer_that_only_repeats_itself_ends(tmp_path):
    (a,) = tiny.BYTES.encode("a")
    tiny.write_tokenizer(tmp_path, {})
    tiny.write(tmp_path, tiny.weights(tiny.BYTES.vocab_size, [(a, a)]))
    for more, expected in ((["--stop-repeats", "5"], 5), ([], 30)):
        done = opennemo("generate", str(tmp_path), "a", "--max-tokens", "30", *more)
        assert done.returncode == 0, done.stderr
        assert done.stdout == b"a" * expected + b"\n"
    done = opennemo("generate", str(tmp_path), "a", "--stop-repeats", "1")
    assert done.returncode == 2 and b"--stop-repeats" in done.stderr


def test_an_answer_without_a_word_is_explained(tmp_path):
    (a, b) = tiny.BYTES.encode("ab")
    tiny.write_tokenizer(tmp_path, {})
    tiny.write(tmp_path, tiny.weights(tiny.BYTES.vocab_size, [(a, tiny.BYTES.eos_id), (b, a)]))
    done = opennemo("generate", str(tmp_path), "a")
    assert (done.returncode, done.stdout) == (0, b"\n")
    assert done.stderr.startswith(b"opennemo: the model ended at once") and b"chat" in done.stderr
    done = opennemo("generate", str(tmp_path), "b", "--stop", "a")
    assert (done.stdout, done.stderr) == (b"\n", b"opennemo: the answer began with 'a'\n")
    done = opennemo("generate", str(tmp_path), "b")
    assert (done.stdout, done.stderr) == (b"a\n", b"")
