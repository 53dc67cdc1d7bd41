"""How fast Tekken encodes: ours against tiktoken, mistral-common and tokenizers, in turns.

    python benchmarks/tokenizer.py [--texts FILE ...] [--json FILE] [--quick]

Every encoder gets the same chunks of some 0.3 MB, one after the other, in changing order. "Fresh"
text is seen for the first time, as a server and a corpus see it; "repeated" text for the second,
when caches answer. Speeds are of processor time, so that other work on the machine counts little;
the rows in bulk are of clock time. Ratios are medians over the chunks, above 1 where ours is
better. Texts come from installed packages, or from JSON lines with "text" and "lang".
"""

import argparse
import ast
import gettext
import json
import os
import random
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import tiktoken
import tokenizers
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from rich.console import Console
from rich.table import Table

from opennemo.texts import Texts
from opennemo.tokenizer.patterns import SUPERWORDS
from opennemo.tokenizer.saving import save_huggingface
from opennemo.tokenizer.tekken import Tekken

CHUNK, N_CHUNKS = 300_000, 8
CJK = ("zh", "ja", "ko", "cmn", "jpn", "kor")
GOALS = {"english": 7.0, "code": 7.0, "multilingual": 2.5, "cjk": 2.5}
WORST = {
    "one letter": "a",
    "spaces": " ",
    "tabs": "\t",
    "digits": "7",
    "newlines": "\n",
    "combining marks": "\u0301",
    "no-break spaces": "\u00a0",
}
Encode = Callable[[str], Sequence[int]]


def folder_of(package: str) -> Path:
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


NEMO = folder_of("mistral_common") / "data" / "tekken_240718.json"


def installed_texts() -> Iterator[tuple[str, str]]:
    """(language, text): sources and their docstrings, and the world's names in 163 languages."""
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted([*library.glob("*.py"), *library.glob("[a-s]*/*.py")])
    random.Random(0).shuffle(files)
    for file in files:
        source = file.read_bytes().decode("utf-8", "replace")
        yield "code", source
    for package in ("torch", "transformers"):
        for file in sorted(folder_of(package).rglob("*.py"))[:1500]:
            documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
            nodes = ast.walk(ast.parse(file.read_bytes()))
            texts = (ast.get_docstring(node) for node in nodes if isinstance(node, documented))
            yield "en", "\n\n".join(filter(None, texts))
    for file in sorted(folder_of("pycountry").rglob("*.mo")):
        with file.open("rb") as opened:
            names = gettext.GNUTranslations(opened)._catalog  # type: ignore
        yield file.parts[-3], "\n".join(filter(None, map(str, names.values())))


