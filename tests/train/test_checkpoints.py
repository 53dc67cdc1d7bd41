"""A checkpoint is whole or is not there; other ranks can read it, and damage is named."""

import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from opennemo.errors import CheckpointError
from opennemo.model.parallel import head_weight, make_mesh, shard_, share
from opennemo.model.parallel import whole as gather
from opennemo.model.transformer import PRESETS, Transformer
from opennemo.train.checkpoints import Checkpoints
from tests.ranks import run_ranks


def trained(n_steps: int, seed: int = 0, **degrees: int) -> tuple[Transformer, torch.optim.AdamW]:
    """A tiny model after some steps, the same on any number of ranks."""
    torch.manual_seed(seed)
    model, mesh = Transformer(PRESETS["tiny"]), make_mesh("cpu", **degrees)
    shard_(model, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(n_steps):
        train(model, optimizer, mesh)
    return model, optimizer


def train(model: Transformer, optimizer: torch.optim.AdamW, mesh: Any = None) -> None:
    part = share(mesh, torch.tensor([0, 12, 20]).int(), 12)
    hidden = model(torch.arange(20)[part.inputs], part.attend)
    losses = F.linear(hidden, head_weight(model)).square()
    n_copies = 1 if mesh is None else mesh.fsdp.size()  # all of these see the same
    (losses.sum() / 1000 / n_copies).backward()
    optimizer.step()
    optimizer.zero_grad()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, n_tokens: int = 0) -> dict:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optim": moments, "trainer": {"n_tokens": n_tokens}}


def whole(state: dict) -> dict[str, torch.Tensor]:
    """Every tensor of a state, gathered."""
    found = {}
    for key, value in state.items():
        if isinstance(value, dict):
            found |= {f"{key}/{name}": tensor for name, tensor in whole(value).items()}
        elif isinstance(value, torch.Tensor):
            found[key] = gather(value).clone()
    return found


def assert_equal(a: dict, b: dict) -> None:
    a, b = whole(a), whole(b)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_what_is_loaded_is_what_was_saved_though_training_went_on(tmp_path: Path):
    model, optimizer = trained(2)
    state = state_of(model, optimizer, 40)
    state["trainer"] |= {
        "rng": torch.get_rng_state(), "loss": 0.1 + 0.2, "worst": float("inf"), "note": None,
        "betas": (0.9, 0.95), "shards": ["a", "b"], "mask": torch.tensor([True, False]),
    }  # fmt: skip
    before = {name: tensor.clone() for name, tensor in whole(state).items()}
    checkpoints = Checkpoints(tmp_path / "run", keep=2)
    checkpoints.save(2, state)
    train(model, optimizer)  # while it is being written
    checkpoints.wait()
    model, optimizer = trained(1, seed=1)
    other = state_of(model, optimizer)
    other["trainer"] |= {
        "rng": torch.zeros_like(before["trainer/rng"]), "loss": 0, "worst": 0, "note": "",
        "betas": (), "shards": [], "mask": torch.tensor([False, False]),
    }  # fmt: skip
    assert Checkpoints(tmp_path / "run", keep=2).load(other) == 2
    assert_equal(before, whole(other))
    plain = {k: v for k, v in state["trainer"].items() if not isinstance(v, torch.Tensor)}
    assert plain == {k: other["trainer"][k] for k in plain}
    set_state_dict(
        model, optimizer, model_state_dict=other["model"], optim_state_dict=other["optim"]
    )
    train(model, optimizer)
    uninterrupted, _ = trained(3)
    assert_equal(dict(uninterrupted.named_parameters()), dict(model.named_parameters()))


def test_the_newest_are_kept_and_only_complete_ones_are_seen(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest() is None
    with pytest.raises(CheckpointError, match="there is no complete checkpoint"):
        checkpoints.load({"x": torch.zeros(1)})
    (tmp_path / ".step-00000009.partial").mkdir()  # as a run that was killed leaves it
    (tmp_path / "step-tensors").mkdir()
    assert checkpoints.latest() is None
    for step, latest in ((5, 5), (10, 10), (15, 15), (10, 15)):
        checkpoints.save(step, {"x": torch.tensor([step])}, wait=True)
        assert checkpoints.latest() == latest
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-00000010", "step-00000015", "step-tensors"]
    state = {"x": torch.zeros(1, dtype=torch.int64)}
    assert (checkpoints.load(state, 10), int(state["x"])) == (10, 10)
    with pytest.raises(CheckpointError, match=r"step-00000005.*not a whole checkpoint"):
        checkpoints.load(state, 5)


def test_a_damaged_or_foreign_checkpoint_is_refused_in_one_line(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep=9)
    state = {"model": {"w": torch.arange(6.0).view(2, 3)}, "trainer": {"step": 1}}
    checkpoints.save(1, state, wait=True)
    for wrong, message in (
        ({"model": {"w": torch.zeros(3, 2)}}, r"model/w \(shape \[2, 3\], not \[3, 2\]\)"),
        ({"model": {"w": torch.zeros(2, 3).half()}}, "dtype float32, not float16"),
        ({"model": {"v": torch.zeros(2, 3)}}, "missing or different: model/v"),
        ({"trainer": {"n_tokens": 0}}, "trainer/n_tokens"),
    ):
        with pytest.raises(CheckpointError, match=message):
            checkpoints.load(wrong)
    (file,) = (tmp_path / "step-00000001").glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=f"{file.name}: damaged: has .* bytes"):
        checkpoints.load(state)
    file.write_bytes(b"\xff" * len(whole))
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoints.load(state)
    file.unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        checkpoints.load(state)
    index = tmp_path / "step-00000001" / "checkpoint.json"
    index.write_text('{"files": {"a": 1, "b": 1}, "values": {}, "tensors": {}}')
    with pytest.raises(CheckpointError, match="several ranks of an older version wrote it"):
        checkpoints.load(state)
    index.write_text('{"files": 3}')
    with pytest.raises(CheckpointError, match=r"checkpoint\.json: damaged"):
        checkpoints.load(state)
    with pytest.raises(TypeError, match="trainer/odd"):
        checkpoints.save(2, {"trainer": {"odd": object()}})


