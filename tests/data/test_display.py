"""A text is shown token by token."""

import io

from rich.console import Console

from opennemo.data.display import show
from opennemo.tokenizer.patterns import PATTERNS, SUPERWORDS
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


def test_superwords_are_counted_and_underlined():
    tokens = [*SINGLE_BYTES, b"of", b" of", b"th", b"the", b" the", b" of the"]
    words = Tekken(SUPERWORDS["tekken"], tokens)
    console = Console(width=80, record=True, file=io.StringIO(), force_terminal=True)
    console.print(show(words, "x of the"))
    assert "2 tokens, 8 characters, 8 bytes; 1 superword among the tokens" in console.export_text(
        clear=False
    )
    assert "underline" in console.export_html()
