"""A small model over several half hours of a card: sized by arithmetic, carried away in pieces."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from opennemo.errors import CheckpointError
from opennemo.model.checkpoint import load, save, weight_shapes
from opennemo.model.formats import FORMATS
from opennemo.model.transformer import PRESETS, Transformer
from opennemo.planning.estimate import plan, resolve_shape
from opennemo.planning.machines import parse_machines
from opennemo.tokenizer.tekken import SINGLE_BYTES, Tekken
from opennemo.train.config import Recipe, read_recipe
from opennemo.train.corpus import ShardWriter, describe_tokenizer
from opennemo.train.run import begin, finish, train
from opennemo.train.trainer import Stopped
from recipes import pieces
from recipes.pieces import MOST, pack, unpack

RECIPE = Path(__file__).parents[2] / "recipes" / "nano-hopper.toml"
BYTES = Tekken(r"(?s:.)", SINGLE_BYTES, n_special=64)


def test_it_fits_into_25_minutes_and_eight_pieces():
    recipe = read_recipe(RECIPE)
    config, stored, _ = resolve_shape(recipe, None, None)
    machines = parse_machines("1xh200", 1)
    machines = replace(machines, card=replace(machines.card, flops=790e12))  # measured elsewhere
    made = plan(recipe, config, machines, stored=stored, share_of_peak=0.4)
    assert not made.problems
    assert 1.6 * made.seconds < 25 * 60
    shapes = weight_shapes(config).values()
    size = sum(math.prod(shape) + 4 * shape[0] for shape in shapes) + 3_000_000  # and vocabulary
    assert size <= 8 * (MOST - pieces.HEADER)


def model(folder: Path) -> Transformer:
    torch.manual_seed(0)
    net = Transformer(PRESETS["tiny"])
    save(net, folder)
    (folder / "tekken.json").write_text("{}")
    return net


def test_pieces_hold_a_model_in_fp8_and_its_files(tmp_path: Path):
    net = model(tmp_path / "model")
    n = pack(tmp_path / "model", tmp_path / "pieces", pieces.HEADER + 9_000)
    files = sorted((tmp_path / "pieces").iterdir())
    assert len(files) == n > 3
    assert max(file.stat().st_size for file in files) <= pieces.HEADER + 9_000
    unpack(tmp_path / "pieces", tmp_path / "again")
    again, rounding = load(tmp_path / "again"), FORMATS["fp8"].weights
    for name, weight in net.state_dict().items():
        expected = weight
        if weight.dim() == 2:
            expected = rounding.dequantize(*rounding.quantize(weight), torch.float32)
        assert torch.equal(again.state_dict()[name], expected), name
    assert (tmp_path / "again" / "tekken.json").read_text() == "{}"
    # Once more loses nothing more.
    pack(tmp_path / "again", tmp_path / "pieces2")
    unpack(tmp_path / "pieces2", tmp_path / "third")
    third = load(tmp_path / "third").state_dict()
    assert all(torch.equal(third[name], w) for name, w in again.state_dict().items())


def test_pieces_that_are_missing_damaged_or_foreign_are_refused(tmp_path: Path):
    model(tmp_path / "model")
    pack(tmp_path / "model", tmp_path / "pieces", pieces.HEADER + 9_000)
    last = sorted((tmp_path / "pieces").iterdir())[-1]
    content = last.read_bytes()
    last.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="damaged: its content is not what was written"):
        unpack(tmp_path / "pieces", tmp_path / "again")
    last.unlink()
    with pytest.raises(CheckpointError, match=r"one of \d+ pieces, and \d+ are here"):
        unpack(tmp_path / "pieces", tmp_path / "again")
    with pytest.raises(CheckpointError, match="cannot be read"):
        unpack(tmp_path / "nothing", tmp_path / "again")
    with pytest.raises(CheckpointError, match="holds no model"):
        pack(tmp_path / "pieces" / "none", tmp_path / "more")
    with pytest.raises(CheckpointError, match="more than a piece holds"):
        pack(tmp_path / "model", tmp_path / "more", pieces.HEADER + 1)
    assert not (tmp_path / "again").exists() and not (tmp_path / "more").exists()


def rehearsal(folder: Path, model: str, **more: str) -> Recipe:
    """The recipe as it is, except for a tiny model, little text and 20 steps on a CPU."""
    source = f"[{{path='{folder / 'shards'}'}}]"
    settings = {
        "model": model, "steps": "20", "device": "cpu", "parallel.compile": "false",
        "data": f"{{train={source}, valid={source}, window=64, rows=4, micro_rows=2}}",
        "optim.lr": "0.01", "saving.every": "5", "evaluation.every": "10", **more,
    }  # fmt: skip
    return read_recipe(RECIPE, [f"{key}={value}" for key, value in settings.items()])


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_a_rehearsal_stops_goes_on_and_begins_the_next_half_hour_from_pieces(tmp_path: Path):
    BYTES.save(tmp_path / "tekken.json")
    (tmp_path / "shards").mkdir()
    writer = ShardWriter(tmp_path / "shards", describe_tokenizer(BYTES, "bytes"), shard_tokens=2000)
    text = Path(__file__).read_text()
    ids = torch.tensor([BYTES.bos_id, *BYTES.encode(text)]).numpy().astype("uint32")
    for _ in range(2):
        writer.add(ids, torch.tensor([len(ids)]).numpy(), torch.tensor([len(text)]).numpy())
    writer.finish()
    recipe = rehearsal(tmp_path, f"{{shape='tiny', tokenizer='{tmp_path / 'tekken.json'}'}}")
    trainer = begin(recipe, tmp_path / "first", quiet=True)
    update = trainer.update

    def stop_after_seven(step: int, batches: list) -> dict[str, float]:
        if step == 7:
            trainer.stop()  # the half hour is over
        return update(step, batches)

    trainer.update = stop_after_seven  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(Stopped):
        trainer.train()
    made = train(recipe, tmp_path / "first", quiet=True)
    first = losses(tmp_path / "first")
    assert len(first) == 20 and first[-1] < first[0] - 0.5
    pack(made["model"], tmp_path / "pieces")
    unpack(tmp_path / "pieces", tmp_path / "before")
    recipe = rehearsal(tmp_path, f"{{path='{tmp_path / 'before'}'}}", seed="1")
    trainer = begin(recipe, tmp_path / "second", quiet=True)
    trainer.train()
    second = losses(tmp_path / "second")
    assert second[0] < first[0] - 0.5  # what was learnt is still there
    assert second[-1] < first[-1]
    assert finish(trainer)["fp8-static"].is_dir()
