"""`opennemo batch --engine ray`: a file of requests in parts, answered by engines on many machines.

A part is some consecutive lines, and its answers are a file that gets its name when all of them are
there. Parts are all the state there is: after a kill the same command makes those that are missing.
In the end they become the output, in the order of the input, by another renaming; so the output
exists with every line answered once, or does not exist. The input, the model and the folder of the
output must be at the same path on every machine. Ray knows which machines there are.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from opennemo.batch.lines import OutputLine
from opennemo.batch.offline import Answerer, Place, places_in
from opennemo.cluster.local_ray import quiet_ray_data
from opennemo.errors import InvalidRequest, OpenNemoError
from opennemo.files import open_whole, write_whole
from opennemo.progress import count, progress
from opennemo.serve.logs import configure_logs
from opennemo.serve.settings import Settings

LINES = 64  # of a part: what a kill may cost an engine
Part = tuple[str, list[Place]]  # its file, and where its lines are
# (input, folder, parts to make, settings) -> how many lines each has, as it is made.
Make = Callable[[Path, Path, list[Part], Settings], Iterator[int]]


def run_in_parts(source: Path, target: Path, settings: Settings, make: Make | None = None) -> bool:
    """Answer the lines of a file, in parts by several engines; returns whether none had an error.

    `make` makes the parts that are missing, by default `on_ray`.

    Raises:
        OpenNemoError: a file cannot be used, or an engine; parts that were made stay.
    """
    source, target = source.absolute(), target.absolute()
    folder = target.with_name(f"{target.name}.parts")
    if target.exists():
        raise InvalidRequest(f"{target}: exists already; give another -o, or remove it")
    try:
        with source.open("rb") as input:
            places = list(places_in(input))
        if not places:
            raise InvalidRequest(f"{source}: holds no requests")
        parts = [_part(places[i : i + LINES]) for i in range(0, len(places), LINES)]
        folder.mkdir(parents=True, exist_ok=True)
        made = {path.name for path in folder.glob("*.jsonl")}
        if foreign := made - {name for name, _ in parts}:
            raise InvalidRequest(f"{folder}: holds {count(len(foreign), 'part')} of another input")
        todo = [part for part in parts if part[0] not in made]
        n_done = len(places) - sum(len(lines) for _, lines in todo)
        if n_done:
            print(f"Answered already: {n_done:,} of {count(len(places), 'line')}")
        with progress("Answering", len(places), done=n_done) as bar:
            for n_lines in (make or on_ray)(source, folder, todo, settings):
                bar.advance(n_lines)
        n_failed = _merge(folder, [name for name, _ in parts], target)
    except OSError as error:
        raise InvalidRequest(f"{error.filename or target}: {error.strerror}") from None
    print(f"Wrote {target}: {count(len(places), 'line')}, {n_failed:,} of them with an error")
    return n_failed == 0


class Maker:
    """An engine that makes one part after the other; Ray gives each a process of its own."""

    def __init__(self, source: Path, folder: Path, settings: Settings):
        configure_logs("error")
        self._source, self._folder = source, folder
        self._answerer = Answerer(settings.model_copy(update={"replicas": 0}))

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Make a part: {"part", "places" in JSON} -> {"n_lines", "error"}."""
        places = [(id, number, at, new) for id, number, at, new in json.loads(row["places"])]
        lines: list[OutputLine] = []
        try:
            with self._source.open("rb") as input:
                self._answerer.answer(input, places, lines.extend)
            data = [line.data for line in sorted(lines, key=lambda line: line.number)]
            write_whole(self._folder / row["part"], *data)
        except (OSError, OpenNemoError) as error:  # as a row: Ray would turn it into pages of text
            return {"n_lines": 0, "error": str(error)}
        return {"n_lines": len(lines), "error": ""}

    def close(self) -> None:
        self._answerer.close()


def on_ray(source: Path, folder: Path, parts: list[Part], settings: Settings) -> Iterator[int]:
    """One engine for each replica, where Ray finds room for it."""
    from opennemo.cluster.session import cpus_of, gpus_of, start_ray

    if not parts:
        return
    ray = start_ray(settings)
    try:
        import ray.data as data  # pyright: ignore[reportMissingImports]

        quiet_ray_data()
        made = data.from_items(rows(parts), override_num_blocks=len(parts)).map(
            Maker,  # pyright: ignore[reportArgumentType]  (a class is made once an engine)
            fn_constructor_args=(source, folder, settings),
            concurrency=min(settings.replicas, len(parts)),
            num_cpus=cpus_of(settings),
            num_gpus=gpus_of(settings),
        )
        for row in made.iterrows():
            yield n_lines_of(row)
    finally:
        ray.shutdown()


def _part(places: list[Place]) -> Part:
    """Named by its first line's number and all lines' ids, which follow from their text."""
    digest = hashlib.sha256("".join(id for id, *_ in places).encode()).hexdigest()[:16]
    return f"{places[0][1]:010d}-{digest}.jsonl", places


def rows(parts: list[Part]) -> list[dict[str, str]]:
    """Parts as the arguments of a `Maker`."""
    return [{"part": name, "places": json.dumps(places)} for name, places in parts]


def n_lines_of(row: dict[str, Any]) -> int:
    """What a `Maker` has returned. Raises: OpenNemoError, it could not make the part."""
    if row["error"]:
        raise OpenNemoError(row["error"])
    return row["n_lines"]


def _merge(folder: Path, names: list[str], target: Path) -> int:
    """Join the parts under the output's name; returns how many lines have an error."""
    n_failed, merged = 0, folder / "whole"
    with open_whole(merged) as whole:
        for name in names:
            with (folder / name).open("rb") as part:
                for line in part:
                    n_failed += json.loads(line)["error"] is not None
                    whole.write(line)
    merged.rename(target)
    shutil.rmtree(folder)
    return n_failed
