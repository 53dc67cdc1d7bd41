"""Chat files to examples: ids, and a mask of those that a model should learn to write.

Ids and mask come only from `tokenizer/chat.py`, from the code that serves a prompt, so a model gets
the same prompts in training as in use. A line that cannot be learned from is never skipped
silently: its file, number and reason are in the report.

It does not know the shapes of lines (shapes.py), how examples are packed, or what the loss is.
"""

import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from opennemo.errors import InvalidRequest, OpenNemoError
from opennemo.progress import count
from opennemo.texts import open_lines
from opennemo.tokenizer import Tokenizer
from opennemo.tokenizer.chat import encode_chat, encode_for_training
from opennemo.tokenizer.chat_layouts import LAYOUTS
from opennemo.tokenizer.messages import Message, Tool
from opennemo.train.shapes import (
    as_context,
    checked,
    conversation_of,
    parse_line,
    preference_of,
    shape_of,
    split_at_answers,
    task_of,
)

BATCH_BYTES = 1 << 20  # some seconds' work is shared out in pieces of this
WORTH_PROCESSES = 1 << 20  # bytes on disk; processes take a second to start


@dataclass(frozen=True)
class Example:
    """One sequence to learn from."""

    ids: np.ndarray  # (T,) uint32
    mask: np.ndarray  # (T,) bool: ids that the model should learn to write


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, each with the prompt before it and only the answer to learn."""

    chosen: Example
    rejected: Example


@dataclass(frozen=True)
class Task:
    """Something to answer, and what a reward needs to judge answers by."""

    ids: list[int]  # (T,) of the prompt
    messages: list[Message]
    tools: list[Tool]
    reference: Message | None  # a good answer
    row: dict[str, Any]  # the whole line
    place: str  # file and line


def n_shared(examples: Sequence[Example]) -> int:
    """The number of ids with which several examples all begin, before the first learned id."""
    if len(examples) < 2:
        return 0
    # The place of an answer's first id is the id before it, which each example keeps.
    end = max(0, min(int(e.mask.argmax()) if e.mask.any() else len(e.ids) for e in examples) - 1)
    first, *others = (e.ids[:end] for e in examples)
    for other in others:
        differs = np.flatnonzero(first[: len(other)] != other[: len(first)])
        first = first[: differs[0] if len(differs) else min(len(first), len(other))]
    return len(first)


class BadLine(NamedTuple):
    """A line that cannot be learned from as it is."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.reason}"


@dataclass
class Report:
    """The content of some files.

    Attributes:
        lengths: tokens of each sequence, in order; of a pair there are two.
        bad: lines that gave nothing, in order.
        shapes: how many lines have which shape.
    """

    n_conversations: int = 0
    n_turns: int = 0  # messages, the system's included
    n_tool_calls: int = 0
    n_trained_tokens: int = 0
    languages: Counter[str] = field(default_factory=Counter)
    shapes: Counter[str] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)
    bad: list[BadLine] = field(default_factory=list)

    @property
    def n_tokens(self) -> int:
        return sum(self.lengths)

    def percentiles(self, *shares: float) -> list[int]:
        """Lengths that given percentages of the sequences do not exceed; 0 without sequences."""
        lengths = np.percentile(self.lengths or [0], shares, method="lower")
        return [int(length) for length in lengths]

    def add(self, other: "Report") -> None:
        """Add the report on another part of the same files."""
        self.n_conversations += other.n_conversations
        self.n_turns += other.n_turns
        self.n_tool_calls += other.n_tool_calls
        self.n_trained_tokens += other.n_trained_tokens
        self.languages += other.languages
        self.shapes += other.shapes
        self.lengths += other.lengths
        self.bad += other.bad

    def refuse_bad_lines(self) -> None:
        """Raise unless every line is good.

        Raises:
            InvalidRequest: there are bad lines; the first five are named.
        """
        if self.bad:
            first = "; ".join(map(str, self.bad[:5]))
            more = f"; and {len(self.bad) - 5:,} more" if len(self.bad) > 5 else ""
            raise InvalidRequest(
                f"{count(len(self.bad), 'bad line')}: {first}{more}. `opennemo validate-data "
                "--fix` mends what can be mended, `skip_bad = true` leaves them out"
            )


