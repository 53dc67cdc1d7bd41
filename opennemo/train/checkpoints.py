"""Checkpoints of a run: all that is needed to resume, written while training continues.

A checkpoint is a folder `step-00001000` that gets its name when everything is in it: each rank
writes its own shards into a hidden folder beside it, then rank 0 writes `checkpoint.json`, which
lists every file and plain number, and renames the folder. So a folder with a name is complete, and
older ones are removed only after that. Planning, resharding (any number of ranks reads what any
other wrote), copying aside so that training can continue, and reading are
torch.distributed.checkpoint's; files are its safetensors. This file adds guarantees: names only for
complete checkpoints, refusal of damaged or foreign ones, plain numbers without a pickle, and
writing tensor by tensor. PyTorch's own writer holds all of a rank's tensors twice more in memory,
and Python's lock while it copies them, which would block training.

All ranks must see the same folder. This file does not know what a model, an optimizer or a run is.
"""

import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.storage import WriteResult

from opennemo.errors import CheckpointError
from opennemo.files import read_json, sync, write_json
from opennemo.model.tensor_files import write_safetensors

INDEX = "checkpoint.json"
PLAIN = (bool, int, float, str, type(None))
# What reading a damaged file may raise.
DAMAGED = (
    OSError, SafetensorError, RuntimeError, ValueError, TypeError, LookupError, AttributeError,
    ArithmeticError, AssertionError,
)  # fmt: skip


