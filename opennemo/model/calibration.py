"""How large the inputs of a model's layers get on real text: what static formats round by."""

from collections.abc import Iterable
from pathlib import Path

import torch

from opennemo.errors import InvalidRequest
from opennemo.model.attention import Packed
from opennemo.model.checkpoint import load
from opennemo.model.quantization import calibration
from opennemo.tokenizer import load_tokenizer

WINDOW = 512  # tokens of each text


def largest_inputs(path: Path, texts: Iterable[str], n_tokens: int) -> dict[str, float]:
    """Run a model over the beginning of some texts and record how large its layers' inputs get.

    Raises:
        InvalidRequest: there is no text.
    """
    tokenizer, model = load_tokenizer(path), load(path, dtype=torch.float32)
    left = n_tokens
    with torch.inference_mode(), calibration(model) as largest:
        for text in texts:
            start = [tokenizer.bos_id] if tokenizer.add_bos else []
            ids = (start + tokenizer.encode(text))[: min(left, WINDOW)]
            if not ids:
                continue
            model(torch.tensor(ids), Packed.of(len(ids), window=model.config.sliding_window))
            left -= len(ids)
            if left <= 0:
                break
    if left == n_tokens:
        raise InvalidRequest("there is no text to calibrate on")
    return largest
