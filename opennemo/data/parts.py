"""Parts of a corpus: how its files are cut into chunks, what a chunk becomes, and where.

Files alone decide what a chunk is, and its part is a pure function of it, written as one file or
not at all. So it does not matter which process of which engine makes a part, or how often it was
interrupted: parts that exist are done.

A part does not depend on others (preparation.py joins them).
"""

import errno
import io
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from opennemo.cluster.local_ray import keep_ray_here, quiet_ray_data
from opennemo.data.cleaning import Cleaning, Document, Stage, keys, stages
from opennemo.data.tally import Tally
from opennemo.data.workers import in_order
from opennemo.errors import OpenNemoError
from opennemo.files import write_whole
from opennemo.texts import Excerpt, Texts, excerpts, name_of
from opennemo.tokenizer.load import open_tokenizer
from opennemo.tokenizer.tokenizer import Tokenizer, repair_surrogates
from opennemo.train.corpus import SHARD_TOKENS

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to make from which inputs; equal plans give equal bytes.

    Attributes:
        inputs: files, folders and URLs, as `Texts` takes them.
        tokenizer: a model folder or a tokenizer file.
        out: the folder to write.
        shard_tokens: the most tokens of a shard that holds more than one document.
        chunk_bytes: of text that a process works on at a time, and of small files on disk whose
            chunks are numbered together.
    """

    inputs: tuple[Path | str, ...]
    tokenizer: Path
    out: Path
    cleaning: Cleaning = field(default_factory=Cleaning)
    shard_tokens: int = SHARD_TOKENS
    chunk_bytes: int = 8 << 20


@dataclass(frozen=True)
class TextChunk:
    """Some excerpts of a group of files; the name of the last one's part says that it is."""

    group: int
    number: int
    last: bool
    excerpts: tuple[Excerpt, ...]
    n_read: int  # bytes of the group's files, up to the end of this chunk

    @property
    def part(self) -> str:
        return f"{self.group:07}-{self.number:07}{'-last' * self.last}.npz"


def group_files(texts: Texts, n_bytes: int) -> list[tuple[list[Path | str], int]]:
    """The files in order, small ones together, each group with its bytes on disk."""
    groups: list[tuple[list[Path | str], int]] = []
    for file, size in zip(texts.files, texts.sizes, strict=True):
        if groups and groups[-1][1] + size <= n_bytes:
            files, before = groups[-1]
            groups[-1] = ([*files, file], before + size)
        else:
            groups.append(([file], size))
    return groups


def chunks(job: Job, group: int, files: Iterable[Path | str]) -> Iterator[TextChunk]:
    """The chunks of a group whose parts are still to be made."""
    number, held, size, before, n_read = 0, [], 0, 0, 0

    def todo(last: bool) -> Iterator[TextChunk]:
        chunk = TextChunk(group, number, last, tuple(held), n_read)
        if not (job.out / "parts" / chunk.part).exists():
            yield chunk

    for file in files:
        for excerpt, read in excerpts(file):
            if size >= job.chunk_bytes:
                yield from todo(last=False)
                number, held, size = number + 1, [], 0
            held.append(excerpt)
            size += len(excerpt.data) or job.chunk_bytes  # a group of rows is a chunk by itself
            n_read = before + read
        before = n_read
    yield from todo(last=True)


def finished(parts: Path) -> set[int]:
    """The groups of which all parts are there."""
    numbers: dict[int, list[int]] = {}
    last: dict[int, int] = {}
    for path in parts.glob("[0-9]*.npz"):
        group, number, *is_last = path.stem.split("-")
        numbers.setdefault(int(group), []).append(int(number))
        if is_last:
            last[int(group)] = int(number)
    return {group for group, n in last.items() if len(numbers[group]) == n + 1}


def make_part(job: Job, chunk: TextChunk) -> tuple[int, int]:
    """Make the part of a chunk; returns the chunk's group and how far in it reaches."""
    tokenizer, chosen = tools(job)
    report, documents = Tally(), []
    for excerpt in chunk.excerpts:
        fallback = "" if "identify" in job.cleaning.stages else name_of(excerpt.file)
        for text in excerpt.texts():
            if text is None:
                report.count("unreadable", "", "")
                continue
            content = repair_surrogates(text.text)
            documents.append(
                Document(
                    text=content,
                    language=text.language or fallback,
                    source=text.source,
                    licence=text.licence,
                    text_bytes=len(content.encode()),
                )
            )
    for stage in chosen:
        documents = stage(documents)
    for document in documents:
        report.count("read", "", document.language, 1, document.text_bytes)
        for change in document.changes:
            report.count("changed", change, document.language, 1, document.text_bytes)
        if document.dropped:
            report.count("dropped", document.dropped, document.language, 1, document.text_bytes)
    rest = [document for document in documents if not document.dropped]
    origins = {(d.language, d.source, d.licence): 0 for d in rest}
    origins = {origin: i for i, origin in enumerate(sorted(origins))}
    ids = [_encode(tokenizer, document.text) for document in rest]
    notes = {"origins": list(origins), "report": report.rows()}
    part = {
        "ids": np.concatenate([np.zeros(0, np.uint32), *ids]),
        "ends": np.cumsum([len(each) for each in ids], dtype=np.int64),
        "text_bytes": np.array([len(d.text.encode()) for d in rest], np.int64),
        "origin": np.array([origins[d.language, d.source, d.licence] for d in rest], np.int64),
        "keys": keys(rest, job.cleaning),
        "notes": np.frombuffer(json.dumps(notes).encode(), np.uint8),
    }
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **part)
    write_whole(job.out / "parts" / chunk.part, content.getbuffer())
    return chunk.group, chunk.n_read


