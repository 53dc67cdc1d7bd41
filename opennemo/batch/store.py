"""Files and batches on disk: one SQLite database in the state folder.

A file is its lines, rows of a table, and a batch's output is a file whose rows carry the numbers of
the input's. So "every line is answered exactly once" is a key, "what is left to do" is a query, and
a kill at any moment leaves what the last transaction left. Ids are random, every query of a client
names its owner, and nothing that a client sends becomes a path.
"""

import json
import secrets
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, Literal

from opennemo.batch.lines import OutputLine
from opennemo.serve.error_bodies import Refusal

AT_WORK = ("validating", "in_progress", "cancelling")
SCHEMA = """
CREATE TABLE IF NOT EXISTS files(
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, filename TEXT NOT NULL, purpose TEXT NOT NULL,
    created_at INTEGER NOT NULL, expires_at INTEGER NOT NULL, ready INTEGER NOT NULL,
    bytes INTEGER NOT NULL DEFAULT 0, num_lines INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS lines(
    file TEXT NOT NULL REFERENCES files ON DELETE CASCADE, number INTEGER NOT NULL,
    data BLOB NOT NULL, PRIMARY KEY (file, number)
);
CREATE TABLE IF NOT EXISTS batches(
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, status TEXT NOT NULL, created_at INTEGER NOT NULL,
    model TEXT, input TEXT NOT NULL, output TEXT, error_file TEXT, rest TEXT NOT NULL  -- JSON
);
CREATE INDEX IF NOT EXISTS files_of ON files(owner);
CREATE INDEX IF NOT EXISTS batches_of ON batches(owner);
CREATE INDEX IF NOT EXISTS batches_at_work ON batches(status);
"""
COLUMNS = ("id", "owner", "status", "created_at", "model", "input", "output", "error_file")
KEPT = 30 * 86400  # seconds that a file is kept by default; a batch twice as long
OVERHEAD = 1024  # bytes that a file or batch counts for besides its content
MAX_AT_WORK = 64  # batches of one owner
Row = dict[str, Any]


