"""Texts of files and folders as one stream, each with its language, for models to learn from.

A file is lines of bytes, however it is packed and wherever it lies, and whole lines can be passed
to another process as an `Excerpt`, which can be read there. Only one excerpt is held at a time.
Lines that cannot be read are counted, not fatal. It does not know what the texts are for.
"""

import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from opennemo.errors import InvalidRequest

try:
    import zstandard
except ImportError:
    zstandard = None

DAMAGED = (gzip.BadGzipFile, zlib.error, EOFError, *([zstandard.ZstdError] if zstandard else ()))
JSON_LINES, PLAIN, PARQUET = (".jsonl", ".ndjson"), (".txt", ".text", ".md"), (".parquet",)
KINDS = JSON_LINES + PLAIN + PARQUET
PACKED = (".gz", ".zst")
LANGUAGE_KEYS = ("language", "lang", "iso")
LICENCE_KEYS = ("licence", "license")
MAX_LINE = 64 << 20  # bytes; a longer line counts as several
CODE = "code"  # what the language of source code begins with, which has one layout
LAYOUTS = ("document", "paragraph", "sentence")
PARAGRAPH_END = re.compile(r"\r?\n\s*\n")
SENTENCE_END = re.compile(
    r"\s*[\r\n]\s*|(?<=[.!?\u2026\u061f\u0964])\s+|(?<=[\u3002\uff01\uff1f])\s*"
)
EXCERPT = 1 << 20  # bytes of an excerpt; so much of a text file is one text


@dataclass(frozen=True)
class Text:
    """One text, and what its file says about it; "" where it says nothing."""

    text: str
    language: str = ""
    source: str = ""
    licence: str = ""


@dataclass(frozen=True)
class Excerpt:
    """Some whole lines of a file, or of a Parquet file a row group, which stays in the file."""

    file: str
    data: bytes = b""
    row_group: int = -1

    def texts(self) -> Iterator[Text | None]:
        """The texts in it; None for a line that is not UTF-8, or no JSON with a string "text"."""
        kind = _kind(self.file)
        if kind in PARQUET:
            with _parquet(self.file) as table:
                names = {"text", "source", *LANGUAGE_KEYS, *LICENCE_KEYS}
                columns = [name for name in table.schema_arrow.names if name in names]
                rows = table.read_row_group(self.row_group, columns).to_pylist()
            yield from map(_text, rows)
        elif kind in JSON_LINES:
            lines = (line for line in io.BytesIO(self.data) if not line.isspace())
            yield from map(_text, map(_row, lines))
        else:
            lines = [_line(line) for line in io.BytesIO(self.data)]
            yield from (None for line in lines if line is None)
            yield Text("".join(line for line in lines if line))


class Texts:
    """(language, text) of every text of some files, in the same order each time.

    Files are JSON lines, text, or Parquet with a column "text", on this machine or at a URL that
    fsspec knows. The language of a JSON line or a row is its `language`, `lang` or `iso`, and
    otherwise, as for text files, the file's name up to the first dot (`fr.jsonl.gz` -> "fr"). From
    a folder all files of a known type are read, in order of their names.

    Attributes:
        files: what is read, in order; `sizes` are theirs on disk, `n_bytes` is the sum.
        n_broken: lines left out by the last pass: not UTF-8, or not JSON with a string "text".

    Raises:
        InvalidRequest: a path does not exist or is of no known type, or a file is damaged.
    """

    def __init__(self, paths: Sequence[Path | str]):
        files = [file for path in paths for file in _files(path)]
        self.files = [file for file, _ in files]
        self.sizes = [size for _, size in files]
        self.n_bytes = sum(self.sizes)
        self.n_broken = 0

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return self.read(lambda n_bytes: None)

    def read(self, report: Callable[[int], None]) -> Iterator[tuple[str, str]]:
        """Go through the texts; `report` is called with the bytes of the files read so far."""
        self.n_broken, before = 0, 0
        for file, size in zip(self.files, self.sizes, strict=True):
            name = name_of(file)
            for excerpt, n_read in excerpts(file):
                for text in excerpt.texts():
                    self.n_broken += text is None
                    if text and text.text:
                        yield text.language or name, text.text
                report(before + n_read)
            before += size


def lay_out(text: str, layout: str) -> list[str]:
    """A text in one of the `LAYOUTS`: as it is, paragraph by paragraph, or sentence by sentence.

    Lines of a paragraph are joined by spaces. A sentence ends at a line break, or at a mark such as
    "." and the space that follows it.
    """
    if layout == "document":
        return [text]
    if layout == "paragraph":
        return [" ".join(p.split()) for p in PARAGRAPH_END.split(text) if not p.isspace() and p]
    return [sentence for sentence in SENTENCE_END.split(text) if sentence]