class Checkpoints:
    """The checkpoints of one run; in a process group, every rank makes one and calls the same."""

    def __init__(self, folder: Path, *, keep: int):
        """Keep the newest `keep` checkpoints in `folder`, which is made with the first."""
        if keep < 1:
            raise ValueError(f"keep is {keep}, must be 1 or more")
        self.folder, self.keep = folder, keep
        # Its own group: saving runs in a thread beside training, which uses the default group.
        self._group: dist.ProcessGroup | None = None
        if dist.is_initialized():
            self._group = dist.new_group(backend="gloo")  # pyright: ignore[reportAttributeAccessIssue]
        self._saving: tuple[int, Future] | None = None

    def save(self, step: int, state: dict, *, wait: bool = False) -> None:
        """Copy the state aside and write it as the checkpoint of this step.

        Args:
            state: dicts and lists of tensors, sharded or the same on every rank, and of plain
                numbers and strings, the same on every rank.
            wait: until it is written; else only for the copy, and for the previous save.

        Raises:
            CheckpointError: as `wait`.
            TypeError: there is something else in the state.
        """
        self.wait()
        leaves = list(_leaves(state))
        tensors = {name: holder[key] for name, holder, key in leaves if _is_tensor(holder[key])}
        values = {name: holder[key] for name, holder, key in leaves if name not in tensors}
        if odd := [name for name, value in values.items() if not _is_plain(value)]:
            raise TypeError(f"neither tensors nor plain numbers: {', '.join(odd[:5])}")
        saving = async_save(
            tensors,
            storage_writer=_Writer(self.folder, step, self.keep, values),
            planner=DefaultSavePlanner(flatten_state_dict=False),
            process_group=self._group,
            no_dist=self._group is None,
        )
        assert isinstance(saving, Future)  # another type only with a stager of one's own
        self._saving = step, saving
        if wait:
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is being written.

        Raises:
            CheckpointError: what was being written could not be; older checkpoints are intact.
        """
        if self._saving is None:
            return
        (step, saving), self._saving = self._saving, None
        try:
            saving.result()
        except CheckpointException as error:
            if self._group is None or dist.get_rank() == 0:  # make room: all have stopped writing
                shutil.rmtree(_partial(self.folder, step), ignore_errors=True)
            rank, (cause, _) = min(error.failures.items())
            if not isinstance(cause, OSError):
                raise cause from error
            latest = self.latest()
            left = "there is none yet" if latest is None else f"the last complete is step {latest}"
            raise CheckpointError(
                f"{_path(self.folder, step)}: cannot be written by rank {rank}: {cause}; {left}"
            ) from None

    def latest(self) -> int | None:
        """The newest complete step, if there is one."""
        return max(_steps(self.folder), default=None)

    def load(self, state: dict, step: int | None = None) -> int:
        """Fill a state in place from a checkpoint, by default the newest; returns its step.

        Everything in the state must be there, in the same shape and type; other content is ignored.
        However many ranks wrote it, each of the present ranks reads its own part.

        Raises:
            CheckpointError: no checkpoint is there, it is damaged, or another kind of run wrote it.
        """
        step = self.latest() if step is None else step
        if step is None:
            raise CheckpointError(f"{self.folder}: there is no complete checkpoint in it")
        path = _path(self.folder, step)
        values, stored = _read_index(path)
        leaves = {name: (holder, key) for name, holder, key in _leaves(state)}
        tensors = {n: holder[key] for n, (holder, key) in leaves.items() if _is_tensor(holder[key])}
        wrong = [n for n in leaves if n not in (stored if n in tensors else values)]
        for name, tensor in tensors.items():
            expected = _layout(tensor.shape, tensor.dtype)
            wrong += [
                f"{name} ({key} {stored[name][key]}, not {value})"
                for key, value in expected.items()
                if name in stored and stored[name][key] != value
            ]
        if wrong:
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise CheckpointError(
                f"{path}: not of this run, missing or different: {', '.join(wrong[:5])}{more}"
            )
        try:
            load(
                tensors,
                storage_reader=HuggingFaceStorageReader(str(path)),
                planner=DefaultLoadPlanner(flatten_state_dict=False),
                process_group=self._group,
                no_dist=self._group is None,
            )
        except CheckpointException as error:
            rank, (cause, _) = min(error.failures.items())
            if not isinstance(cause, DAMAGED):
                raise cause from error
            raise CheckpointError(f"{path}: damaged ({cause}), says rank {rank}") from None
        for name, (holder, key) in leaves.items():
            if name not in tensors:
                value = values[name]  # JSON knows no tuples
                holder[key] = tuple(value) if isinstance(holder[key], tuple) else value
        return step


class _Writer(HuggingFaceStorageWriter):
    """Writes one checkpoint, called by PyTorch in the order of the methods below."""

    def __init__(self, folder: Path, step: int, keep: int, values: dict[str, Any]):
        self.folder, self.step, self.keep, self.values = folder, step, keep, values
        self.partial = _partial(folder, step)
        super().__init__(str(self.partial), save_distributed=True)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On rank 0, before any rank writes."""
        shutil.rmtree(self.partial, ignore_errors=True)  # of a run that was killed
        self.partial.mkdir(parents=True)
        return super().prepare_global_plan(plans)

    def write_data(
        self, plan: SavePlan, planner: SavePlanner
    ) -> torch.futures.Future[list[WriteResult]]:
        """This rank's shards, tensor by tensor, into one file."""
        path = self.partial / f"rank-{self.rank:05}.safetensors"
        items = {item.index.fqn: item for item in plan.items}
        assert len(items) == len(plan.items), "a rank holds one shard of a tensor"

        def read(name: str) -> Tensor:
            tensor = planner.resolve_data(items[name])
            assert isinstance(tensor, Tensor)
            return tensor.detach().cpu()

        layout, places = {}, {}
        for name, item in items.items():
            assert item.tensor_data is not None
            chunk = item.tensor_data.chunk
            layout[name] = item.tensor_data.properties.dtype, tuple(chunk.sizes)
            places[name] = {"saved_offsets": list(chunk.offsets)}
        if items:
            write_safetensors(path, layout, read, {"DCP_SHARDING_INFO": json.dumps(places)})
            sync(path)
        written = torch.futures.Future()
        written.set_result([WriteResult(item.index, 0, path.name) for item in plan.items])
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On rank 0, when all have written: give the folder its name, then remove old ones."""
        sizes = {file.name: file.stat().st_size for file in sorted(self.partial.iterdir())}
        index = {"step": self.step, "files": sizes, "values": self.values}
        write_json(self.partial / INDEX, index)
        sync(self.partial)
        path = _path(self.folder, self.step)
        if path.exists():  # a step saved for the second time
            _remove(path)
        self.partial.rename(path)
        sync(self.folder)
        for step in sorted(_steps(self.folder) - {self.step})[: -self.keep + 1 or None]:
            _remove(_path(self.folder, step))
        for left in self.folder.glob(".step-*"):  # of runs that were killed
            shutil.rmtree(left, ignore_errors=True)


def _leaves(node: dict | list, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every leaf of nested dicts and lists: its name, its container, and its key there."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        name = f"{path}/{key}" if path else str(key)
        if isinstance(value, dict) or (isinstance(value, list) and not _is_plain(value)):
            yield from _leaves(value, name)
        else:
            yield name, node, key


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, PLAIN)


def _layout(shape: torch.Size, dtype: torch.dtype) -> dict[str, Any]:
    return {"shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08}"


def _partial(folder: Path, step: int) -> Path:
    return folder / f".{_path(folder, step).name}.partial"


def _steps(folder: Path) -> set[int]:
    names = [path.name for path in folder.glob("step-*")]
    return {int(name[5:]) for name in names if re.fullmatch(r"step-\d+", name)}


def _remove(path: Path) -> None:
    """Remove a checkpoint; it loses its name first, so that a part is never mistaken for it."""
    doomed = path.with_name(f".{path.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _read_index(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The plain numbers of a checkpoint, and the layout of its tensors; its files are checked."""
    if not (path / INDEX).exists():
        raise CheckpointError(f"{path / INDEX}: No such file; not a whole checkpoint")
    index = read_json(path / INDEX)
    try:
        values, sizes = dict(index["values"]), dict(index["files"])
        if "tensors" in index and len(sizes) > 1:
            raise CheckpointError(
                f"{path}: several ranks of an older version wrote it, which this one cannot read"
            )
        names = {file.name for file in path.glob("*.safetensors")}
        for name in sorted(names ^ sizes.keys()):
            problem = "not in its index" if name in names else "No such file"
            raise CheckpointError(f"{path / name}: {problem}; not a whole checkpoint")
        for name, size in sizes.items():
            if (actual := (path / name).stat().st_size) != size:
                raise CheckpointError(f"{path / name}: damaged: has {actual:,} of {size:,} bytes")
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise CheckpointError(f"{path / INDEX}: damaged ({repr(error)[:300]})") from None
    layouts = {}
    try:
        stored = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
        for name, tensor in stored.items():
            assert isinstance(tensor, TensorStorageMetadata)
            if sum(chunk.sizes.numel() for chunk in tensor.chunks) != tensor.size.numel():
                raise ValueError(f"the parts of {name} do not make it up")
            layouts[name] = _layout(tensor.size, tensor.properties.dtype)
    except DAMAGED as error:
        raise CheckpointError(f"{path}: damaged ({repr(error)[:300]})") from None
    return values, layouts