def corpora(texts: Iterator[tuple[str, str]]) -> dict[str, list[list[str]]]:
    """Kind of text -> chunks of documents."""
    kinds: dict[str, list[str]] = {kind: [] for kind in GOALS}
    for language, text in texts:
        kind = {"en": "english", "code": "code"}.get(language, "multilingual")
        kinds["cjk" if language.startswith(CJK) else kind].append(text)
    chunked: dict[str, list[list[str]]] = {}
    for kind, documents in kinds.items():
        # Short documents of many languages are mixed, or every chunk would be one language.
        pieces = [d[i : i + 20_000] for d in documents for i in range(0, len(d), 20_000)]
        random.Random(0).shuffle(pieces)
        room = min(CHUNK, sum(map(n_bytes, pieces)) // N_CHUNKS)
        chunks: list[list[str]] = [[]]
        for piece in pieces:
            if sum(map(n_bytes, chunks[-1])) >= room:
                chunks.append([])
            chunks[-1].append(piece)
        if pieces:
            chunked[kind] = chunks[:N_CHUNKS]
    return chunked


def n_bytes(text: str) -> int:
    return len(text.encode("utf-8", "replace"))


def encoders() -> dict[str, Encode]:
    """Ours first, as it encodes corpora; then the peers."""
    ours = Tekken.load(NEMO)
    ours.expect_corpus()
    ranks = {token: rank for rank, token in enumerate(ours.tokens)}
    theirs = tiktoken.Encoding(
        "nemo", pat_str=ours.pattern, mergeable_ranks=ranks, special_tokens={}
    )
    mistral = Tekkenizer.from_file(NEMO)
    with tempfile.TemporaryDirectory() as folder:
        save_huggingface(ours, Path(folder))
        library = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
    return {
        "ours": ours.encode,
        "tiktoken": theirs.encode_ordinary,
        "mistral-common": lambda text: mistral.encode(text, bos=False, eos=False),
        "tokenizers": lambda text: library.encode(text, add_special_tokens=False).ids,
    }


def measure_speed(rows: list[dict], encoders: dict[str, Encode], kinds: dict) -> None:
    """MB of UTF-8 per second of processor time, on text seen for the first and the second time."""
    for kind, chunks in kinds.items():
        for seen in ("fresh", "repeated"):
            speeds: dict[str, list[float]] = {name: [] for name in encoders}
            for i, chunk in enumerate(chunks):
                order = list(encoders)
                order = order[i % len(order) :] + order[: i % len(order)]
                for name in order:
                    start = time.process_time()
                    for text in chunk:
                        encoders[name](text)
                    seconds = time.process_time() - start
                    speeds[name].append(sum(map(n_bytes, chunk)) / seconds / 1e6)
            for peer in list(encoders)[1:]:
                goal = GOALS[kind] if (seen, peer) == ("fresh", "tiktoken") else None
                ours, theirs = speeds["ours"], speeds[peer]
                ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
                rows.append(
                    row(f"{kind}, {seen}", ours, theirs, peer, "MB/s", goal)
                    | {"ratio": statistics.median(ratios)}
                )


def measure_bulk(rows: list[dict], kinds: dict, n_rounds: int) -> None:
    """MB per second of the clock, the best of some rounds, each in a process of its own.

    A large mixture shows what a second processor adds, if both are idle.
    """
    if not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2:
        return
    texts = {kind: [text for chunk in chunks for text in chunk] for kind, chunks in kinds.items()}
    best: dict[tuple[int, str, str], float] = {}
    for n_processors in (1, 2) * n_rounds:
        command = [sys.executable, __file__, "--bulk", str(n_processors)]
        done = subprocess.run(command, input=json.dumps(texts), text=True, stdout=-1, check=True)
        for name, kind, speed in json.loads(done.stdout):
            key = n_processors, name, kind
            best[key] = max(best.get(key, 0.0), speed)
    for kind in kinds:
        ours, theirs = best[1, "ours", kind], best[1, "tiktoken", kind]
        name = f"{kind}, fresh, bulk, 1 processor"
        rows.append(row(name, [ours], [theirs], "tiktoken", "MB/s", GOALS[kind]))
    for peer, goal in (("tiktoken", None), ("ours on 1", 1.6)):
        theirs = best[(2, "tiktoken", "mixture") if goal is None else (1, "ours", "mixture")]
        ours = best[2, "ours", "mixture"]
        rows.append(row("mixture, fresh, bulk, 2 processors", [ours], [theirs], peer, "MB/s", goal))


def bulk(n_processors: int) -> None:
    """In the process that `measure_bulk` starts: its speeds on so many processors."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:n_processors])
    ours = Tekken.load(NEMO)
    ours.encode_batch([f"{n} starts all threads" for n in range(100_000)])
    ranks = {token: rank for rank, token in enumerate(ours.tokens)}
    theirs = tiktoken.Encoding(
        "nemo", pat_str=ours.pattern, mergeable_ranks=ranks, special_tokens={}
    )
    speeds = []
    for kind, texts in {**json.load(sys.stdin), "mixture": mixture()}.items():
        size = sum(map(n_bytes, texts)) / 1e6
        start = time.perf_counter()
        ours.encode_batch(texts)
        between = time.perf_counter()
        if kind == "mixture":  # of which the slower one gets an eighth
            texts, size = texts[::8], size / 8
        theirs.encode_ordinary_batch(texts, num_threads=n_processors)
        seconds = time.perf_counter() - between
        whole = size * 8 if kind == "mixture" else size
        speeds += [("ours", kind, whole / (between - start)), ("tiktoken", kind, size / seconds)]
    json.dump(speeds, sys.stdout)


def mixture() -> list[str]:
    """40 MB of installed source code and its prose, in pieces."""
    texts, size = [], 0
    for file in sorted(folder_of("torch").parent.rglob("*.py")):
        text = file.read_bytes().decode("utf-8", "replace")
        texts += [text[i : i + 20_000] for i in range(0, len(text), 20_000)]
        size += len(text)
        if size > 40_000_000:
            break
    random.Random(0).shuffle(texts)
    return texts


def measure_moments(rows: list[dict], encoders: dict[str, Encode], kinds: dict) -> None:
    """Waiting times of users: loading, a chat prompt, and the longest malicious texts."""
    load, first = [], []
    for _ in range(5):
        start = time.process_time()
        tokenizer = Tekken.load(NEMO)
        load.append(time.process_time() - start)
        tokenizer.encode("Hello")
        first.append(time.process_time() - start)
    start = time.process_time()
    Tekkenizer.from_file(NEMO)
    theirs = [time.process_time() - start]
    rows.append(row("load", load, theirs, "mistral-common", "s", None))
    rows.append(row("load and encode", first, [0.3], "limit", "s", 1.0))

    fresh = Tekken.load(NEMO)
    for name, encode in {"as a prompt": fresh.encode, "as a corpus": encoders["ours"]}.items():
        times = []
        for i, chunk in enumerate(kinds["english"]):
            text = f"{name} {i} " + " ".join(chunk)[:9000].swapcase()  # not seen so far
            text = text[: len(text) * 2000 // len(encoders["tiktoken"](text))]
            start = time.perf_counter()
            encode(text)
            times.append((time.perf_counter() - start) * 1000)
        rows.append(row(f"prompt of 2,000 tokens, {name}", times, [2.0], "limit", "ms", 1.0))

    rng = random.Random(0)
    cases = {name: text * 1_000_000 for name, text in WORST.items()}
    cases["random CJK"] = "".join(chr(rng.randrange(0x4E00, 0xA000)) for _ in range(333_333))
    cases["random letters"] = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=1_000_000))
    for name, text in cases.items():
        first = Tekken.load(NEMO)
        for when, encode in {"as a prompt": first.encode, "as a corpus": encoders["ours"]}.items():
            start = time.thread_time()
            encode(text)
            seconds = [time.thread_time() - start]
            rows.append(row(f"a million: {name}, {when}", seconds, [1.0], "limit", "s", 1.0))


def measure_superwords(rows: list[dict], kinds: dict) -> None:
    """Processor time where a piece is a sentence, or a million bytes without a mark to split at."""
    ours = Tekken(SUPERWORDS["tekken"], Tekken.load(NEMO).tokens)
    ours.expect_corpus()
    ranks = {token: rank for rank, token in enumerate(ours.tokens)}
    theirs = tiktoken.Encoding(
        "superwords", pat_str=ours.pattern, mergeable_ranks=ranks, special_tokens={}
    )
    english = " ".join(text for chunk in kinds["english"] for text in chunk)
    words = re.findall("[A-Za-z]+", english)

    def fresh(i: int) -> dict[str, str]:
        """Texts that were not seen before."""
        shuffled = random.Random(i).sample(words, len(words))
        endless = " ".join(shuffled * (1 + 1_000_000 // len(" ".join(words))))[:1_000_000]
        part = english[i * len(english) // 3 : (i + 1) * len(english) // 3]
        return {"english": part, "a million bytes of words without a mark": endless}

    for name in fresh(0):
        speeds: dict[str, list[float]] = {"ours": [], "tiktoken": []}
        for i in range(3):
            text = fresh(i)[name]
            for peer, encode in (("ours", ours.encode), ("tiktoken", theirs.encode_ordinary)):
                start = time.process_time()
                encode(text)
                speeds[peer].append(n_bytes(text) / (time.process_time() - start) / 1e6)
        found = speeds["ours"], speeds["tiktoken"]
        rows.append(row(f"superwords, {name}", *found, "tiktoken", "MB/s", 1.0))


def row(
    name: str, ours: list[float], peer: list[float], peer_name: str, unit: str, goal: float | None
) -> dict:
    a, b = statistics.median(ours), statistics.median(peer)
    ratio = a / b if unit == "MB/s" else b / a
    return {
        "name": name,
        "ours": a,
        "peer": b,
        "peer_name": peer_name,
        "unit": unit,
        "ratio": ratio,
        "goal": goal,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--texts", type=Path, nargs="*", help="JSON lines, with text and lang")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--quick", action="store_true", help="less text, fewer rounds")
    parser.add_argument("--bulk", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bulk:
        bulk(options.bulk)
        return
    kinds = corpora(iter(Texts(options.texts)) if options.texts else installed_texts())
    if options.quick:
        kinds = {kind: chunks[:3] for kind, chunks in kinds.items()}
    rows: list[dict] = []
    tried = encoders()
    measure_speed(rows, tried, kinds)
    measure_moments(rows, tried, kinds)
    measure_superwords(rows, kinds)
    measure_bulk(rows, kinds, 1 if options.quick else 3)
    table = Table("", "ours", "peer", "", "ratio", "goal")
    for each in rows:
        reached = "" if each["goal"] is None else f"{each['goal']:g}"
        table.add_row(
            each["name"],
            f"{each['ours']:.3g} {each['unit']}",
            f"{each['peer']:.3g} {each['unit']}",
            each["peer_name"],
            f"{each['ratio']:.2f}",
            reached,
        )
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
