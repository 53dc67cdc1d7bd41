"""Perplexity: bits per byte are those of the definition."""

import math

import pytest
import torch

from opennemo.errors import InvalidRequest
from opennemo.evals import perplexity
from opennemo.evals.evaluate import evaluate
from opennemo.evals.report import read
from opennemo.evals.runs import Run
from opennemo.evals.suites import Request, TextFiles
from opennemo.model.attention import Packed
from opennemo.model.checkpoint import load
from tests.evals.conftest import write_lines

TEXTS = ["in the winter " * 20, "rivers run under ice", "", "né 🦙 " * 30]


@torch.inference_mode()
def bits(folder, tokenizer, text: str, window: int) -> float:
    """The definition: each window in a pass of its own, with what stands before it."""
    model = load(folder, dtype=torch.float32)
    ids, total = [tokenizer.bos_id, *tokenizer.encode(text)], 0.0
    for start in range(1, len(ids), window):
        end = min(len(ids), start + window)
        seen = ids[max(0, end - 1 - window) : end]
        hidden = model(torch.tensor(seen), Packed.of(len(seen)))
        logprobs = model.output(hidden[:-1]).log_softmax(-1)
        new = end - start
        total -= logprobs.gather(1, torch.tensor(seen[1:])[:, None])[-new:].sum().item()
    return total / math.log(2)


def test_bits_per_byte_are_those_of_the_definition(folder, llm, tmp_path):
    write_lines(tmp_path / "texts.jsonl", [
        {"text": text, "language": "fr" if "né" in text else "en"} for text in TEXTS
    ])  # fmt: skip
    for window in (50, 2048):
        run = Run(tmp_path / str(window), {})
        rows = {
            r.part: r
            for r in perplexity.bits_per_byte(llm, [tmp_path / "texts.jsonl"], run, None, window)
        }
        for part, texts in (("en", TEXTS[:2]), ("fr", TEXTS[3:])):
            total = sum(bits(folder, llm.tokenizer, text, min(window, 1024)) for text in texts)
            size = sum(len(text.encode()) for text in texts)
            assert rows[part].score == pytest.approx(total / size, rel=1e-4)
    assert rows["en"].n == 2 and rows["fr"].error is None
    asked = Request(
        model=str(folder),
        suite="ppl",
        options=TextFiles(texts=(tmp_path / "texts.jsonl",)),
        output=tmp_path / "out",
        kv_format="fp32",
    )
    evaluate(asked, [])
    assert read(tmp_path / "out")[1][0].score == rows["en"].score
    with pytest.raises(InvalidRequest, match="--texts"):
        evaluate(Request(model=str(folder), suite="ppl"), [])
