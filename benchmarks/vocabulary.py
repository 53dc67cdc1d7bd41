"""How long it takes to learn a vocabulary, and in how much memory, against two other trainers.

    python benchmarks/vocabulary.py [FILE ...] [--vocab-size 32768] [--json FILE]

Ours, `tokenizers` with the same split pattern, and SentencePiece (which cannot take it) learn from
the same files, each in a process of its own. Processor time counts, for all threads together, so
that other work on the machine counts little; bytes per token are measured on the same texts.
Without files these are sources and docstrings of installed packages and the world's names in 163
languages.
"""

import argparse
import importlib.util
import json
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

from opennemo.data.vocabulary import VocabularySettings, train
from opennemo.texts import Texts
from opennemo.tokenizer.patterns import PATTERNS

ROUNDS = 2  # of which the one with less processor time counts
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


MEASURED = (
    ("processor time", "s"),
    ("time on the clock", "s"),
    ("peak memory", "MB"),
    ("density", "bytes/token"),
)
TRAINERS = {"ours": ours, "tokenizers": hugging_face, "SentencePiece": sentence_piece}


def measure(name: str, files: list[Path], n: int) -> tuple[float, float, float, float]:
    texts, start, cpu = Texts(files), time.perf_counter(), time.process_time()
    count = TRAINERS[name](texts, n)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    used = resource.getrusage(resource.RUSAGE_SELF)
    unit = 1e6 if sys.platform == "darwin" else 1e3
    n_bytes = sum(len(text.encode()) for _, text in texts)
    n_tokens = sum(count(text) for _, text in texts)
    return cpu, wall, used.ru_maxrss / unit, n_bytes / n_tokens


def installed_texts(folder: Path) -> list[Path]:
    """A file of the texts of the encoding benchmark, by language."""
    spec = importlib.util.spec_from_file_location(
        "encoding", Path(__file__).with_name("tokenizer.py")
    )
    assert spec is not None and spec.loader is not None
    encoding = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(encoding)
    file = folder / "installed.jsonl"
    with file.open("w", encoding="utf-8") as lines:
        for language, text in encoding.installed_texts():
            lines.write(json.dumps({"lang": language, "text": text}) + "\n")
    return [file]


def main() -> None:
    parser = argparse.ArgumentParser(description="learning a vocabulary, against other trainers")
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--vocab-size", type=int, default=32_768)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    results: dict[str, tuple[float, float, float, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = options.files or installed_texts(Path(folder))
        for name in [*TRAINERS] * ROUNDS:
            # One worker, one job: peak memory is of a whole process.
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                result = pool.apply(measure, (name, files, options.vocab_size))
            results[name] = min(result, results.get(name, result))
    table = Table(title=f"{options.vocab_size:,} ids from {len(files)} files")
    for column in ("", "CPU s", "times ours", "wall s", "peak MB", "bytes/token"):
        table.add_column(column, justify="right")
    ours, rows = results["ours"], []
    for name, result in results.items():
        cpu, wall, peak, density = result
        cells = (f"{cpu:.1f}", f"{cpu / ours[0]:.1f}", f"{wall:.1f}", f"{peak:,.0f}")
        table.add_row(name, *cells, f"{density:.2f}")
        for i, (what, unit) in enumerate(MEASURED) if name != "ours" else ():
            ratio = ours[i] / result[i] if unit == "bytes/token" else result[i] / ours[i]
            goal = 3.0 if (name, what) == ("tokenizers", "processor time") else None
            rows.append(
                {
                    "name": f"learning {options.vocab_size:,} ids, {what}",
                    "ours": ours[i],
                    "peer": result[i],
                    "peer_name": name,
                    "unit": unit,
                    "ratio": ratio,
                    "goal": goal,
                }
            )
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