class Store:
    """The database. Every call is a transaction of its own, from any thread.

    Methods raise Refusal: 404 for what the owner does not have, 503 while the disk is full.
    """

    def __init__(self, folder: Path, *, max_lines: int, max_bytes: int):
        self._folder, self._max_lines, self._max_bytes = folder, max_lines, max_bytes
        self._writing, self._guard, self._held = Lock(), None, None

    def open(self) -> None:
        """Make the database ready, for this process alone.

        Raises:
            OSError, sqlite3.Error: the folder cannot be used, or another server uses it.
        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # SQLite's own lock, on every system; it goes when the process does.
        guard = sqlite3.connect(
            self._folder / "lock", timeout=0, isolation_level=None, check_same_thread=False
        )
        guard.execute("BEGIN EXCLUSIVE")
        self._guard = guard
        with self._read() as db:
            db.executescript(f"PRAGMA journal_mode=WAL; {SCHEMA}")
        # An open connection keeps SQLite's shared-memory file. Without it a full disk, which has no
        # room to create that file again, would stop reads, too.
        self._held = sqlite3.connect(
            self._folder / "batches.sqlite3", isolation_level=None, check_same_thread=False
        )
        self._held.execute("SELECT count(*) FROM files").fetchone()

    def close(self) -> None:
        if self._held:
            self._held.close()
            self._held = None
        if self._guard:
            self._guard.close()
            self._guard = None

    @contextmanager
    def _read(self) -> Iterator[sqlite3.Connection]:
        if self._guard is None:
            raise Refusal(
                503, "files and batches are off; the server's log says why", retry_after=5
            )
        try:
            path = self._folder / "batches.sqlite3"
            with closing(
                sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            ) as db:
                db.row_factory = sqlite3.Row
                db.execute("PRAGMA foreign_keys=ON")
                yield db
        except sqlite3.OperationalError as error:
            raise Refusal(503, f"files cannot be kept: {error}", retry_after=5) from None

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        with self._writing, self._read() as db:
            db.execute("BEGIN IMMEDIATE")
            yield db  # if this raises, closing rolls back
            db.execute("COMMIT")

    def add_file(
        self, owner: str, filename: str, lines: Iterable[bytes], *, expires_in: int = KEPT
    ) -> Row:
        """Store a file, given as lines with their ends."""
        with self._write() as db:
            self._forget_old(db)
            file = _new_file(db, owner, filename[:255], "batch", expires_in)
            room, size, number = self._room(db), 0, 0
            for number, data in enumerate(lines, 1):
                size += len(data)
                if number > self._max_lines:
                    raise Refusal(413, f"a file may have {self._max_lines:,} lines")
                if size > room:
                    raise self._full()
                db.execute("INSERT INTO lines VALUES (?, ?, ?)", (file, number, data))
            values = (size, number, file)
            db.execute("UPDATE files SET bytes = ?, num_lines = ?, ready = 1 WHERE id = ?", values)
            return _find(db, "files", owner, file)

    def lines(self, file: str) -> Iterator[bytes]:
        """The lines, as they were given, of a file that is known to be the owner's."""
        with self._read() as db:
            query = "SELECT data FROM lines WHERE file = ? ORDER BY number"
            for row in db.execute(query, (file,)):
                yield row["data"]

    def content(self, file: str) -> Iterator[bytes]:
        """The same in parts of some 64 KiB."""
        part = bytearray()
        for line in self.lines(file):
            part += line
            if len(part) >= 2**16:
                yield bytes(part)
                part.clear()
        yield bytes(part)

    def delete_file(self, owner: str, id: str) -> None:
        with self._write() as db:
            _find(db, "files", owner, id)
            query = f"SELECT id FROM batches WHERE input = ? AND status IN {AT_WORK}"
            if user := db.execute(query, (id,)).fetchone():
                raise Refusal(400, f"{user['id']} still needs this file: cancel it, or wait")
            db.execute("DELETE FROM files WHERE id = ?", (id,))

    def add_batch(self, owner: str, input: str, model: str | None, **rest: Any) -> Row:
        """Store a batch, to be validated and answered."""
        batch: Row = {
            "id": f"batch_{secrets.token_hex(16)}", "owner": owner, "status": "validating",
            "created_at": int(time.time()), "model": model, "input": input, "output": None,
            "error_file": None, "times": {}, "errors": [],
            "n_total": 0, "n_ok": 0, "n_failed": 0, **rest,
        }  # fmt: skip
        with self._write() as db:
            self._forget_old(db)
            if _find(db, "files", owner, input)["purpose"] != "batch":
                raise Refusal(400, "the input file was not uploaded with purpose batch")
            if self._room(db) < OVERHEAD:
                raise self._full()
            query = f"SELECT count(*) FROM batches WHERE owner = ? AND status IN {AT_WORK}"
            if db.execute(query, (owner,)).fetchone()[0] >= MAX_AT_WORK:
                raise Refusal(
                    429, f"a key may have {MAX_AT_WORK} batches at work",
                    code="rate_limit_exceeded", retry_after=60,
                )  # fmt: skip
            _save(db, batch)
        return batch

    def find(self, table: Literal["files", "batches"], owner: str, id: str) -> Row:
        """One file or batch of the owner's."""
        with self._read() as db:
            return _find(db, table, owner, id)

    def page(
        self,
        table: Literal["files", "batches"],
        owner: str,
        *,
        limit: int,
        offset: int = 0,
        after: str | None = None,
        ascending: bool = False,
        since: float = 0,
        **among: list[str] | None,
    ) -> tuple[list[Row], int]:
        """Rows of the owner's, newest first, and how many there are without `limit`.

        Args:
            after: the id that the rows come after.
            among: values that a column may have.
        """
        conditions, values = ["owner = ?", "created_at >= ?"], [owner, since]
        if table == "files":
            conditions.append("ready")
        for column, allowed in among.items():
            if allowed is not None:
                conditions.append(f"{column} IN ({', '.join('?' * len(allowed))})")
                values += allowed
        if after is not None:
            sign = ">" if ascending else "<"
            conditions.append(f"rowid {sign} (SELECT rowid FROM {table} WHERE id = ?)")
            values.append(after)
        where = f"FROM {table} WHERE {' AND '.join(conditions)}"
        order = f"ORDER BY rowid {'ASC' if ascending else 'DESC'} LIMIT ? OFFSET ?"
        with self._read() as db:
            n_all = db.execute(f"SELECT count(*) {where}", values).fetchone()[0]
            rows = db.execute(f"SELECT * {where} {order}", (*values, limit, offset))
            return [_row(row) for row in rows], n_all

    def at_work(self) -> list[Row]:
        """Everybody's batches that have not ended, oldest first."""
        with self._read() as db:
            query = f"SELECT * FROM batches WHERE status IN {AT_WORK} ORDER BY rowid"
            return [_row(row) for row in db.execute(query)]

    def begin(self, batch: Row, *, n_total: int, model: str | None) -> Row:
        """A batch is valid: from now on answers may be added."""
        with self._write() as db:
            batch = _find(db, "batches", batch["owner"], batch["id"])
            if batch["status"] == "validating":
                batch |= {"n_total": n_total, "model": model}
                for key, end in (("output", "output"), ("error_file", "error")):
                    name = f"{batch['id']}_{end}.jsonl"
                    batch[key] = _new_file(db, batch["owner"], name, "batch_output", KEPT)
                _save(db, batch, "in_progress")
        return batch

    def pending(self, batch: Row) -> Iterator[tuple[int, bytes]]:
        """Numbers and lines of the input that have no answer yet; empty lines need none."""
        query = (
            "SELECT number, data FROM lines AS asked WHERE file = ? AND number > ? AND NOT EXISTS "
            "(SELECT 1 FROM lines WHERE file IN (?, ?) AND number = asked.number) "
            "ORDER BY number LIMIT 32"
        )
        number = 0
        while True:
            values = (batch["input"], number, batch["output"], batch["error_file"])
            with self._read() as db:
                rows = db.execute(query, values).fetchall()
            if not rows:
                return
            for number, data in rows:
                if data.strip():
                    yield number, data

    def answer(self, batch: Row, answers: Iterable[OutputLine]) -> None:
        """Store answers of a batch; those that come after its end are dropped."""
        with self._write() as db:
            batch = _find(db, "batches", batch["owner"], batch["id"])
            if batch["status"] != "in_progress":
                return
            for answer in answers:
                file = batch["output" if answer.ok else "error_file"]
                batch["n_ok" if answer.ok else "n_failed"] += 1
                values = (file, answer.number, answer.data)
                db.execute("INSERT INTO lines VALUES (?, ?, ?)", values)
                db.execute(
                    "UPDATE files SET bytes = bytes + ?, num_lines = num_lines + 1 WHERE id = ?",
                    (len(answer.data), file),
                )
            _save(db, batch)

    def cancel(self, owner: str, id: str) -> Row:
        """Ask for the end of a batch, unless it has ended."""
        with self._write() as db:
            batch = _find(db, "batches", owner, id)
            if batch["status"] in ("validating", "in_progress"):
                _save(db, batch, "cancelling")
        return batch

    def finish(self, batch: Row, status: str, errors: Iterable[Row] = ()) -> None:
        """End a batch: its files become visible, and its input may be deleted."""
        with self._write() as db:
            batch = _find(db, "batches", batch["owner"], batch["id"])
            if batch["status"] not in AT_WORK:
                return
            if batch["status"] == "cancelling":
                status = "cancelled"
            for key in ("output", "error_file"):
                query = "DELETE FROM files WHERE id = ? AND num_lines = 0"
                if db.execute(query, (batch[key],)).rowcount:
                    batch[key] = None
                now = int(time.time())
                values = (now, now + batch["output_expires_in"], batch[key])
                query = "UPDATE files SET ready = 1, created_at = ?, expires_at = ? WHERE id = ?"
                db.execute(query, values)
            batch["errors"] = list(errors)
            if status == "completed":
                _save(db, batch, "finalizing")
            _save(db, batch, status)

    def delete_batch(self, owner: str, id: str) -> None:
        """Delete a batch that has ended; its files stay."""
        with self._write() as db:
            if _find(db, "batches", owner, id)["status"] in AT_WORK:
                raise Refusal(400, "the batch is at work: cancel it first")
            db.execute("DELETE FROM batches WHERE id = ?", (id,))

    def _room(self, db: sqlite3.Connection) -> int:
        """Bytes that files may still take."""
        query = "SELECT total(bytes + ?) + ? * (SELECT count(*) FROM batches) FROM files"
        return int(self._max_bytes - db.execute(query, (OVERHEAD, OVERHEAD)).fetchone()[0])

    def _full(self) -> Refusal:
        return Refusal(413, f"all files together may have {self._max_bytes:,} bytes; delete some")

    def _forget_old(self, db: sqlite3.Connection) -> None:
        now = int(time.time())
        used = f"SELECT input FROM batches WHERE status IN {AT_WORK}"
        query = f"DELETE FROM files WHERE ready AND expires_at < ? AND id NOT IN ({used})"
        db.execute(query, (now,))
        query = f"DELETE FROM batches WHERE status NOT IN {AT_WORK} AND created_at < ?"
        db.execute(query, (now - 2 * KEPT,))


