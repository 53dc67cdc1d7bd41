"""A text is shown token by token."""

import io

from rich.console import Console

from opennemo.data.display import show
from opennemo.tokenizer.patterns import PATTERNS
from opennemo.tokenizer.tekken import SINGLE_BYTES, Tekken


def test_showing_a_text_names_ids_and_bytes():
    english = Tekken(PATTERNS["tekken"], [*SINGLE_BYTES, b"th", b"the", b" the", "τ".encode()])
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(show(english, "the τό\n[bold]"))
    shown = console.export_text()
    assert shown.splitlines()[:2] == ["the τ⟨cf⟩⟨8c⟩⏎", "[bold]"]
    assert "1257" in shown  # the id of "the"
    assert "74 68 65" in shown  # its bytes
    assert "characters, 15 bytes" in shown
