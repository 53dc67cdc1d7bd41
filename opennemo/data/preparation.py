"""From files of text to token shards: make parts, find copies, write the rest.

Everything slow is done to parts of the input, each by itself (parts.py). Only then are copies
found, in the order of the input and over all of it, and the remaining texts are laid end to end. So
the result does not depend on which process made a part, on their order, or on interruptions; the
only dates and paths in it are those of the inputs.

It does not know what cleaning is (cleaning.py), nor how shards are read (corpus.py).
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from opennemo.data.cleaning import Cleaning
from opennemo.data.parts import ENGINES, Job, finished, group_files, in_one_line, tools
from opennemo.data.tally import Tally
from opennemo.errors import InvalidRequest, OpenNemoError
from opennemo.files import read_json, write_json
from opennemo.progress import Stages
from opennemo.texts import Texts
from opennemo.train.corpus import ShardWriter, describe_tokenizer

LIBRARIES = ("ftfy", "py3langid", "rensa")  # whose results may change with their versions


def prepare(
    job: Job, *, engine: str = "processes", workers: int = 1, progress: Stages | None = None
) -> dict[str, Any]:
    """Make shards of texts, or resume that; returns the report, which is also beside them.

    Engine and number of workers change only the time: "processes" of this machine, or "ray"
    for Ray Data, on a cluster if one is there, whose nodes must all see the input and `out`.

    Raises:
        InvalidRequest: an input cannot be read, or `out` holds something else.
        CheckpointError: the tokenizer cannot be read.
        OpenNemoError: a package is missing, there is no room on the disk, or a worker died.
    """
    say = progress or (lambda stage, done, total: None)
    texts = Texts(job.inputs)
    parts = job.out / "parts"
    try:
        record = _begin(job, texts)
        if (job.out / "index.json").exists():
            shutil.rmtree(parts, ignore_errors=True)
            return read_json(job.out / "report.json")
        files = group_files(texts, job.chunk_bytes)
        done = finished(parts)
        say("Tokenizing", n_done := sum(files[i][1] for i in done), texts.n_bytes)
        reached = dict.fromkeys(range(len(files)), 0)
        todo = {i: names for i, (names, _) in enumerate(files) if i not in done}
        for group, n_read in ENGINES[engine](job, todo, workers):
            reached[group] = max(reached[group], n_read)
            say("Tokenizing", n_done + sum(reached.values()), texts.n_bytes)
        return _finish(job, record, say)
    except OSError as error:
        raise OpenNemoError(in_one_line(error, job)) from error


def _begin(job: Job, texts: Texts) -> dict[str, Any]:
    """Record the job, or compare it with that of the run to resume."""
    versions = {}
    for name in LIBRARIES if job.cleaning.stages else ():
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    tokenizer, _ = tools(job)
    if tokenizer.eos_id < 0:
        raise InvalidRequest(f"{job.tokenizer}: has no token that ends a text")
    record = {
        "inputs": [[str(file), n] for file, n in zip(texts.files, texts.sizes, strict=True)],
        "tokenizer": describe_tokenizer(tokenizer, job.tokenizer.name),
        "cleaning": asdict(job.cleaning),
        "shard_tokens": job.shard_tokens,
        "chunk_bytes": job.chunk_bytes,
        "libraries": versions,
    }
    record = json.loads(json.dumps(record))  # as it will be read again
    parts = job.out / "parts"
    for file in (job.out / "report.json", parts / "plan.json"):
        if file.exists():
            before = read_json(file)
            if other := [name for name in record if before.get(name) != record[name]]:
                raise InvalidRequest(
                    f"{job.out}: begun with other {' and '.join(other)}; give the same, or "
                    "another folder"
                )
            for left in (*job.out.glob(".*"), *parts.glob(".*")):  # half-written when killed
                left.unlink()
            return record
    if job.out.exists() and any(path != parts for path in job.out.iterdir()):
        raise InvalidRequest(f"{job.out}: holds other files; give an empty folder or a new one")
    parts.mkdir(parents=True, exist_ok=True)
    write_json(parts / "plan.json", record)
    return record


def _finish(job: Job, record: dict[str, Any], say: Stages) -> dict[str, Any]:
    """Leave out copies, write shards, the report and the index, and delete the parts."""
    parts = sorted((job.out / "parts").glob("[0-9]*.npz"))
    copies = _copies(parts, job.cleaning)
    n_bytes, written = sum(path.stat().st_size for path in parts), 0
    report, seen = Tally(), 0
    writer = ShardWriter(job.out, record["tokenizer"], shard_tokens=job.shard_tokens)
    for path in parts:
        with np.load(path, allow_pickle=False) as part:
            ids, ends, text_bytes = part["ids"], part["ends"], part["text_bytes"]
            origin, notes = part["origin"], json.loads(part["notes"].tobytes())
        for row in notes["report"]:
            report.count(*row)
        copy = copies[seen : seen + len(ends)]
        lengths, unique, seen = np.diff(ends, prepend=0), copy == 0, seen + len(ends)
        _count(report, notes["origins"], origin, copy, text_bytes, lengths)
        writer.add(ids[np.repeat(unique, lengths)], np.cumsum(lengths[unique]), text_bytes[unique])
        written += path.stat().st_size
        say("Writing shards", written, n_bytes)
    content = report.content()
    if not content["kept"]["documents"]:
        raise InvalidRequest(f"{job.out}: no text is left of {content['read']['documents']:,}")
    write_json(job.out / "report.json", record | content)
    writer.finish()
    shutil.rmtree(job.out / "parts")
    return record | content


def _count(
    report: Tally,
    origins: Sequence[tuple[str, str, str]],
    origin: np.ndarray,
    copy: np.ndarray,
    text_bytes: np.ndarray,
    tokens: np.ndarray,
) -> None:
    """Count the documents (S,) of a part by what became of them, and by origin."""
    for number, (language, source, licence) in enumerate(origins):
        for kind in range(3):
            which = (origin == number) & (copy == kind)
            if not (n := int(which.sum())):
                continue
            n_bytes = int(text_bytes[which].sum())
            if kind:
                report.count("dropped", ("exact copy", "near copy")[kind - 1], language, n, n_bytes)
                continue
            named = {"languages": language, "sources": source, "licences": licence}
            for section in (section for section, name in named.items() if name):
                report.count(section, named[section], "", n, n_bytes, int(tokens[which].sum()))


def _copies(parts: Sequence[Path], cleaning: Cleaning) -> np.ndarray:
    """For every document (S,): 1 if an earlier text is equal, 2 if one is nearly so, else 0."""
    sizes = []
    for path in parts:
        with np.load(path) as part:
            sizes.append(part["keys"].shape)
    copies = np.zeros(sum(n for n, _ in sizes), np.uint8)
    for column in range(sizes[0][1]):
        keys = []
        for path in parts:  # column by column, or memory would hold fifteen times as much
            with np.load(path) as part:
                keys.append(part["keys"][:, column])
        _, first, which = np.unique(np.concatenate(keys), return_index=True, return_inverse=True)
        copy = first[which] != np.arange(len(copies))
        copies[copy & (copies == 0)] = 1 if column == 0 and "exact" in cleaning.stages else 2
    return copies