def _row(row: sqlite3.Row) -> Row:
    values = dict(row)
    return values | json.loads(values.pop("rest", "{}"))


def _find(db: sqlite3.Connection, table: str, owner: str, id: str) -> Row:
    row = db.execute(f"SELECT * FROM {table} WHERE id = ? AND owner = ?", (id, owner)).fetchone()
    if row is None or (table == "files" and not row["ready"]):
        what = table.removesuffix("es") if table == "batches" else "file"
        raise Refusal(404, f"there is no {what} {id[:100]}", code="not_found")
    return _row(row)


def _save(db: sqlite3.Connection, batch: Row, status: str | None = None) -> None:
    if status:
        batch["status"] = status
        batch["times"][status] = int(time.time())
    rest = json.dumps({name: value for name, value in batch.items() if name not in COLUMNS})
    values = [*(batch[name] for name in COLUMNS), rest]
    # Not REPLACE, which would give the row a new place in the list.
    changes = ", ".join(f"{name} = excluded.{name}" for name in (*COLUMNS, "rest"))
    marks = ", ".join("?" * len(values))
    db.execute(
        f"INSERT INTO batches ({', '.join(COLUMNS)}, rest) VALUES ({marks}) "
        f"ON CONFLICT (id) DO UPDATE SET {changes}", values,
    )  # fmt: skip


def _new_file(
    db: sqlite3.Connection, owner: str, filename: str, purpose: str, expires_in: int
) -> str:
    id, now = f"file-{secrets.token_hex(16)}", int(time.time())
    columns = "(id, owner, filename, purpose, created_at, expires_at, ready)"
    values = (id, owner, filename, purpose, now, now + expires_in)
    db.execute(f"INSERT INTO files {columns} VALUES (?, ?, ?, ?, ?, ?, 0)", values)
    return id
