"""`opennemo tokenize`: from texts to the token shards that training reads."""

import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from opennemo.errors import InvalidRequest

app = typer.Typer()
ENGINES = ("processes", "ray")


@app.command()
def tokenize(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Files, folders or URLs: .jsonl, .parquet, .txt, .md, also as .gz or .zst."
        ),
    ],
    tokenizer: Annotated[
        str, typer.Option(help="A model, a tokenizer file, or opennemo-tekken-32k.")
    ],
    out: Annotated[Path, typer.Option(help="The folder to write, or to go on with.")],
    clean: Annotated[
        str,
        typer.Option(
            help="Stages, with commas: mojibake, nfc, identify, repetition, exact, near; or all."
        ),
    ] = "",
    language: Annotated[
        list[str] | None, typer.Option(help="Keep texts of this language alone; repeatable.")
    ] = None,
    min_chars: Annotated[int, typer.Option(help="Leave out shorter texts.")] = 1,
    max_chars: Annotated[int | None, typer.Option(help="Leave out longer texts.")] = None,
    shard_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of a shard.")] = 1 << 26,
    engine: Annotated[str, typer.Option(help="processes of this machine, or ray.")] = ENGINES[0],
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; by default one for each processor.")
    ] = None,
) -> None:
    """Turn texts into token shards, cleaned if asked to. After a kill, the same command goes on.

    The folder gets shards, index.json and report.json, which tells what was read, changed, left
    out and why. Engine and workers change nothing in them but the time it takes.
    """
    from rich.console import Console

    from opennemo.cli import _progress
    from opennemo.data.cleaning import STAGES, Cleaning
    from opennemo.data.parts import Job
    from opennemo.data.preparation import prepare
    from opennemo.data.tally import table
    from opennemo.model.hub import locate
    from opennemo.tokenizer.rank_files import OWN

    if engine not in ENGINES:
        raise InvalidRequest(f"--engine is {engine}, allowed are {', '.join(ENGINES)}")
    names = [name.strip() for name in clean.split(",") if name.strip()]
    job = Job(
        inputs=tuple(i if "://" in i else Path(i) for i in inputs),
        tokenizer=Path(OWN) if tokenizer == OWN else locate(tokenizer),
        out=out,
        cleaning=Cleaning(
            stages=STAGES if names == ["all"] else tuple(sorted({*names})),
            languages=tuple(language or ()),
            min_chars=min_chars,
            max_chars=max_chars,
        ),
        shard_tokens=shard_tokens,
    )
    began, shown = time.monotonic(), {}
    with ExitStack() as stack:

        def show(stage: str, done: int, total: int) -> None:
            if stage not in shown:
                stack.close()
                shown[stage] = stack.enter_context(_progress(stage.capitalize()))
            shown[stage](done, total)

        report = prepare(job, engine=engine, workers=workers or _processors(), progress=show)
    seconds = time.monotonic() - began
    Console().print(table(report))
    kept, read = report["kept"], report["read"]
    print(
        f"Wrote {out}: {kept['tokens']:,} tokens of {kept['documents']:,} documents, in "
        f"{seconds:,.0f} s ({read['text_bytes'] / 1e6 / max(seconds, 1e-3):,.1f} MB/s of text)"
    )
    if broken := read["unreadable_lines"]:
        print(f"{broken:,} lines were not UTF-8 or not JSON with a text", file=sys.stderr)


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
