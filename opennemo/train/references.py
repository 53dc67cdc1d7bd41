"""Log-probabilities of pairs of answers from before training, stored in a run's folder."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from opennemo.files import open_whole
from opennemo.model.transformer import Transformer
from opennemo.train.objectives import sequence_log_probs
from opennemo.train.packing import ExampleRows, collate


@torch.no_grad()
def kept_log_probs(
    file: Path, model: Transformer, rows: ExampleRows, n_rows: int, *, writes: bool,
    show: Callable[[int], None],
) -> np.ndarray:  # fmt: skip
    """(pairs, 2) log-probabilities of the answers in the first rows: read, or computed and written.

    Args:
        show: called with how many rows are done.
    """
    if file.exists():
        return np.load(file, allow_pickle=False)
    device = model.norm.weight.device
    log_probs = np.zeros((len(rows.units), 2), np.float32)
    for index in range(n_rows):
        row = rows[index]
        of_row, _ = sequence_log_probs(
            model, collate([row], model.config.sliding_window).to(device)
        )
        log_probs[row.units] = of_row.float().cpu().numpy().reshape(-1, 2)
        show(index + 1)
    if writes:
        with open_whole(file) as content:
            np.save(content, log_probs)
    return log_probs
