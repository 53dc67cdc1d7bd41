"""Rows of packed sequences: what a step of training computes on.

Whatever the objective, training asks for row `i` of an endless list and gets ids laid end to end,
with a target for each id that is to be learned. Row `i` depends on the seed and on `i` alone, so
a resumed run, and any number of ranks, see the same data. Of text, documents are cut into rows
of one width; conversations stay whole, and are packed into rows that are as full as they can be
made (first fit over a shuffled list). No sequence sees another: `cu_seqlens` keeps them apart.
Answers to one prompt (a preference's two, a group of samples) fork: the prompt is a sequence of its
own, and each answer one that continues where it ends (`Forked`).

This file does not know what the ids mean.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from opennemo.model.attention import Forked, Packed
from opennemo.model.positions import Window
from opennemo.train.conversations import Example, Pair, n_shared
from opennemo.train.corpus import Corpus

IGNORED = -100  # marks an id without a target


class PackedRow(NamedTuple):
    ids: np.ndarray  # (T,) uint32
    targets: np.ndarray  # (T,) int64, the next id or IGNORED
    lengths: np.ndarray  # (S,) of the sequences that lie in it
    units: np.ndarray  # which examples, if they are numbered
    parents: tuple[int, ...] = ()  # (S,) as of `Forked`, or none: no sequence continues another


class PackedRows(Protocol):
    """An endless list of rows."""

    def __getitem__(self, index: int) -> PackedRow: ...


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows laid end to end, as tensors on the device."""

    tokens: Tensor  # (T,) int64
    targets: Tensor  # (T,) int64, IGNORED where nothing is to be learned
    cu_seqlens: Tensor  # (S + 1,) int32
    max_seqlen: int
    window: Window  # ModelConfig.sliding_window
    n_units: int  # what the loss is a mean over: targets, or pairs
    parents: tuple[int, ...] = ()  # (S,) as of `Forked`, or none
    reference: Tensor | None = None  # (A,) log-probabilities of answers under the reference model
    drawn: Tensor | None = None  # (T',) of targets, under the model that drew them
    gains: Tensor | None = None  # (T',) what each target's answer is worth above its group's mean

    def attend(self) -> Packed | Forked:
        if self.parents:
            return Forked(self.cu_seqlens, self.parents, self.window)
        return Packed(self.cu_seqlens, self.max_seqlen, self.window)

    @property
    def answers(self) -> Tensor:
        """(A,) places of the sequences that no other continues."""
        n = len(self.cu_seqlens) - 1
        ends = sorted(set(range(n)) - set(self.parents))
        return torch.tensor(ends, device=self.cu_seqlens.device)

    @property
    def n_seen(self) -> float:
        """How many pairs of tokens see each other."""
        lengths = self.cu_seqlens.diff().double()
        seen = lengths.square().sum() / 2
        for i, parent in enumerate(self.parents):
            while parent >= 0:
                seen += lengths[i] * lengths[parent]
                parent = self.parents[parent]
        return float(seen)

    def to(self, device: torch.device) -> "Batch":
        moved = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)


class TextRows:
    """Windows of a corpus; the target of an id is the next one of its document."""

    def __init__(self, corpus: Corpus):
        self.corpus = corpus

    def __getitem__(self, index: int) -> PackedRow:
        ids, lengths = self.corpus[index]
        targets = np.full(len(ids), IGNORED, np.int64)
        targets[:-1] = ids[1:]
        targets[np.cumsum(lengths) - 1] = IGNORED  # a document's last id is followed by another's
        return PackedRow(ids, targets, lengths, np.empty(0, np.int64))


class ExampleRows:
    """Examples, or pairs of them, packed whole; `n` rows make an epoch, shuffled anew each time."""

    def __init__(self, units: Sequence[Example | Pair], width: int, seed: int):
        """Each unit must fit `width` tokens, where what a pair's answers share counts once."""
        self.units = [
            (unit.chosen, unit.rejected) if isinstance(unit, Pair) else (unit,) for unit in units
        ]
        self.seed = seed
        sizes = np.array([sum(map(len, fork(unit)[0])) for unit in self.units])
        order = np.random.default_rng((seed, len(sizes))).permutation(len(sizes))
        self.rows = first_fit(sizes, order, width)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> PackedRow:
        epoch, place = divmod(index, len(self.rows))
        order = np.random.default_rng((self.seed, epoch, len(self.rows))).permutation(len(self))
        numbers = self.rows[order[place]]
        return pack([self.units[number] for number in numbers])._replace(units=np.array(numbers))


