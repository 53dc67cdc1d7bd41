"""The tokens of a text in colours, for a terminal."""

from rich.console import Group
from rich.table import Table
from rich.text import Text

from opennemo.progress import count
from opennemo.tokenizer.tokenizer import Tokenizer

# Neighbours differ, and black letters are legible on all of them.
SHADES = ("#ffd8a8", "#b2f2bb", "#a5d8ff", "#eebefa", "#ffec99")


def show(tokenizer: Tokenizer, text: str) -> Group:
    """A text with each token in its own shade, then every token's id, text and bytes.

    What is not a whole character is shown by its bytes, a line end as ⏎. Superwords, which are
    tokens of several words, are underlined and counted.
    """
    ids = tokenizer.encode(text)
    shaded = Text()
    table = Table("id", "token", "bytes", box=None, header_style="bold")
    n_superwords = 0
    for i, id in enumerate(ids):
        data = tokenizer.token_bytes(id)
        shade = f"black on {SHADES[i % len(SHADES)]}"
        if len(data.split()) > 1:
            shade, n_superwords = f"{shade} underline", n_superwords + 1
        try:
            token = data.decode().replace("\r", "␍").replace("\n", "⏎").replace("\t", "⇥")
        except UnicodeDecodeError:
            token = f"⟨{data.hex(' ')}⟩"
        shaded.append(token, style=shade)
        if data.endswith(b"\n"):
            shaded.append("\n")
        table.add_row(str(id), Text(token, style=shade), data.hex(" "))
    n_bytes = len(text.encode("utf-8", "replace"))
    summary = ", ".join(map(count, (len(ids), len(text), n_bytes), ("token", "character", "byte")))
    if n_superwords or tokenizer.has_superwords:
        summary += f"; {count(n_superwords, 'superword')} among the tokens"
    return Group(shaded, "", table, "", Text(summary, style="dim"))
