"""What a tokenizer shows in a terminal: the tokens of a text, and how far long work has come."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from opennemo.data.words import Report
from opennemo.tokenizer.tokenizer import Tokenizer

# Neighbours differ, and black letters are legible on all of them.
SHADES = ("#ffd8a8", "#b2f2bb", "#a5d8ff", "#eebefa", "#ffec99")


def show(tokenizer: Tokenizer, text: str) -> Group:
    """A text with each token in its own shade, then every token's id, text and bytes.

    What is not a whole character is shown by its bytes, a line end as ⏎.
    """
    ids = tokenizer.encode(text)
    shaded = Text()
    table = Table("id", "token", "bytes", box=None, header_style="bold")
    for i, id in enumerate(ids):
        data = tokenizer.token_bytes(id)
        shade = f"black on {SHADES[i % len(SHADES)]}"
        try:
            token = data.decode().replace("\r", "␍").replace("\n", "⏎").replace("\t", "⇥")
        except UnicodeDecodeError:
            token = f"⟨{data.hex(' ')}⟩"
        shaded.append(token, style=shade)
        if data.endswith(b"\n"):
            shaded.append("\n")
        table.add_row(str(id), Text(token, style=shade), data.hex(" "))
    n_bytes = len(text.encode("utf-8", "replace"))
    count = f"{len(ids):,} tokens, {len(text):,} characters, {n_bytes:,} bytes"
    return Group(shaded, "", table, "", Text(count, style="dim"))


@contextmanager
def progress() -> Iterator[Report]:
    """Shows what is reported: as bars in a terminal, elsewhere as a line at each tenth."""
    console = Console(stderr=True)
    if not console.is_terminal:
        said: dict[str, int] = {}

        def say(stage: str, share: float) -> None:
            tenth = 0 if math.isnan(share) else int(share * 10)
            if tenth > said.get(stage, -1):
                said[stage] = tenth
                console.print(f"{stage}: {tenth * 10} %", highlight=False)

        yield say
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
    )
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bars:
        tasks = {}

        def draw(stage: str, share: float) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=None if math.isnan(share) else 1.0)
            if not math.isnan(share):
                bars.update(tasks[stage], completed=share, total=1.0)
            bars.refresh()  # the library holds Python's lock, which stops the bars' own thread

        yield draw
