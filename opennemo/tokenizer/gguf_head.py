"""The head of a GGUF file: its metadata, and where the descriptions of its tensors begin.

One pass over the head gives a plain dict; the tensors behind it are never touched. (`GGUFReader`
of the `gguf` package makes an object of every string, which takes seconds for a vocabulary, and
does not end on a forged array length.)

Format: docs/gguf.md of ggml, versions 2 and 3, little-endian.
"""

import mmap
import re
import struct
from pathlib import Path
from typing import Any

from opennemo.errors import CheckpointError

# Types of values: those that `struct` has codes for, and the two others.
NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
LENGTH = struct.Struct("<Q")
# A file of a split model: name, number from 1, how many there are. The first has the settings.
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def read_metadata(path: Path) -> dict[str, Any]:
    """Every key of a model's head with its value: numbers, strings, and lists of these.

    Any file of a split model stands for the first.

    Raises:
        CheckpointError: the file cannot be read, is not a GGUF file, or ends too early.
    """
    if match := PART.fullmatch(path.name):
        path = path.with_name(f"{match[1]}-{1:05}-of-{match[3]}.gguf")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return read_head(Cursor(data))[0]
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (struct.error, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged or not GGUF: {error}") from error


class Cursor:
    """A place in a GGUF file that advances as values are read, and never leaves the file."""

    def __init__(self, data: mmap.mmap | memoryview):
        self.data, self.at = data, 0

    def numbers(self, code: str, n: int) -> tuple[Any, ...]:
        """The next `n` numbers of a type of `struct`; struct.error where the file ends."""
        if n > len(self.data):
            raise ValueError(f"{n:,} values are said to follow at byte {self.at:,}")
        values = struct.unpack_from(f"<{n}{code}", self.data, self.at)
        self.at += struct.calcsize(f"<{n}{code}")
        return values

    def number(self, code: str) -> Any:
        return self.numbers(code, 1)[0]

    def texts(self, n: int) -> list[str]:
        """The next `n` strings, of which a vocabulary has hundreds of thousands."""
        data, at, size, texts = self.data, self.at, len(self.data), []
        for _ in range(n):
            (length,) = LENGTH.unpack_from(data, at)
            end = at + 8 + length
            if end > size:
                raise ValueError(f"a string of {length:,} bytes is said to follow at byte {at:,}")
            texts.append(str(data[at + 8 : end], "utf-8"))
            at = end
        self.at = at
        return texts

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.texts(1)[0]
        if kind == ARRAY:
            kind, n = self.number("I"), self.number("Q")
            if kind == STRING:
                return self.texts(n)
            if kind in NUMBERS:
                return list(self.numbers(NUMBERS[kind], n))
            return [self.value(kind) for _ in range(n)]
        if kind not in NUMBERS:
            raise ValueError(f"{kind} is not a type of a value")
        return self.number(NUMBERS[kind])


def read_head(cursor: Cursor) -> tuple[dict[str, Any], int]:
    """The metadata, and how many tensors are described where it ends."""
    (magic,) = cursor.numbers("s", 4)
    version, n_tensors, n_keys = (cursor.number(code) for code in "IQQ")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"it begins with {magic!r}, version {version}, not GGUF of version 2 or 3")
    keys = (cursor.texts(1)[0] for _ in range(n_keys))
    return {key: cursor.value(cursor.number("I")) for key in keys}, n_tensors
