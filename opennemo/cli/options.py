"""What commands do with what they are given."""

import sys
from typing import Any

from opennemo.errors import InvalidRequest


def given(**options: Any) -> dict[str, Any]:
    """The options that were given; the rest is left to the model's defaults."""
    return {name: value for name, value in options.items() if value is not None}


def standard_input() -> str:
    """All of standard input, as one text.

    Raises:
        InvalidRequest: it is not UTF-8, or there is nothing.
    """
    try:
        text = sys.stdin.buffer.read().decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"standard input is not UTF-8 text (byte {error.start})") from None
    if not text:
        raise InvalidRequest("standard input is empty: write a text to it")
    return text
