"""Progress of long work: a bar in a terminal, plain lines elsewhere.

Work reports how much is done, and of how much; this module decides how to show it. Everything goes
to standard error. Where that is not a terminal, it prints a line at each tenth, or every so many
seconds where the tenths of a long run are too far apart.
"""

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

Progress = Callable[[int, int], None]  # the callback of work: how much is done, and of how much
Stages = Callable[[str, int, int], None]  # the same with the name of the stage first
Unit = Literal["items", "bytes", "share"]


class Bar:
    """One piece of work on display. Safe to use from many threads.

    Args:
        what: its name, as a person reads it.
        total: how much there is to do; 0 if that is not known yet.
        done: how much was done before, by an earlier run.
        unit: what the numbers count; a share is shown as per cent.
        seconds: between two lines where there is no terminal; None: a line at each tenth.
    """

    def __init__(
        self,
        bars: Any,  # rich.progress.Progress
        what: str,
        total: int = 0,
        done: int = 0,
        unit: Unit = "items",
        seconds: float | None = None,
    ):
        self._bars, self._what, self._seconds = bars, what, seconds
        self._unit: Unit = unit
        self._total, self._done, self._first = total, done, done
        self._began = self._said_at = time.monotonic()
        self._tenth = 10 * done // total if total else -1
        self._lock = threading.Lock()
        self._task = bars.add_task(what, total=total or None, completed=done, amount="", note="")
        self._console = bars.console

    def update(self, done: int, total: int | None = None, note: str = "") -> None:
        """Set what is done, and what there is to do if that has changed."""
        with self._lock:
            self._show(done, total, note)

    def advance(self, n: int = 1, note: str = "") -> None:
        """Add to what is done."""
        with self._lock:
            self._show(self._done + n, None, note)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, markup=False, highlight=False)

    def _show(self, done: int, total: int | None, note: str) -> None:
        self._done, self._total = done, self._total if total is None else total
        if not self._bars.disable:
            self._bars.update(
                self._task, completed=done, total=self._total or None, note=note,
                amount=_amount(done, self._total, self._unit),
            )  # fmt: skip
            if self._unit == "share":
                self._bars.refresh()  # native code holds Python's lock, which stops rich's thread
            return
        now, tenth = time.monotonic(), 10 * done // self._total if self._total else 0
        if self._seconds is None:
            due = tenth > self._tenth
        else:
            due = now - self._said_at >= self._seconds or done == self._total > 0
        if due:
            self._tenth, self._said_at = tenth, now
            left = (now - self._began) / max(1, done - self._first) * (self._total - done)
            parts = [_amount(done, self._total, self._unit), note, f"{clock(left)} left"]
            self.say(f"{self._what}: {', '.join(part for part in parts if part)}")


@contextmanager
def progress(
    what: str,
    total: int = 0,
    *,
    done: int = 0,
    unit: Unit = "items",
    seconds: float | None = None,
    quiet: bool = False,
) -> Iterator[Bar]:
    """Show one piece of work while the block runs; the arguments are those of `Bar`."""
    with _bars(quiet) as bars:
        yield Bar(bars, what, total, done, unit, seconds)


@contextmanager
def stages(unit: Unit = "items") -> Iterator[Stages]:
    """Show work of several stages: each gets a bar of its own when it is first reported."""
    with _bars(quiet=False) as bars:
        shown: dict[str, Bar] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in shown:
                shown[stage] = Bar(bars, stage, total, 0, unit)
            shown[stage].update(done, total)

        yield report


def clock(seconds: float) -> str:
    """Seconds as a person reads them: `12 s`, or hours, minutes and seconds."""
    if not math.isfinite(seconds) or seconds < 60:
        return f"{max(0, seconds):.0f} s" if math.isfinite(seconds) else "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def count(n: int, what: str) -> str:
    """A number of things: `1 line`, `2,000 lines`."""
    return f"{n:,} {what}{'s' * (n != 1)}"


def size(n_bytes: float) -> str:
    """Bytes as a person reads them, in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} GiB"


def _amount(done: int, total: int, unit: Unit) -> str:
    if not total:
        return f"{done:,}" if unit == "items" else ""
    if unit == "items":
        return f"{done:,} of {total:,}"
    return f"{100 * done // total} %" + (f" of {size(total)}" if unit == "bytes" else "")


@contextmanager
def _bars(quiet: bool) -> Iterator[Any]:
    """Rich's display, which draws nothing where standard error is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True, quiet=quiet)
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(bar_width=24),
        TextColumn("{task.fields[amount]}", markup=False),
        TextColumn("{task.fields[note]}", markup=False), TimeRemainingColumn(),
    )  # fmt: skip
    hidden = quiet or not console.is_terminal
    with Bars(*columns, console=console, disable=hidden, transient=True) as bars:
        yield bars