def read_examples(
    paths: Sequence[Path], tokenizer: Tokenizer, *, max_tokens: int, processes: int | None = None
) -> tuple[list[Example], Report]:
    """All conversations of some files, each at most `max_tokens` long, in order.

    A conversation is one example. Only where the layout is one of Mistral's that puts the tools
    before the last question, and there are tools, it is one for each answer (`split_at_answers`).

    Args:
        processes: how many read side by side; by default one, or for large files one a core. They
            are spawned: a script that calls this does so under `if __name__ == "__main__"`.

    Raises:
        InvalidRequest: a file cannot be read at all. Bad lines are in the report.
    """
    return _read(paths, Reader(tokenizer, max_tokens), processes)


def read_pairs(
    paths: Sequence[Path], tokenizer: Tokenizer, *, max_tokens: int, processes: int | None = None
) -> tuple[list[Pair], Report]:
    """All preferences of some files, at most `max_tokens` each: a prompt and both its answers.

    Arguments and errors as for `read_examples`.
    """
    return _read(paths, Reader(tokenizer, max_tokens, pairs=True), processes)


def read_tasks(
    paths: Sequence[Path], tokenizer: Tokenizer, *, max_tokens: int, processes: int | None = None
) -> tuple[list[Task], Report]:
    """All prompts of some files, each at most `max_tokens` long.

    Arguments and errors as for `read_examples`.
    """
    return _read(paths, Reader(tokenizer, max_tokens, tasks=True), processes)


class Reader:
    """Turns lines into examples, into pairs or into tasks."""

    def __init__(
        self, tokenizer: Tokenizer, max_tokens: int, *, pairs: bool = False, tasks: bool = False
    ):
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.pairs, self.tasks = pairs, tasks

    def read(self, file: str, lines: list[tuple[int, bytes]]) -> tuple[list[Any], Report]:
        units: list[Any] = []
        report = Report()
        for number, line in lines:
            try:
                row = parse_line(line)
                if self.tasks:
                    units.append(self.task(row, report, f"{file}, line {number}"))
                    continue
                units += self.pair(row, report) if self.pairs else self.examples(row, report)
            except InvalidRequest as error:
                report.bad.append(BadLine(file, number, str(error)))
        return units, report

    def examples(self, row: dict[str, Any], report: Report) -> list[Example]:
        messages, tools = conversation_of(row)
        conversation = checked(messages, tools)
        layout = LAYOUTS.get(self.tokenizer.instruct_version or "")
        split = tools and layout is not None and not layout.tools_first
        parts = split_at_answers(messages) if split else [messages]
        examples = [self._encode(part, tools) for part in parts]
        self._count(report, row, conversation, examples)
        return examples

    def pair(self, row: dict[str, Any], report: Report) -> list[Pair]:
        messages, tools, answers = preference_of(row)
        roles = [m.get("role") for m in messages if m.get("role") not in ("system", "developer")]
        if not roles or roles[-1] not in ("user", "tool"):
            raise InvalidRequest("messages: must end with what is answered, a user or tool message")
        context = [as_context(m) for m in messages]
        if answers[0] == answers[1]:
            raise InvalidRequest("chosen and rejected are the same")
        sides, conversation = [], []
        for answer in answers:
            # A rejected answer may be wrong in any way.
            conversation = checked([*context, *answer], tools, strict=not sides)
            sides.append(self._encode([*context, *answer], tools))
        if (n_tokens := sum(len(e.ids) for e in sides) - n_shared(sides)) > self.max_tokens:
            raise InvalidRequest(
                f"{n_tokens:,} tokens with both answers, more than max_tokens {self.max_tokens:,}"
            )
        self._count(report, row, conversation, sides)
        return [Pair(*sides)]

    def task(self, row: dict[str, Any], report: Report, place: str) -> Task:
        messages, tools, reference = task_of(row)
        ids = encode_chat(self.tokenizer, messages, tools)
        if len(ids) > self.max_tokens:
            raise InvalidRequest(f"{len(ids):,} tokens, more than the {self.max_tokens:,} allowed")
        example = Example(np.array(ids, np.uint32), np.zeros(len(ids), bool))
        self._count(report, row, messages, [example])
        return Task(ids, messages, tools, reference, row, place)

    def _encode(self, messages: list[Message], tools: list[Tool]) -> Example:
        ids, mask = encode_for_training(self.tokenizer, messages, tools)
        if len(ids) > self.max_tokens:
            raise InvalidRequest(f"{len(ids):,} tokens, more than max_tokens {self.max_tokens:,}")
        return Example(np.array(ids, np.uint32), np.array(mask, bool))

    def _count(
        self, report: Report, row: dict, conversation: list[Message], examples: list[Example]
    ) -> None:
        report.n_conversations += 1
        report.shapes[shape_of(row)] += 1
        report.n_turns += len(conversation)
        report.n_tool_calls += sum(len(m.get("tool_calls") or ()) for m in conversation)
        report.n_trained_tokens += sum(int(e.mask.sum()) for e in examples)
        report.lengths += [len(e.ids) for e in examples]
        if isinstance(language := row.get("lang", row.get("language")), str):
            report.languages[language] += 1


