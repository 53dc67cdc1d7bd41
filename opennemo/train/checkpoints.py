"""Checkpoints of a run: all that is needed to go on, written while training goes on.

A checkpoint is a folder `step-00001000` that takes its name when everything is in it: each rank
writes its own shards into a hidden folder beside it, then rank 0 writes `checkpoint.json`, which
lists every file, tensor and plain number, and renames the folder. So what has a name is complete,
and older ones go only after that. Planning, resharding (any number of ranks reads what any other
wrote) and copying aside so that training can go on are torch.distributed.checkpoint's; files are
safetensors and JSON, for PyTorch's own writer pickles its index, and a pickle can run code.

All ranks must see the same folder. This file does not know what a model, an optimizer or a run is.
"""

import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult

from opennemo.errors import CheckpointError
from opennemo.files import sync
from opennemo.model.tensor_files import write_safetensors

INDEX = "checkpoint.json"
PLAIN = (bool, int, float, str, type(None))


class Checkpoints:
    """The checkpoints of one run; of a process group, every rank makes one and calls alike."""

    def __init__(self, folder: Path, *, keep: int):
        """Keep the newest `keep` checkpoints in `folder`, which is made with the first."""
        if keep < 1:
            raise ValueError(f"keep is {keep}, must be 1 or more")
        self.folder, self.keep = folder, keep
        # Of its own: saving goes on in a thread beside training, which uses the default group.
        self._group: dist.ProcessGroup | None = None
        if dist.is_initialized():
            self._group = dist.new_group(backend="gloo")  # pyright: ignore[reportAttributeAccessIssue]
        if self._group is None:  # PyTorch warns, at each save and load, that there is one process
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        self._saving: tuple[int, Future] | None = None

    def save(self, step: int, state: dict, *, wait: bool = False) -> None:
        """Copy the state aside and write it as the checkpoint of this step.

        Args:
            state: dicts and lists of tensors, sharded or the same on every rank, and of plain
                numbers and strings, the same on every rank.
            wait: until it is written; else only for the copy, and for the save before this one.

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
        """Until nothing is being written.

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

        What the state names must be there, in the same shape and type; what else is there is left.
        However many ranks wrote it, each of these reads its own part.

        Raises:
            CheckpointError: there is none, it is damaged, or was written by another kind of run.
        """
        step = self.latest() if step is None else step
        if step is None:
            raise CheckpointError(f"{self.folder}: there is no complete checkpoint in it")
        path = _path(self.folder, step)
        index = _read_index(path)
        leaves = {name: (holder, key) for name, holder, key in _leaves(state)}
        tensors = {n: holder[key] for n, (holder, key) in leaves.items() if _is_tensor(holder[key])}
        wrong = [n for n in leaves if n not in index["tensors" if n in tensors else "values"]]
        for name, tensor in tensors.items():
            found = index["tensors"].get(name, {})
            expected = {"shape": list(tensor.shape), "dtype": _dtype_name(tensor.dtype)}
            wrong += [
                f"{name} ({key} {found[key]}, not {value})"
                for key, value in expected.items()
                if found and found[key] != value
            ]
        if wrong:
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise CheckpointError(
                f"{path}: not of this run, missing or different: {', '.join(wrong[:5])}{more}"
            )
        try:
            load(
                tensors,
                storage_reader=_Reader(path, index),
                planner=DefaultLoadPlanner(flatten_state_dict=False),
                process_group=self._group,
                no_dist=self._group is None,
            )
        except CheckpointException as error:
            rank, (cause, _) = min(error.failures.items())
            if not isinstance(cause, OSError | SafetensorError | RuntimeError):
                raise cause from error
            raise CheckpointError(f"{path}: damaged ({cause}), says rank {rank}") from None
        for name, (holder, key) in leaves.items():
            if name not in tensors:
                value = index["values"][name]  # JSON knows no tuples
                holder[key] = tuple(value) if isinstance(holder[key], tuple) else value
        return step


class _Writer(StorageWriter):
    """Writes one checkpoint, called by PyTorch in the order of the methods below."""

    def __init__(self, folder: Path, step: int, keep: int, values: dict[str, Any]):
        self.folder, self.step, self.keep, self.values = folder, step, keep, values
        self.partial, self.rank = _partial(folder, step), 0

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None: ...

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.rank = kwargs["rank"]

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On rank 0, before any rank writes."""
        shutil.rmtree(self.partial, ignore_errors=True)  # of a run that was killed
        self.partial.mkdir(parents=True)
        return plans

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

        layout = {}
        for name, item in items.items():
            assert item.tensor_data is not None
            layout[name] = item.tensor_data.properties.dtype, tuple(item.tensor_data.chunk.sizes)
        if items:
            write_safetensors(path, layout, read)
            sync(path)
        written = torch.futures.Future()
        written.set_result(
            [
                WriteResult(index=item.index, size_in_bytes=0, storage_data=path.name)
                for item in plan.items
            ]
        )
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On rank 0, when all have written: give the folder its name, then let old ones go."""
        files = {r.index: r.storage_data for rank in results for r in rank}
        tensors = {}
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            tensors[name] = {
                "dtype": _dtype_name(tensor.properties.dtype),
                "shape": list(tensor.size),
                "chunks": [
                    {
                        "file": files[MetadataIndex(name, chunk.offsets)],
                        "offsets": list(chunk.offsets),
                        "shape": list(chunk.sizes),
                    }
                    for chunk in tensor.chunks
                ],
            }
        sizes = {name: (self.partial / name).stat().st_size for name in sorted(set(files.values()))}
        index = {"step": self.step, "files": sizes, "values": self.values, "tensors": tensors}
        (self.partial / INDEX).write_text(json.dumps(index), "utf-8")
        sync(self.partial / INDEX, self.partial)
        path = _path(self.folder, self.step)
        if path.exists():  # a step saved for the second time
            _remove(path)
        self.partial.rename(path)
        sync(self.folder)
        for step in sorted(_steps(self.folder) - {self.step})[: -self.keep + 1 or None]:
            _remove(_path(self.folder, step))
        for left in self.folder.glob(".step-*"):  # of runs that were killed
            shutil.rmtree(left, ignore_errors=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


class _Reader(StorageReader):
    """Reads one checkpoint, called by PyTorch in the order of the methods below."""

    def __init__(self, path: Path, index: dict[str, Any]):
        self.path, self.index = path, index

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None: ...

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors, files = {}, {}
        for name, tensor in self.index["tensors"].items():
            chunks = []
            for chunk in tensor["chunks"]:
                offsets = torch.Size(chunk["offsets"])
                chunks.append(ChunkStorageMetadata(offsets, torch.Size(chunk["shape"])))
                files[MetadataIndex(name, offsets)] = chunk["file"]
            properties = TensorProperties(getattr(torch, tensor["dtype"]))
            tensors[name] = TensorStorageMetadata(properties, torch.Size(tensor["shape"]), chunks)
        return Metadata(tensors, storage_data=files)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        self.files = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        """What this rank's shards overlap with, file by file; files are mapped, not read whole."""
        by_file: dict[str, list] = {}
        for item in plan.items:
            by_file.setdefault(self.files[item.storage_index], []).append(item)
        for name, items in by_file.items():
            with safe_open(self.path / name, framework="pt") as file:
                for item in items:
                    part = file.get_tensor(item.storage_index.fqn)
                    for dim, (start, length) in enumerate(
                        zip(item.storage_offsets, item.lengths, strict=True)
                    ):
                        part = part.narrow(dim, start, length)
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(part)
                    planner.commit_tensor(item, target)
        done = torch.futures.Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


