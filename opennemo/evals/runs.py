"""A run: a folder with what was asked, every answer, and the results.

    config.json    settings, versions, machine       items.jsonl  every answer, with its value
    answers.jsonl  answers as they came, by key      results.json, .md, .csv, plots

Every answer is written as soon as it exists, under a key made of all that it depends on. After a
kill the same command reads them and asks for the rest.
"""

import fcntl
import hashlib
import json
import platform
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from opennemo.engine.scoring import Pair, Score
from opennemo.errors import InvalidRequest, OpenNemoError
from opennemo.files import write_json
from opennemo.llm import LLM
from opennemo.progress import progress

T = TypeVar("T")
Note = Callable[[int, Any], None]  # (place of a question, its answer)
PACKAGES = ("opennemo", "torch", "lm_eval", "bfcl-eval", "datasets")


def digest(*parts: Any) -> str:
    """A short name of a request: equal for equal requests, on every machine."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=12).hexdigest()


def fingerprint(path: Path) -> str:
    """A hash of a model's files, so that answers of two models are never confused."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return digest([(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()])


class Run:
    """A folder of results, new or resumed."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], n_engines: int = 1):
        """Resume the folder, if there is one; a new one is made with the first answer.

        The number of engines, which only sets how many answers are requested at once, is not
        recorded.

        Raises:
            InvalidRequest: it holds a run of other settings, or its files are damaged.
        """
        self.folder, self.settings = folder.resolve(), json.loads(json.dumps(settings))
        self.n_engines = n_engines
        self.versions = {name: v for name in PACKAGES if (v := _version(name))}
        self._answers: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._file: BinaryIO | None = None
        if (config := self.folder / "config.json").exists():
            self._check(config)
            self._read()
        self.n_before = len(self._answers)

    def _begin(self) -> None:
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            machine = {"python": platform.python_version(), "machine": platform.platform()}
            kept = {"settings": self.settings, "versions": self.versions, "machine": machine}
            write_json(self.folder / "config.json", kept | {"started": time.time()})
            self._read()

    def close(self) -> None:
        """Let another process continue it."""
        if self._file is not None:
            self._file.close()

    def _check(self, config: Path) -> None:
        """Refuse a folder with other settings or versions."""
        try:
            written = json.loads(config.read_text("utf-8"))
            before = {**written["settings"], **written["versions"]}
        except (ValueError, TypeError, KeyError):
            raise InvalidRequest(f"{config}: not what a run writes; delete its folder") from None
        now = {**self.settings, **self.versions}
        for name in sorted({*now, *before}):
            if (old := before.get(name)) != (new := now.get(name)):
                raise InvalidRequest(
                    f"{self.folder} holds a run with {name} {old}, not {new}: name another "
                    "folder with --output, or delete this one"
                )

    def _read(self) -> None:
        """The earlier answers; an incomplete last line, cut off by a kill, is removed."""
        self._file = (self.folder / "answers.jsonl").open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InvalidRequest(f"{self.folder}: another process is at work there") from None
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                key, value = json.loads(line)
            except (ValueError, TypeError):
                raise InvalidRequest(
                    f"{self._file.name}, line {number}: damaged; delete the line to continue"
                ) from None
            self._answers[key] = value
            whole += len(line)
        self._file.truncate(whole)

    def recall(self, key: str) -> Any:
        """The record under a key, or None."""
        return self._answers.get(key)

    def note(self, key: str, value: Any) -> None:
        """Record an answer. Thread-safe."""
        with self._lock:
            self._begin()
            assert self._file is not None
            self._answers[key] = value
            self._file.write(json.dumps([key, value], ensure_ascii=False).encode() + b"\n")
            self._file.flush()

    def ask_all(
        self, what: str, questions: Sequence[T], key: Callable[[T], str], ask: Callable[[T], Any],
        side_by_side: int = 16,
    ) -> list[Any]:  # fmt: skip
        """The answer to each question, recorded or requested now, several of an engine at once.

        Where a question cannot be answered there is an OpenNemoError in its place, which is not
        recorded: the next run asks again.
        """

        def ask_rest(todo: list[int], note: Note) -> None:
            def work(i: int) -> None:
                try:
                    note(i, ask(questions[i]))
                except OpenNemoError as error:
                    note(i, error)

            with ThreadPoolExecutor(side_by_side * self.n_engines) as pool:
                for _ in pool.map(work, todo):  # which raises, and cancels pending questions
                    pass

        return remembered(what, [key(question) for question in questions], self, ask_rest)

    def write_items(self, items: Sequence[Mapping[str, Any]]) -> None:
        """Every answer with what is needed to understand it, one a line."""
        self._begin()
        lines = (json.dumps(item, ensure_ascii=False, default=str) + "\n" for item in items)
        (self.folder / "items.jsonl").write_text("".join(lines), "utf-8")


def remembered(
    what: str, keys: Sequence[str], run: Run | None, answer: Callable[[list[int], Note], None]
) -> list[Any]:
    """The answer under each key: the run's, or a new one, which is recorded; errors are not.

    Args:
        answer: gets the places of keys that have no answer, each key once, and reports theirs.
    """
    answers: dict[str, Any] = {key: run and run.recall(key) for key in keys}
    todo = list({key: i for i, key in enumerate(keys) if answers[key] is None}.values())
    n_before = len(answers) - len(todo)
    with progress(what, len(answers), done=n_before) as bar:
        if n_before:
            bar.say(f"{what}: {n_before:,} of {len(answers):,} were answered before")

        def note(i: int, value: Any) -> None:
            answers[keys[i]] = value
            if run and not isinstance(value, OpenNemoError):
                run.note(keys[i], value)
            bar.advance()

        if todo:
            answer(todo, note)
    return [answers[key] for key in keys]


def score_all(llm: LLM, pairs: Sequence[Pair], run: Run | None) -> list[tuple[float, bool]]:
    """Log-probability of each pair's continuation, and whether it is greedy; recorded."""

    def score_rest(todo: list[int], note: Note) -> None:
        def listen(index: int, score: Score) -> None:
            note(todo[index], [score.logprob, score.greedy])

        llm.score([pairs[i] for i in todo], listen)

    keys = [digest("score", pair) for pair in pairs]
    return [(logprob, greedy) for logprob, greedy in remembered("Scoring", keys, run, score_rest)]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
