"""Files that are written whole or not at all, and JSON read with errors that name the file.

A file is written under a temporary name beside its own, and renamed when it is complete and on the
disk. So a killed process or a full disk never leaves half of a file under a name that somebody
reads.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from opennemo.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: the file cannot be read, is not JSON, or holds something else.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object as indented JSON, whole or not at all."""
    text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
    write_whole(path, text.encode())


def write_whole(path: Path, *parts: bytes | memoryview, mode: int = 0o666) -> None:
    """Write a file of these parts whole, or not at all; `mode` as for `os.open`.

    Raises:
        OSError: there is no room, or the folder cannot be written.
    """
    with open_whole(path, mode) as file:
        for part in parts:
            file.write(part)


@contextmanager
def open_whole(path: Path, mode: int = 0o666) -> Iterator[IO[bytes]]:
    """A file to write to, renamed to `path` if the block succeeds, else removed.

    Raises:
        OSError: there is no room, or the folder cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def remove_partials(folder: Path, pattern: str) -> None:
    """Remove partial files, under names like `pattern`, of processes that no longer run.

    Raises:
        OSError: a file cannot be removed.
    """
    for path in folder.glob(f".{pattern}.*.partial"):
        writer = path.name.split(".")[-2]
        if writer.isdecimal() and not _is_running(int(writer)):
            path.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder, renamed to `folder` if the block succeeds, else removed.

    Raises:
        CheckpointError: `folder` exists and is not empty, or cannot be written.
    """
    folder = folder.absolute()
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError(f"{folder}: exists, and is not an empty folder; choose another")
        shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sync(*paths: Path) -> None:
    """Flush files and folders to the disk itself."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True