@lru_cache(maxsize=1)
def tools(job: Job) -> tuple[Tokenizer, list[Stage]]:
    """What a process needs to make parts, once."""
    return open_tokenizer(job.tokenizer), stages(job.cleaning)


def _encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """BOS, if the tokenizer puts it before texts, the text's ids, and EOS."""
    # One text at a time is a batch that starts no threads: there are as many processes already.
    (ids,) = tokenizer.encode_batch([text])
    bos = [tokenizer.bos_id] if tokenizer.add_bos else []
    return np.concatenate([bos, ids, [tokenizer.eos_id]]).astype(np.uint32)


def on_processes(
    job: Job, files: dict[int, list[Path | str]], workers: int
) -> Iterator[tuple[int, int]]:
    """Run on this machine."""
    todo = (chunk for group, names in files.items() for chunk in chunks(job, group, names))
    try:
        yield from in_order(partial(make_part, job), todo, workers)
    except BrokenProcessPool:
        raise OpenNemoError(
            "a worker was killed, perhaps for lack of memory: with fewer --workers the same "
            f"command needs less, and resumes with what is in {job.out}"
        ) from None


def on_ray(job: Job, files: dict[int, list[Path | str]], workers: int) -> Iterator[tuple[int, int]]:
    """Run on Ray Data: a task reads a group of files, tasks that it feeds make the parts."""
    if "RAY_ADDRESS" not in os.environ:  # else it joins that cluster, as Ray itself does
        keep_ray_here()
    try:
        import ray.data  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise OpenNemoError(
            "--engine ray needs Ray Data; in the checkout: pip install -e '.[scale]'"
        ) from None

    def absolute(path: Path | str) -> Path | str:  # Ray's workers have working folders of their own
        return Path(path).absolute() if Path(path).exists() else path

    job = replace(job, out=job.out.absolute(), tokenizer=Path(absolute(job.tokenizer)))

    # Errors are returned as rows: Ray would turn them into pages of text, and lose their kind.
    def read(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        try:
            for chunk in chunks(job, row["group"], row["files"]):
                yield asdict(chunk) | {"error": ""}
        except (OSError, OpenNemoError) as error:
            yield asdict(TextChunk(row["group"], 0, True, (), 0)) | {
                "error": in_one_line(error, job)
            }

    def work(row: dict[str, Any]) -> dict[str, Any]:
        error, held = row.pop("error"), tuple(Excerpt(**excerpt) for excerpt in row.pop("excerpts"))
        try:
            if not error:
                make_part(job, TextChunk(**row, excerpts=held))
        except (OSError, OpenNemoError) as cause:
            error = in_one_line(cause, job)
        return {"group": row["group"], "n_read": row["n_read"], "error": error}

    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    quiet_ray_data().target_max_block_size = job.chunk_bytes
    rows = [{"group": i, "files": [str(absolute(n)) for n in names]} for i, names in files.items()]
    # Half a processor each for reading, or Ray would make one task of both.
    data = ray.data.from_items(rows).flat_map(read, num_cpus=0.5).map(work, num_cpus=1)
    for row in data.iter_rows():
        if row["error"]:
            raise OpenNemoError(row["error"])
        yield row["group"], row["n_read"]


# Each takes the work by group, and yields a group and its progress.
Engine = Callable[[Job, dict[int, list[Path | str]], int], Iterator[tuple[int, int]]]
ENGINES: dict[str, Engine] = {"processes": on_processes, "ray": on_ray}


def in_one_line(error: OSError | OpenNemoError, job: Job) -> str:
    """The message of an error, in one line."""
    if isinstance(error, OpenNemoError):
        return str(error)
    if error.errno in NO_ROOM:
        return (
            f"{job.out}: no room to write ({error.strerror}); make some, and the same command "
            "resumes"
        )
    return f"{error.filename or job.out}: {error.strerror or error}"
