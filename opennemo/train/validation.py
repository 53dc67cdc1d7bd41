"""Chat files looked at before a run: what is in them, what is wrong, and a copy without it.

Repairing has one rule: a conversation is cut back to its last answer up to which it is good.
That takes care of questions without an answer, results without a call, calls to no tool and
conversations that are too long; whoever speaks under another name is renamed first. What has no
good beginning is left out, and listed. What a run would take (`Effort`) is arithmetic over the
model's shape, and the speed of this machine at multiplying matrices.

Like `utils/validate_data.py` and `utils/reformat_data.py` of mistral-finetune.
"""

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opennemo.errors import InvalidRequest
from opennemo.model.checkpoint import weight_shapes
from opennemo.model.transformer import ModelConfig
from opennemo.tokenizer import Tokenizer
from opennemo.tokenizer.messages import Message
from opennemo.train.conversations import (
    BadLine,
    Reader,
    Report,
    batches_of_lines,
    read_examples,
    read_pairs,
)
from opennemo.train.objectives import CHUNK
from opennemo.train.shapes import SPEAKERS, conversation_of, parse_line


@dataclass(frozen=True, kw_only=True)
class Effort:
    """What an epoch over some files takes, everything in float32."""

    n_rows: int  # of `max_tokens`, packed
    n_operations: float
    n_bytes: dict[str, int]  # by what needs them

    @classmethod
    def of(cls, config: ModelConfig, report: Report, max_tokens: int, rank: int | None) -> "Effort":
        """For a LoRA of a rank on every matrix, or, without one, for all weights."""
        shapes = weight_shapes(config)
        matrices = [s for name, s in shapes.items() if "layers." in name and len(s) == 2]
        n_weights, in_blocks = sum(map(math.prod, shapes.values())), sum(map(math.prod, matrices))
        n_learning = n_weights if rank is None else sum(rank * sum(shape) for shape in matrices)
        heads, kv_heads = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        # Two operations for a token and a weight, and as many for the gradient of the input, and
        # again for that of the weight where it learns. Only what is learned meets the head.
        passes = 6 if rank is None else 4
        head = config.dim * config.vocab_size
        scores = 6 * config.n_layers * heads * sum(n * n for n in report.lengths)
        operations = passes * (in_blocks * report.n_tokens + head * report.n_trained_tokens)
        # Of each token a block keeps the inputs of its norms, matrices, attention and SwiGLU.
        kept = 4 * config.dim + 4 * config.hidden_dim + 3 * heads + 2 * kv_heads
        kept += 0 if rank is None else rank * 7
        return cls(
            n_rows=math.ceil(report.n_tokens / max_tokens),
            n_operations=operations + scores,
            n_bytes={
                "weights": 4 * n_weights,
                # Adapters are weights, too; then gradients and AdamW's two averages.
                "what learns": 4 * n_learning * (3 if rank is None else 4),
                f"activations of {max_tokens:,} tokens": 4 * max_tokens * config.n_layers * kept,
                "some logits at a time, and their gradient": 2 * 4 * CHUNK * config.vocab_size,
            },
        )


def operations_per_second(seconds: float = 0.3) -> float:
    """What this machine reaches at multiplying matrices, in float32."""
    a = torch.randn(1024, 1024)
    torch.mm(a, a)
    n, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        torch.mm(a, a)
        n += 1
    return n * 2 * 1024**3 / (time.perf_counter() - start)


def validate(paths: Sequence[Path], tokenizer: Tokenizer, max_tokens: int) -> Report:
    """Read files as training would, conversations or preferences, whichever each file holds.

    Raises:
        InvalidRequest: a file cannot be read at all.
    """
    report = Report()
    for path in paths:
        read = read_pairs if _holds_pairs(path) else read_examples
        report.add(read([path], tokenizer, max_tokens=max_tokens)[1])
    return report


def fix(
    paths: Sequence[Path], out: Path, report: Report, tokenizer: Tokenizer, max_tokens: int
) -> list[BadLine]:
    """Write good lines as they are and bad ones repaired; the lines that had to be left out.

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
                        elif (row := repair(line, reader)) is not None:
                            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                        else:
                            left_out.append(problem)
    except FileExistsError:
        raise InvalidRequest(f"{out}: exists; choose another name") from None
    return left_out


def repair(line: bytes, reader: Reader) -> dict[str, Any] | None:
    """What is good of a line, in the shape of `messages`; None if nothing is."""
    try:
        row = _renamed(parse_line(line))
        messages, tools = conversation_of(row)
    except InvalidRequest:
        return None
    is_system = [m.get("role") in ("system", "developer") for m in messages]
    system = [m for m, is_it in zip(messages, is_system, strict=True) if is_it]
    turns = [m for m, is_it in zip(messages, is_system, strict=True) if not is_it]
    kept = {k: row[k] for k in row.keys() & {"lang", "language", "source", "licence", "kind"}}
    if tools:
        kept["tools"] = tools
    if reader.pairs:
        kept |= {key: row.get(key) for key in ("chosen", "rejected")}
    for beginning in [turns] if reader.pairs else _beginnings(turns):
        candidate = {"messages": [*system, *beginning], **kept}
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
    """The line with roles, functions and calls under the names that they have today."""
    if not isinstance(row.get("messages"), list):
        return row
    messages = []
    for message in row["messages"]:
        if not isinstance(message, dict):
            return row
        name = str(message.get("role")).lower().replace("-", "_")
        role = "tool" if name == "function" else SPEAKERS.get(name, message.get("role"))
        message = {**message, "role": role}
        if isinstance(call := message.pop("function_call", None), dict):
            message["tool_calls"] = [{"function": call}]
        messages.append(message)
    return {**row, "messages": messages}


def _holds_pairs(path: Path) -> bool:
    for _, lines in batches_of_lines([path]):
        for _, line in lines:
            try:
                return "chosen" in parse_line(line)
            except InvalidRequest:
                continue
    return False