def _leaves(node: dict | list, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every leaf of nested dicts and lists: its name, what holds it, and under which key."""
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


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08}"


def _partial(folder: Path, step: int) -> Path:
    return folder / f".{_path(folder, step).name}.partial"


def _steps(folder: Path) -> set[int]:
    names = [path.name for path in folder.glob("step-*")]
    return {int(name[5:]) for name in names if re.fullmatch(r"step-\d+", name)}


def _remove(path: Path) -> None:
    """A checkpoint; it loses its name first, so that a part of one is never taken for it."""
    doomed = path.with_name(f".{path.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _read_index(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, after a look at its files."""
    try:
        index = json.loads((path / INDEX).read_text("utf-8"))
        for name, size in index["files"].items():
            found = (path / Path(name).name).stat().st_size
            if found != size:
                raise CheckpointError(f"{path / name}: damaged: has {found:,} of {size:,} bytes")
        for tensor in index["tensors"].values():
            _check_parts(tensor, index["files"])
        return {"tensors": dict(index["tensors"]), "values": dict(index["values"])}
    except OSError as error:
        raise CheckpointError(
            f"{error.filename}: {error.strerror}; not a whole checkpoint"
        ) from None
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        what = repr(error)[:300]
        raise CheckpointError(f"{path / INDEX}: damaged ({what})") from None


def _check_parts(tensor: dict[str, Any], files: dict[str, int]) -> None:
    """Raises ValueError, or whatever looking raises, unless a tensor's parts can make it up."""
    shape, n_numbers = tensor["shape"], 0
    if not isinstance(getattr(torch, tensor["dtype"]), torch.dtype):
        raise ValueError("an unknown type of numbers")
    for part in tensor["chunks"]:
        if part["file"] not in files:
            raise ValueError("a part lies in a file that is not listed")
        for start, length, size in zip(part["offsets"], part["shape"], shape, strict=True):
            if any(type(n) is not int for n in (start, length, size)):
                raise ValueError("a place is no whole number")
            if not 0 <= start <= start + length <= size:
                raise ValueError("a part lies outside its tensor")
        n_numbers += math.prod(part["shape"])
    if n_numbers != math.prod(shape):
        raise ValueError("the parts of a tensor do not make it up")