def test_a_full_disk_is_told_in_one_line_and_leaves_the_last_checkpoint(tmp_path: Path):
    """As a full disk does, a limit on the size of files ends a write in the middle."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    state = {"x": torch.ones(500_000)}
    checkpoints.save(1, state, wait=True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        checkpoints.save(2, {"x": torch.zeros(500_000)})
        with pytest.raises(CheckpointError) as error:
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = str(error.value)
    assert "step-00000002: cannot be written by rank 0" in message and "\n" not in message
    assert message.endswith("the last complete is step 1")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoints.load({"x": torch.zeros(500_000)}) == 1
    checkpoints.save(2, state, wait=True)
    assert checkpoints.latest() == 2


SAVER = """
import os, signal, sys, torch
from pathlib import Path
from opennemo.train.checkpoints import Checkpoints
checkpoints = Checkpoints(Path(sys.argv[1]), keep=1)
checkpoints.save(1, {"x": torch.full((10_000_000,), 1.0)}, wait=True)
Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
checkpoints.save(2, {"x": torch.full((10_000_000,), 2.0)}, wait=True)
"""


def test_a_kill_in_the_middle_of_a_save_leaves_the_checkpoint_before(tmp_path: Path):
    """The worst moment: all is written, and the folder has not its name yet."""
    saver = subprocess.run([sys.executable, "-c", SAVER, str(tmp_path)], check=False)
    assert saver.returncode == -signal.SIGKILL
    assert (tmp_path / ".step-00000002.partial").exists()
    checkpoints = Checkpoints(tmp_path, keep=1)
    state = {"x": torch.zeros(10_000_000)}
    assert checkpoints.load(state) == 1 and state["x"].eq(1).all()
    checkpoints.save(2, {"x": torch.zeros(3)}, wait=True)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def save_sharded(folder: Path, degrees: dict) -> dict:
    """On each rank: two steps, a checkpoint, and what should be in it."""
    checkpoints = Checkpoints(folder, keep=2)
    state = state_of(*trained(2, **degrees), 40)
    state["trainer"]["seen"] = torch.arange(3)
    state["trainer"][f"rng{dist.get_rank()}"] = torch.tensor([dist.get_rank()])
    checkpoints.save(2, state)
    gathered = whole(state)
    checkpoints.wait()
    return gathered


def load_sharded(folder: Path, degrees: dict) -> tuple[dict, int]:
    """On each rank: load; what was loaded, and its step."""
    checkpoints = Checkpoints(folder, keep=2)
    state = state_of(*trained(1, seed=1, **degrees))
    step = checkpoints.load(state)
    gathered = whole(state)
    if dist.get_rank() == 0:
        (folder / "step-00000003" / "rank-00000.safetensors").unlink()
    dist.barrier()
    with pytest.raises(CheckpointError, match="step-00000003"):
        checkpoints.load(state)
    return gathered, step


@pytest.mark.parametrize(
    ("writers", "readers"),
    [
        ({"tensor_parallel": 2}, {}),
        pytest.param({}, {"tensor_parallel": 2}, marks=pytest.mark.slow),
        pytest.param(
            {"tensor_parallel": 2, "data_parallel_shard": 2},
            {"data_parallel_replicate": 2, "data_parallel_shard": 2},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_any_number_of_ranks_reads_what_any_other_wrote(
    tmp_path: Path, writers: dict, readers: dict
):
    n_ranks = 4 if len(writers) > 1 else 2
    written, *_ = run_ranks(n_ranks, save_sharded, tmp_path, writers)
    files = sorted(path.name for path in (tmp_path / "step-00000002").iterdir())
    ranks = [f"rank-{rank:05}.safetensors" for rank in range(n_ranks)]
    assert files == ["checkpoint.json", *ranks]
    stored = HuggingFaceStorageReader(str(tmp_path / "step-00000002")).read_metadata()
    tensor = stored.state_dict_metadata["model/layers.0.feed_forward.w1.weight"]
    assert isinstance(tensor, TensorStorageMetadata)
    rows = 96 // n_ranks
    assert sorted((*chunk.offsets, *chunk.sizes) for chunk in tensor.chunks) == [
        (start, 0, rows, 48) for start in range(0, 96, rows)
    ]
    # Several ranks -> one, which takes the very step that it would have taken alone.
    checkpoints = Checkpoints(tmp_path, keep=2)
    model, optimizer = trained(1, seed=1)
    state = state_of(model, optimizer)
    state["trainer"] |= {"rng1": torch.tensor([9]), "seen": torch.zeros(3, dtype=torch.int64)}
    assert checkpoints.load(state) == 2 and state["trainer"]["n_tokens"] == 40
    assert int(state["trainer"]["rng1"]) == 1 and state["trainer"]["seen"].tolist() == [0, 1, 2]
    assert_equal(state["model"], {n[6:]: t for n, t in written.items() if n.startswith("model/")})
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"]
    )
    train(model, optimizer)
    alone, _ = trained(3)
    for name, weight in alone.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), weight, rtol=0, atol=5e-4)
    # One -> several.
    state = state_of(model, optimizer)
    checkpoints.save(3, state, wait=True)
    for gathered, step in run_ranks(n_ranks, load_sharded, tmp_path, readers):
        assert step == 3
        assert_equal(gathered, whole(state))
