"""Perplexity as bits per byte of text, so that models with different tokenizers can be compared.

A text is cut into windows of the model's context; each token is predicted once, from up to a whole
window before it (the harness's rolling windows do the same).
"""

import math
from collections.abc import Sequence
from pathlib import Path

from opennemo.errors import InvalidRequest
from opennemo.evals.rows import ResultRow
from opennemo.evals.runs import Run, score_all
from opennemo.evals.suites import Outcome, Request
from opennemo.llm import LLM
from opennemo.texts import Texts


def prepare(request: Request) -> None:
    """Raises InvalidRequest if no file of texts is named."""
    if not request.options.texts:
        raise InvalidRequest("--suite ppl needs --texts FILE, repeatable")


def measure(llm: LLM, request: Request, run: Run) -> Outcome:
    """Bits per byte of files of texts, one row for each language that they name."""
    return Outcome(bits_per_byte(llm, request.options.texts, run, request.limit))


def bits_per_byte(
    llm: LLM, files: Sequence[Path], run: Run, limit: int | None, window: int = 2048
) -> list[ResultRow]:
    """The rows.

    Args:
        limit: texts of each language.
        window: tokens of a prediction's context, at most.
    """
    documents: dict[str, list[str]] = {}
    for language, text in Texts(list(files)):
        texts = documents.setdefault(language or "", [])
        if text and (limit is None or len(texts) < limit):
            texts.append(text)
    window = min(window, llm.engine.max_context)
    pairs, owners, sizes = [], [], {}
    for name, text in ((f"{k}/{i}", t) for k, ts in documents.items() for i, t in enumerate(ts)):
        ids = [llm.tokenizer.bos_id, *llm.tokenizer.encode(text)]
        sizes[name] = float(len(text.encode()))
        for start in range(1, len(ids), window):
            end = min(len(ids), start + window)
            begin = max(0, end - 1 - window)  # the last window looks back as far as the others
            pairs.append((ids[begin:start], ids[start:end]))
            owners.append(name)
    bits = dict.fromkeys(sizes, 0.0)
    for name, (logprob, _) in zip(owners, score_all(llm, pairs, run), strict=True):
        bits[name] -= logprob / math.log(2)
    rows = []
    for language in documents:
        weights = {name: sizes[name] for name in sizes if name.rpartition("/")[0] == language}
        items = {name: bits[name] / size for name, size in weights.items()}
        rows.append(
            ResultRow(name="bits per byte", part=language, setting=f"windows of {window:,} tokens",
                items=items, weights=weights, percent=False)
        )  # fmt: skip
    return rows
