"""Long work shows a bar in a terminal and prints lines elsewhere; both say the same."""

import os
import pty
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from opennemo.progress import clock, count, progress, size, stages

ROOT = Path(__file__).parent.parent


def test_a_line_is_printed_at_each_tenth(capsys: pytest.CaptureFixture[str]):
    with progress("Counting", 1000) as bar:
        for _ in range(1000):
            bar.advance()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("Counting: 100 of 1,000, ")
    assert lines[-1].startswith("Counting: 1,000 of 1,000, ")


def test_bytes_are_a_share_of_the_whole(capsys: pytest.CaptureFixture[str]):
    with progress("Converting", unit="bytes") as bar:
        bar.update(3 << 30, 6 << 30, note="fast")
    assert capsys.readouterr().err.startswith("Converting: 50 % of 6.0 GiB, fast, ")


def test_work_that_goes_on_starts_where_it_was(capsys: pytest.CaptureFixture[str]):
    with progress("Answering", 10, done=9) as bar:
        bar.advance()
    assert capsys.readouterr().err.startswith("Answering: 10 of 10, ")


def test_stages_follow_each_other(capsys: pytest.CaptureFixture[str]):
    with stages("share") as report:
        report("reading", 1, 2)
        report("merging", 2, 2)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines] == ["reading: 50 %", "merging: 100 %"]


def test_quiet_work_prints_nothing(capsys: pytest.CaptureFixture[str]):
    with progress("Counting", 10, quiet=True) as bar:
        bar.advance(10)
    assert capsys.readouterr().err == ""


def test_a_terminal_shows_a_bar():
    program = textwrap.dedent("""
        import time
        from opennemo.progress import count, progress
        with progress("Counting", 3) as bar:
            for _ in range(3):
                bar.advance(note="quickly")
                time.sleep(0.15)
    """)
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    subprocess.run([sys.executable, "-c", program], stderr=theirs, cwd=ROOT, env=environment)
    os.close(theirs)
    screen = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "Counting" in screen and "of 3" in screen and "quickly" in screen and "━" in screen


@pytest.mark.parametrize(
    ("seconds", "text"), [(12.4, "12 s"), (3600, "1:00:00"), (75, "0:01:15"), (float("inf"), "?")]
)
def test_time_is_readable(seconds: float, text: str):
    assert clock(seconds) == text


def test_numbers_of_things_are_readable():
    assert [count(n, "bad line") for n in (0, 1, 2000)] == [
        "0 bad lines",
        "1 bad line",
        "2,000 bad lines",
    ]


def test_sizes_are_readable():
    assert [size(n) for n in (0, 2048, 5 << 20, 3 << 29)] == ["0 B", "2 KiB", "5 MiB", "1.5 GiB"]
