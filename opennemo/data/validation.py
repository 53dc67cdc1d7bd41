"""Chat files checked before a run: what is in them, what is wrong, and a repaired copy.

Repairing has one rule: a conversation is cut back to its last answer up to which it is good.
That repairs questions without an answer, results without a call, calls to unknown tools and
conversations that are too long; roles under other names are renamed first. A line without a good
beginning is left out, and listed. planning/ estimates what a run would take.

Like `utils/validate_data.py` and `utils/reformat_data.py` of mistral-finetune.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from opennemo.errors import InvalidRequest
from opennemo.planning.estimate import Plan, plan, resolve_shape
from opennemo.planning.machines import Machines
from opennemo.tokenizer import Tokenizer
from opennemo.tokenizer.messages import Message
from opennemo.train.config import Lora, Model, Recipe, Source, TrainingData
from opennemo.train.conversations import (
    BadLine,
    Reader,
    Report,
    batches_of_lines,
    read_examples,
    read_pairs,
    read_tasks,
)
from opennemo.train.shapes import (
    SPEAKERS,
    conversation_of,
    holds_preference,
    parse_line,
    preference_of,
)


def validate(
    paths: Sequence[Path], tokenizer: Tokenizer, max_tokens: int, *, prompts: bool = False
) -> Report:
    """Read files as training would, conversations or preferences, whichever each file holds.

    With `prompts` they are what a model is to answer, as the objective "rl" reads them.

    Raises:
        InvalidRequest: a file cannot be read at all.
    """
    report = Report()
    for path in paths:
        read = read_pairs if _holds_pairs(path) else read_examples
        read = read_tasks if prompts else read
        report.add(read([path], tokenizer, max_tokens=max_tokens)[1])
    return report


def epoch(
    paths: Sequence[Path], report: Report, model: Path, machines: Machines, *, width: int, rank: int
) -> Plan:
    """What one pass over the files takes, packed into rows of `width` tokens, one a step.

    Args:
        rank: of a LoRA; 0 for training all weights.
    """
    recipe = Recipe(
        objective="chat",
        steps=max(1, math.ceil(report.n_tokens / width)),
        model=Model(path=str(model)),
        data=TrainingData(
            train=tuple(Source(path=path) for path in paths), window=width, rows=1, micro_rows=1
        ),
        lora=Lora(rank=rank) if rank else None,
    )
    base = resolve_shape(recipe, None, None)
    return plan(recipe, base.config, machines, stored=base.stored, in_blocks=base.in_blocks)


def fix(
    paths: Sequence[Path], out: Path, report: Report, tokenizer: Tokenizer, max_tokens: int,
    *, prompts: bool = False,
) -> list[BadLine]:  # fmt: skip
    """Write good lines as they are and bad ones repaired; returns the lines left out.

    A bad prompt is left out.

    Raises:
        InvalidRequest: the file exists.
    """
    bad = {(line.file, line.line): line for line in report.bad}
    left_out = []
    try:
        with out.open("xb") as file:
            for path in paths:
                reader = Reader(tokenizer, max_tokens, pairs=_holds_pairs(path))
                for name, lines in batches_of_lines([path]):
                    for number, line in lines:
                        if (problem := bad.get((name, number))) is None:
                            file.write(line.rstrip(b"\r\n") + b"\n")
                        elif not prompts and (row := repair(line, reader)) is not None:
                            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                        else:
                            left_out.append(problem)
    except FileExistsError:
        raise InvalidRequest(f"{out}: exists; choose another name") from None
    return left_out


def repair(line: bytes, reader: Reader) -> dict[str, Any] | None:
    """The good part of a line, in the shape of `messages`; None if no part is good."""
    try:
        row = _renamed(parse_line(line))
        if reader.pairs:
            messages, tools, answers = preference_of(row)
            answers = {"chosen": answers[0], "rejected": answers[1]}
        else:
            (messages, tools), answers = conversation_of(row), {}
    except InvalidRequest:
        return None
    is_system = [m.get("role") in ("system", "developer") for m in messages]
    system = [m for m, is_it in zip(messages, is_system, strict=True) if is_it]
    turns = [m for m, is_it in zip(messages, is_system, strict=True) if not is_it]
    fields = {k: row[k] for k in row.keys() & {"lang", "language", "source", "licence", "kind"}}
    if tools:
        fields["tools"] = tools
    fields |= answers
    for beginning in [turns] if reader.pairs else _beginnings(turns):
        candidate = {"messages": [*system, *beginning], **fields}
        try:
            (reader.pair if reader.pairs else reader.examples)(candidate, Report())
        except InvalidRequest:
            continue
        return candidate
    return None


def _beginnings(turns: list[Message]) -> Iterator[list[Message]]:
    """The conversation up to each of its answers, the longest first."""
    for end in range(len(turns), 0, -1):
        if turns[end - 1].get("role") == "assistant":
            yield turns[:end]


def _renamed(row: dict[str, Any]) -> dict[str, Any]:
    """The line with roles under their present names."""
    if not isinstance(row.get("messages"), list):
        return row
    messages = []
    for message in row["messages"]:
        if not isinstance(message, dict):
            return row
        name = str(message.get("role")).lower().replace("-", "_")
        messages.append({**message, "role": SPEAKERS.get(name, message.get("role"))})
    return {**row, "messages": messages}


def _holds_pairs(path: Path) -> bool:
    for _, lines in batches_of_lines([path]):
        for _, line in lines:
            try:
                return holds_preference(parse_line(line))
            except InvalidRequest:
                continue
    return False