def excerpts(file: Path | str) -> Iterator[tuple[Excerpt, int]]:
    """The excerpts of a file, each with how many bytes of it have been read so far."""
    if _kind(file) in PARQUET:
        with _parquet(file) as table:
            done = 0
            for i in range(table.num_row_groups):
                group = table.metadata.row_group(i)
                columns = (group.column(c) for c in range(group.num_columns))
                done += sum(column.total_compressed_size for column in columns)
                yield Excerpt(str(file), row_group=i), done
        return
    with open_lines(file) as (raw, lines):
        held, size = [], 0
        for line in lines:
            held.append(line)
            size += len(line)
            if size >= EXCERPT:
                yield Excerpt(str(file), b"".join(held)), raw.tell()
                held, size = [], 0
        if held:
            yield Excerpt(str(file), b"".join(held)), raw.tell()


def name_of(file: Path | str) -> str:
    """A file's name up to the first dot, which names the language if the text itself does not."""
    return PurePosixPath(file).name.partition(".")[0]


def _row(line: bytes) -> Any:
    try:
        return json.loads(line.decode())
    except (ValueError, RecursionError):
        return None


def _line(line: bytes) -> str | None:
    try:
        return line.decode()
    except UnicodeDecodeError:
        return None


def _text(row: Any) -> Text | None:
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        return None

    def first(*keys: str) -> str:
        return next((row[key] for key in keys if isinstance(row.get(key), str)), "")

    return Text(row["text"], first(*LANGUAGE_KEYS), first("source"), first(*LICENCE_KEYS))


def _kind(file: Path | str) -> str:
    suffixes = [s for s in PurePosixPath(file).suffixes if s not in PACKED]
    return suffixes[-1] if suffixes else ""


def _files(path: Path | str) -> list[tuple[Path | str, int]]:
    """The files that a path or a URL stands for, with their sizes."""
    if "://" in str(path):
        with _remote(str(path)) as (system, inner):
            names = system.find(inner) if system.isdir(inner) else [inner]
            files = [(system.unstrip_protocol(n), system.size(n) or 0) for n in sorted(names)]
            is_folder = system.isdir(inner)
    else:
        path = Path(path)
        is_folder = path.is_dir()
        names = sorted(file for file in path.rglob("*") if file.is_file()) if is_folder else [path]
        if not path.exists():
            raise InvalidRequest(f"{path}: no such file or folder")
        files = [(file, file.stat().st_size) for file in names]
    texts = [(file, size) for file, size in files if _kind(file) in KINDS]
    if not texts and is_folder:
        raise InvalidRequest(f"{path}: no {', '.join(KINDS)} file in this folder")
    if not texts:
        types = ", ".join(KINDS)
        raise InvalidRequest(f"{path}: not a known type of text ({types}, also as .gz or .zst)")
    return texts


@contextmanager
def open_lines(file: Path | str) -> Iterator[tuple[IO[bytes], Iterator[bytes]]]:
    """The file as it lies on the disk, and the lines in it, each with its end."""
    with _opened(file) as raw:
        try:
            unpacked = _unpacked(file, raw)
            yield raw, iter(lambda: unpacked.readline(MAX_LINE), b"")
        except DAMAGED as error:
            raise InvalidRequest(f"{file}: damaged ({error})") from error


@contextmanager
def _opened(file: Path | str) -> Iterator[IO[bytes]]:
    if "://" not in str(file):
        try:
            raw = Path(file).open("rb")  # noqa: SIM115  closed below; only opening is tried
        except OSError as error:
            raise InvalidRequest(f"{file}: {error.strerror}") from error
        with raw:
            yield raw
        return
    with _remote(str(file)) as (system, inner), system.open(inner, "rb") as raw:
        yield raw


@contextmanager
def _remote(url: str) -> Iterator[tuple[Any, str]]:
    """The file system of a URL, and the path in it; errors name the URL."""
    try:
        import fsspec
    except ImportError:
        raise InvalidRequest(f"{url}: reading URLs needs fsspec (pip install fsspec)") from None
    try:
        yield fsspec.url_to_fs(url)
    except (OSError, ValueError, ImportError) as error:
        raise InvalidRequest(f"{url}: {error or type(error).__name__}") from error


@contextmanager
def _parquet(file: Path | str) -> Iterator[Any]:
    """A Parquet file that has a column of texts."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InvalidRequest(
            f"{file}: reading .parquet needs pyarrow (pip install pyarrow)"
        ) from None
    with _opened(file) as raw:
        try:
            table = pyarrow.parquet.ParquetFile(raw)
            if "text" not in table.schema_arrow.names:
                names = ", ".join(table.schema_arrow.names)
                raise InvalidRequest(f'{file}: no column "text" (there are {names})')
            yield table
        except (pyarrow.ArrowException, OSError) as error:
            raise InvalidRequest(f"{file}: damaged ({error})") from error


def _unpacked(file: Path | str, raw: IO[bytes]) -> IO[bytes]:
    suffix = PurePosixPath(file).suffix
    if suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))  # pyright: ignore[reportArgumentType]
    if suffix == ".zst":
        if zstandard is None:
            raise InvalidRequest(f"{file}: reading .zst needs zstandard (pip install zstandard)")
        unpacker = zstandard.ZstdDecompressor()
        return io.BufferedReader(unpacker.stream_reader(raw, read_across_frames=True))
    return raw