def pack(units: Sequence[Sequence[Example]]) -> PackedRow:
    """Units laid end to end, the answers of each behind what they share."""
    ids, targets, parents = [], [], []
    for unit in units:
        parts, targets_of, places = fork(unit)
        parents += [p if p < 0 else p + len(ids) for p in places]
        ids += parts
        targets += targets_of
    lengths = np.array([len(part) for part in ids])
    forks = tuple(parents) if any(p >= 0 for p in parents) else ()
    return PackedRow(
        np.concatenate(ids), np.concatenate(targets), lengths, np.empty(0, np.int64), forks
    )


def fork(unit: Sequence[Example]) -> tuple[list[np.ndarray], list[np.ndarray], list[int]]:
    """Ids, targets and parents of the sequences that a unit becomes: its trunk, then its answers.

    A trunk ends before the first id with a target, so an answer begins with the id before that.
    """
    ids, targets = [e.ids for e in unit], [example_targets(e) for e in unit]
    n = n_shared(unit)
    if not n:
        return ids, targets, [-1] * len(unit)
    trunk, silent = ids[0][:n], np.full(n, IGNORED, np.int64)
    return (
        [trunk, *(x[n:] for x in ids)], [silent, *(x[n:] for x in targets)], [-1] + [0] * len(unit)
    )  # fmt: skip


def example_targets(example: Example) -> np.ndarray:
    """(T,) int64: the next id where the model should write it."""
    targets = np.full(len(example.ids), IGNORED, np.int64)
    targets[:-1] = np.where(example.mask[1:], example.ids[1:].astype(np.int64), IGNORED)
    return targets


def first_fit(sizes: np.ndarray, order: np.ndarray, width: int) -> list[list[int]]:
    """Numbers of units by row: each goes into the row with the least room that is enough for it."""
    assert sizes.max(initial=0) <= width
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # room that is left and row, by room
    for unit in order:
        size = int(sizes[unit])
        at = bisect.bisect_left(rooms, (size, -1))
        room, row = rooms.pop(at) if at < len(rooms) else (width, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(int(unit))
        if room > size:
            bisect.insort(rooms, (room - size, row))
    return rows


def collate(
    rows: Sequence[PackedRow], window: Window, references: np.ndarray | None = None
) -> Batch:
    """Lay rows end to end. With `references` (pairs, 2) the units are pairs, else targets."""
    lengths = np.concatenate([row.lengths for row in rows])
    targets = np.concatenate([row.targets for row in rows])
    numbers = np.concatenate([row.units for row in rows])
    paired = references is not None
    firsts = np.cumsum([0, *(len(row.lengths) for row in rows)])
    parents = [
        parent if parent < 0 else parent + int(first)
        for row, first in zip(rows, firsts, strict=False)
        for parent in row.parents or [-1] * len(row.lengths)
    ]
    return Batch(
        tokens=torch.from_numpy(np.concatenate([row.ids for row in rows]).astype(np.int64)),
        targets=torch.from_numpy(targets),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32)),
        max_seqlen=int(lengths.max()),
        window=window,
        parents=tuple(parents) if max(parents) >= 0 else (),
        n_units=len(numbers) if paired else int((targets != IGNORED).sum()),
        reference=torch.from_numpy(references[numbers].ravel()) if paired else None,
    )


def step_rows(step: int, n_rows: int, rank: int, world: int) -> range:
    """The numbers of the rows that a rank computes in a step.

    A step's rows follow the last step's; ranks take equal shares, in order.
    """
    assert n_rows % world == 0
    share = n_rows // world
    first = step * n_rows + rank * share
    return range(first, first + share)
