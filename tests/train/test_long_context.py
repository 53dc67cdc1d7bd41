"""A model is taught to find a needle in a text, then to find it in texts that are far longer."""

from pathlib import Path

import numpy as np
import pytest
import torch

from opennemo.model.checkpoint import read_config, save
from opennemo.model.transformer import ModelConfig, Transformer
from opennemo.train.config import Optim, parse_recipe
from opennemo.train.objectives import hidden_of_targets, next_token
from opennemo.train.optim import optimizers
from opennemo.train.packing import IGNORED, PackedRow, collate
from opennemo.train.setup import make_model

N_HAY, N_KEYS, N_VALUES, N_NEEDLES = 32, 16, 16, 4
CONFIG = ModelConfig(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, hidden_dim=128, rope_theta=1e3,
    vocab_size=N_HAY + N_KEYS + N_VALUES, max_position_embeddings=64,
)  # fmt: skip


class Needles:
    """Rows of hay with four keys, each followed by its value, and at the end all are asked for."""

    def __init__(self, length: int, seed: int):
        self.length, self.seed = length, seed

    def __getitem__(self, index: int) -> PackedRow:
        random = np.random.default_rng((self.seed, self.length, index))
        ids = random.integers(0, N_HAY, self.length)
        end = self.length - 2 * N_NEEDLES
        keys = N_HAY + random.permutation(N_KEYS)[:N_NEEDLES]
        values = N_HAY + N_KEYS + random.integers(0, N_VALUES, N_NEEDLES)
        places = 2 * random.permutation(end // 2)[:N_NEEDLES]
        ids[places], ids[places + 1] = keys, values
        order = random.permutation(N_NEEDLES)
        ids[end::2], ids[end + 1 :: 2] = keys[order], values[order]
        targets = np.full(self.length, IGNORED, np.int64)
        targets[end::2] = values[order]
        return PackedRow(ids.astype(np.uint32), targets, np.array([self.length]), np.array([index]))


def learn(model: Transformer, length: int, n_rows: int, lr: float) -> None:
    """Until it has the needles of a pass right, at most 400 steps."""
    (optimizer,) = optimizers(model, Optim(weight_decay=0.0))
    rows = Needles(length, seed=1)
    for step in range(400):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 50)
        batch = collate([rows[step * n_rows + i] for i in range(n_rows)], None)
        loss, _ = next_token(model, batch)
        (loss / batch.n_units).backward()
        optimizer.step()
        optimizer.zero_grad()
        if float(loss.detach()) / batch.n_units < 0.01:
            return


@torch.no_grad()
def found(model: Transformer, length: int) -> float:
    """Share of needles that are found in 32 rows it has not seen."""
    rows = Needles(length, seed=2)
    hidden, targets, _ = hidden_of_targets(model, collate([rows[i] for i in range(32)], None))
    return float((model.output(hidden).argmax(-1) == targets).float().mean())


@pytest.mark.slow
def test_a_slower_rotation_and_longer_windows_make_a_context_eight_times_as_long(tmp_path: Path):
    """Half a minute."""
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, 0, 1.0 if "embeddings" in name else 0.125)
    for length in (16, 32, 64):
        learn(model, length, 64, 3e-3)
    assert found(model, 64) > 0.95
    assert found(model, 512) < 0.5, "what is to be learnt is there already"
    save(model, tmp_path / "short")
    settings = {
        "path": str(tmp_path / "short"), "rope_theta": 1e5, "max_position_embeddings": 512,
    }  # fmt: skip
    data = {"train": [{"path": "x"}], "window": 512}
    recipe = parse_recipe({"steps": 1, "model": settings, "data": data}, "test")
    longer = make_model(recipe, tmp_path / "short")
    for length in (128, 256, 512):
        learn(longer, length, 16, 1e-3)
    assert found(longer, 512) > 0.95 and found(longer, 64) > 0.95
    save(longer, tmp_path / "long")
    config = read_config(tmp_path / "long")
    assert (config.rope_theta, config.max_position_embeddings) == (1e5, 512)
