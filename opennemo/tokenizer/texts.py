"""Texts of files and folders as one stream, each with its language: what vocabularies learn from.

One idea makes it simple: a file is lines of bytes, whatever it is packed in, and never more than
one line (of a text file: a few) is held at a time. Lines that cannot be read are counted, not
fatal. It does not know what the texts are for.
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from opennemo.errors import InvalidRequest

try:
    import zstandard
except ImportError:
    zstandard = None

DAMAGED = (gzip.BadGzipFile, zlib.error, EOFError, *([zstandard.ZstdError] if zstandard else ()))
JSON_LINES, PLAIN = (".jsonl", ".ndjson"), (".txt", ".text", ".md")
PACKED = (".gz", ".zst")
LANGUAGE_KEYS = ("language", "lang", "iso")
MAX_LINE = 64 << 20  # bytes; a longer line is taken for several
PLAIN_CHUNK = 1 << 20  # bytes of a text file that are one text


class Texts:
    """(language, text) of every text of some files, in the same order each time.

    The language of a JSON line is its `language`, `lang` or `iso`, and otherwise, as for text
    files, the file's name up to the first dot (`fr.jsonl.gz` -> "fr"). Of a folder all files of
    a known type count, in order of their names.

    Attributes:
        files: what is read, in order; `n_bytes` is their size on disk.
        n_broken: lines left out by the last pass: not UTF-8, or not JSON with a string "text".

    Raises:
        InvalidRequest: a path does not exist or is of no known type, or a file is damaged.
    """

    def __init__(self, paths: Sequence[Path]):
        self.files = [file for path in paths for file in _files(path)]
        self.n_bytes = sum(file.stat().st_size for file in self.files)
        self.n_broken = 0

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return self.read(lambda n_bytes: None)

    def read(self, report: Callable[[int], None]) -> Iterator[tuple[str, str]]:
        """Go through the texts; `report` hears how many bytes of the files have been read."""
        self.n_broken, before = 0, 0
        for file in self.files:
            name = file.name.partition(".")[0]
            with _open(file) as (raw, lines):
                texts = self._json(lines) if _kind(file) in JSON_LINES else self._plain(lines)
                for language, text in texts:
                    report(before + raw.tell())
                    if text:
                        yield language or name, text
            before += file.stat().st_size

    def _json(self, lines: Iterator[bytes]) -> Iterator[tuple[str, str]]:
        for line in lines:
            if line.isspace():
                continue
            try:
                row = json.loads(line.decode())
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                self.n_broken += 1
                continue
            named = (row[key] for key in LANGUAGE_KEYS if isinstance(row.get(key), str))
            yield next(named, ""), row["text"]

    def _plain(self, lines: Iterator[bytes]) -> Iterator[tuple[str, str]]:
        chunk, size = [], 0
        for line in lines:
            try:
                chunk.append(line.decode())
            except UnicodeDecodeError:
                self.n_broken += 1
            size += len(line)
            if size >= PLAIN_CHUNK:
                yield "", "".join(chunk)
                chunk, size = [], 0
        yield "", "".join(chunk)


def _kind(file: Path) -> str:
    suffixes = [s for s in file.suffixes if s not in PACKED]
    return suffixes[-1] if suffixes else ""


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.is_file() and _kind(f) in JSON_LINES + PLAIN)
        if not files:
            raise InvalidRequest(f"{path}: no {', '.join(JSON_LINES + PLAIN)} file in this folder")
        return files
    if not path.is_file():
        raise InvalidRequest(f"{path}: no such file or folder")
    if _kind(path) not in JSON_LINES + PLAIN:
        known = ", ".join(JSON_LINES + PLAIN)
        raise InvalidRequest(f"{path}: not a known type of text ({known}, also as .gz or .zst)")
    return [path]


@contextmanager
def _open(file: Path) -> Iterator[tuple[IO[bytes], Iterator[bytes]]]:
    """The file as it lies on the disk, and the lines in it."""
    with file.open("rb") as raw:
        try:
            unpacked = _unpacked(file, raw)
            yield raw, iter(lambda: unpacked.readline(MAX_LINE), b"")
        except DAMAGED as error:
            raise InvalidRequest(f"{file}: damaged ({error})") from error


def _unpacked(file: Path, raw: IO[bytes]) -> IO[bytes]:
    if file.suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))  # pyright: ignore[reportArgumentType]
    if file.suffix == ".zst":
        if zstandard is None:
            raise InvalidRequest(f"{file}: reading .zst needs zstandard (pip install zstandard)")
        unpacker = zstandard.ZstdDecompressor()
        return io.BufferedReader(unpacker.stream_reader(raw, read_across_frames=True))
    return raw
