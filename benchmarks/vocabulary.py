"""How long it takes to learn a vocabulary, and in how much memory, against two other trainers.

    python benchmarks/vocabulary.py FILE ... [--vocab-size 32768]

Ours, `tokenizers` with the same split pattern, and SentencePiece (which cannot take it) learn from
the same files, each in a process of its own. Processor time counts, for all threads together, so
that what else the machine does counts little; bytes a token are measured on the same texts.
"""

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import sentencepiece
import tiktoken
import tokenizers
from rich.console import Console
from rich.table import Table

from opennemo.tokenizer.texts import Texts
from opennemo.tokenizer.training import VocabularySettings, train
from opennemo.tokenizer.words import PATTERNS

Count = Callable[[str], int]


def ours(texts: Texts, n: int) -> Count:
    tokenizer = train(texts, VocabularySettings(vocab_size=n)).tokenizer
    encoding = tiktoken.Encoding(
        "ours",
        pat_str=tokenizer.pattern,
        mergeable_ranks={token: rank for rank, token in enumerate(tokenizer.tokens)},
        special_tokens={},
    )
    return lambda text: len(encoding.encode_ordinary(text))


def hugging_face(texts: Texts, n: int) -> Count:
    steps = tokenizers.pre_tokenizers
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = steps.Split(tokenizers.Regex(PATTERNS["tekken"]), "isolated")
    as_bytes = steps.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = steps.Sequence([split, as_bytes])  # pyright: ignore[reportAttributeAccessIssue]
    trainer = tokenizers.trainers.BpeTrainer(  # pyright: ignore[reportCallIssue]
        vocab_size=n - 1000, initial_alphabet=steps.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((text for _, text in texts), trainer)
    return lambda text: len(tokenizer.encode(text).ids)


def sentence_piece(texts: Texts, n: int) -> Count:
    with tempfile.TemporaryDirectory() as folder:
        model = f"{folder}/model"
        sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
            sentence_iterator=(line for _, text in texts for line in text.splitlines() if line),
            model_prefix=model,
            model_type="bpe",
            vocab_size=n - 1000,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            minloglevel=2,
        )
        processor = sentencepiece.SentencePieceProcessor(model_file=f"{model}.model")
    return lambda text: len(processor.encode(text))


TRAINERS = {"ours": ours, "tokenizers": hugging_face, "SentencePiece": sentence_piece}


def measure(name: str, files: list[Path], n: int) -> tuple[float, float, float, float]:
    texts, start = Texts(files), time.perf_counter()
    count = TRAINERS[name](texts, n)
    wall, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    unit = 1e6 if sys.platform == "darwin" else 1e3
    n_bytes = sum(len(text.encode()) for _, text in texts)
    n_tokens = sum(count(text) for _, text in texts)
    return used.ru_utime + used.ru_stime, wall, used.ru_maxrss / unit, n_bytes / n_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description="learning a vocabulary, against other trainers")
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--vocab-size", type=int, default=32_768)
    options = parser.parse_args()
    table = Table(title=f"{options.vocab_size:,} ids from {len(Texts(options.files).files)} files")
    for column in ("", "CPU s", "times ours", "wall s", "peak MB", "bytes/token"):
        table.add_column(column, justify="right")
    first = 0.0
    for name in TRAINERS:
        # One worker, one job: peak memory is of a whole process.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            cpu, wall, peak, density = pool.apply(
                measure, (name, options.files, options.vocab_size)
            )
        first = first or cpu
        cells = (f"{cpu:.1f}", f"{cpu / first:.1f}", f"{wall:.1f}", f"{peak:,.0f}")
        table.add_row(name, *cells, f"{density:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