def _read(paths: Sequence[Path], reader: Reader, processes: int | None) -> tuple[list[Any], Report]:
    if processes is None:
        large = sum(path.stat().st_size for path in paths if path.is_file()) > WORTH_PROCESSES
        processes = (os.cpu_count() or 1) if large else 1
    if processes == 1:
        shares = [_read_share(paths, reader, 0, 1)]
    else:
        # Spawned, not forked: the caller may have threads.
        spawn = multiprocessing.get_context("spawn")
        try:
            with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
                ranks = range(processes)
                todo = [pool.submit(_read_share, paths, reader, r, processes) for r in ranks]
                shares = [future.result() for future in todo]
        except BrokenProcessPool:
            names = ", ".join(map(str, paths))
            raise OpenNemoError(
                f"{names}: a reading process ended early: out of memory, or started by a script "
                'without `if __name__ == "__main__":`'
            ) from None
    units: list[Any] = []
    report = Report()
    for batch in (batch for row in zip_longest(*shares) for batch in row if batch is not None):
        units += batch[0]
        report.add(batch[1])
    return units, report


def _read_share(
    paths: Sequence[Path], reader: Reader, rank: int, n_ranks: int
) -> list[tuple[list[Any], Report]]:
    """Every nth batch of lines; reading past the others costs next to nothing."""
    if n_ranks > 1:
        reader.tokenizer.expect_corpus()
    mine = (batch for i, batch in enumerate(batches_of_lines(paths)) if i % n_ranks == rank)
    return [reader.read(file, lines) for file, lines in mine]


def batches_of_lines(paths: Iterable[Path]) -> Iterator[tuple[str, list[tuple[int, bytes]]]]:
    """Lines with their numbers, read in parts; an empty file gives one empty line.

    Of a file that is one JSON array, or one object over several lines, the entries, numbered.
    """
    for path in paths:
        if not path.is_file():
            raise InvalidRequest(f"{path}: no such file")
        if entries := _entries(path):
            yield str(path), list(enumerate(entries, 1))
            continue
        batch, size, number, is_rest, is_empty = [], 0, 1, False, True
        with open_lines(path) as (_, lines):
            for line in lines:
                # A line too long for one piece comes as several; the first makes it bad.
                if not is_rest and not line.isspace():
                    batch.append((number, line))
                    size, is_empty = size + len(line), False
                is_rest = not line.endswith(b"\n")
                number += not is_rest
                if size > BATCH_BYTES:
                    yield str(path), batch
                    batch, size = [], 0
        yield str(path), [(1, b"")] if is_empty else batch


def _entries(path: Path) -> list[bytes]:
    """The entries of a file that is not lines but one JSON value; [] of any other."""
    with open_lines(path) as (_, lines):
        first = next((line for line in lines if line.strip(b"\xef\xbb\xbf\r\n\t ")), b"")
        if first.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] not in (b"[", b"{"):
            return []
        with suppress(ValueError, RecursionError):
            if isinstance(json.loads(first.decode("utf-8-sig")), dict):
                return []
        with suppress(ValueError, RecursionError):
            value = json.loads((first + b"".join(lines)).decode("utf-8-sig"))
            rows = value if isinstance(value, list) else [value]
            return [json.dumps(row, ensure_ascii=False).encode() for row in rows]
    return []
