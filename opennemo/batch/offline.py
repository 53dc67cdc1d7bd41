"""`opennemo batch`: a file of requests in, a file of answers out, without a server.

The output is the only state there is. An answer's id follows from its request's text alone, so
whatever ended a run (a kill, a full disk, Ctrl-C), the next one sees which lines are answered, cuts
off a line that was half written, and continues; lines may have been added meanwhile.
"""

import asyncio
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from rich.console import Console

from opennemo.batch.lines import Line, LineError, OutputLine, Slots, output_line, parse, run
from opennemo.errors import InvalidRequest, OpenNemoError
from opennemo.progress import count, progress
from opennemo.serve.app import create_app
from opennemo.serve.service import Service
from opennemo.serve.settings import Settings

SPARE = 8  # lines that wait at the engine, so that it never waits for one
BEGIN = b'{"id":"batch_req_'  # of every line that we write
Place = tuple[str, int, int, bool]  # a line's id, number, offset, and whether its custom_id is new


def run_batch(source: Path, target: Path, settings: Settings) -> bool:
    """Answer the lines of a file that have no answer yet; returns whether all went without error.

    Raises:
        OpenNemoError: a file cannot be used, or the model; answers that were written stay.
    """
    for path in (source, target):
        if path.exists() and not path.is_file():
            raise InvalidRequest(f"{path}: is not a file")
    if target.exists() and source.exists() and target.samefile(source):
        raise InvalidRequest(f"{target}: is also the input; give another -o")
    try:
        with source.open("rb") as input, _Output(target) as output:
            places = list(places_in(input))
            todo = [place for place in places if place[0] not in output.ids]
            if foreign := output.ids - {id for id, *_ in places}:
                raise InvalidRequest(
                    f"{target}: holds {count(len(foreign), 'answer')} to no line of {source}; give "
                    "another -o, or remove them"
                )
            if not places:
                raise InvalidRequest(f"{source}: holds no requests")
            if output.ids:
                print(f"Answered already: {len(output.ids):,} of {count(len(places), 'line')}")
            if todo:
                _answer(input, todo, len(places), output, settings)
            lines = count(len(places), "line")
            print(f"Wrote {target}: {lines}, {output.n_failed:,} of them with an error")
            return output.n_failed == 0
    except OSError as error:
        raise InvalidRequest(f"{error.filename or target}: {error.strerror}") from None


def _answer(
    input: BinaryIO, todo: list[Place], n_total: int, output: "_Output", settings: Settings
) -> None:
    with Console(stderr=True).status("Loading the model ..."):
        answerer = Answerer(settings)
    n_tokens, n_before, started = 0, n_total - len(todo), time.monotonic()
    n_done = n_before
    try:
        with progress("Answering", n_total, done=n_before) as bar:

            def save(lines: list[OutputLine]) -> None:
                nonlocal n_done, n_tokens
                output.write(lines)
                n_done, n_tokens = n_done + len(lines), n_tokens + sum(x.n_tokens for x in lines)
                seconds = time.monotonic() - started
                lines_per_s, tokens_per_s = (n_done - n_before) / seconds, n_tokens / seconds
                bar.update(n_done, note=f"{lines_per_s:.1f} lines/s, {tokens_per_s:.0f} tokens/s")

            answerer.answer(input, todo, save)
    except KeyboardInterrupt:
        done = f"{n_done:,} of {count(n_total, 'line')} answered"
        print(f"\nStopped with {done}; the same command resumes", file=sys.stderr)
        raise
    finally:
        answerer.close()


class Answerer:
    """A model and the application around it, which answer lines without a server."""

    def __init__(self, settings: Settings):
        self._service, self._n_slots = Service(settings), settings.max_num_seqs + SPARE
        self._service.load()
        self._app = create_app(self._service)

    def answer(
        self, input: BinaryIO, places: list[Place], save: Callable[[list[OutputLine]], None]
    ) -> None:
        """Answer the lines at some places of a file; `save` as for `run`."""
        lines = lines_at(input, places, self._service.names[0])
        client, slots = self._service.gatekeeper.anonymous, Slots(self._n_slots)
        asyncio.run(run(lines, self._app, client, slots, save))

    def close(self) -> None:
        self._service.close()


def places_in(input: BinaryIO) -> Iterator[Place]:
    """Where the lines are; empty ones are left out."""
    seen, times, offset = set(), Counter[bytes](), 0
    for number, raw in enumerate(input, 1):
        if text := raw.strip():
            digest = hashlib.sha256(text).digest()
            times[digest] += 1
            id = hashlib.sha256(digest + times[digest].to_bytes(8, "big")).hexdigest()[:24]
            custom_id = None
            with suppress(LineError):  # reported when its turn comes
                custom_id = parse(text, "", number).custom_id
            yield f"batch_req_{id}", number, offset, custom_id not in seen
            if custom_id is not None:
                seen.add(custom_id)
        offset += len(raw)


def lines_at(input: BinaryIO, todo: list[Place], model: str) -> Iterator[Line | OutputLine]:
    """Requests, or the error lines of invalid ones. `model` is the default of a body."""
    for id, number, offset, is_new in todo:
        input.seek(offset)
        try:
            line = parse(input.readline(), id, number)
            if not is_new:
                raise LineError(
                    "duplicate_custom_id", "an earlier line has it", param="custom_id",
                    custom_id=line.custom_id,
                )  # fmt: skip
            line.body.setdefault("model", model)
            yield line
        except LineError as error:
            where = f"line {number}: {error.param}: " if error.param else f"line {number}: "
            problem = {"code": error.code, "message": f"{where}{error}", "param": error.param}
            yield output_line(id, number, error.custom_id, error=problem | {"line": number})


class _Output:
    """The file of answers: locked, repaired, and only ever appended to."""

    def __init__(self, path: Path):
        self.ids: set[str] = set()
        self.n_failed = 0
        self._path, self._size = path, 0

    def __enter__(self) -> "_Output":
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._lock()
            self._read()
        except BaseException:
            os.close(self._file)
            raise
        os.ftruncate(self._file, self._size)
        os.lseek(self._file, self._size, os.SEEK_SET)
        return self

    def _read(self) -> None:
        with self._path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if not raw.endswith(b"\n") and raw.startswith(BEGIN[: len(raw)]):
                    return  # cut short by a kill; its request is sent again
                try:
                    answer = json.loads(raw)
                    self.ids.add(answer["id"])
                    self.n_failed += answer["error"] is not None
                except (ValueError, KeyError, TypeError):
                    raise InvalidRequest(
                        f"{self._path}: line {number} is not an answer of a batch; give another -o"
                    ) from None
                self._size += len(raw)

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidRequest(f"{self._path}: another opennemo batch writes it") from None

    def write(self, answers: list[OutputLine]) -> None:
        """Add answers; they are on the disk when this returns, or none of them is."""
        data = b"".join(answer.data for answer in answers)
        try:
            n_written = 0
            while n_written < len(data):
                n_written += os.write(self._file, data[n_written:])
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, self._size)
            raise OpenNemoError(
                f"{self._path}: {error.strerror}; the answers so far are safe: make room, and the "
                "same command resumes"
            ) from None
        self._size += len(data)
        self.n_failed += sum(not answer.ok for answer in answers)

    def __exit__(self, *_: object) -> None:
        os.close(self._file)
