"""`opennemo chat` and `generate` without a terminal."""

from tests.cli.conftest import needs_smollm2, opennemo


@needs_smollm2
def test_chat_without_a_terminal_answers_once():
    done = opennemo("chat", "--temperature", "0", input=b"Say hello.\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and b"\x1b" not in done.stdout
