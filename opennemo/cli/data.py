"""`opennemo tokenize` and `validate-data`: the data of a run, before it is trained on."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from opennemo.cli.options import DEFAULT_MODEL, one_of, processors, tokenizer_path
from opennemo.progress import clock, count, stages

app = typer.Typer()
ENGINES = ("processes", "ray")
SHOWN = 20  # bad lines on the screen; --fix lists those it leaves out in full


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
    out: Annotated[Path, typer.Option(help="The folder to write, or to resume.")],
    clean: Annotated[
        str,
        typer.Option(
            help="Stages, with commas: mojibake, nfc, identify, repetition, exact, near; or all."
        ),
    ] = "",
    language: Annotated[
        list[str] | None, typer.Option(help="Keep only texts of this language; repeatable.")
    ] = None,
    min_chars: Annotated[int, typer.Option(help="Leave out shorter texts.")] = 1,
    max_chars: Annotated[int | None, typer.Option(help="Leave out longer texts.")] = None,
    shard_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of a shard.")] = 1 << 26,
    engine: Annotated[str, typer.Option(help="processes of this machine, or ray.")] = ENGINES[0],
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; by default one for each processor.")
    ] = None,
) -> None:
    """Turn texts into token shards, cleaned if asked to. After a kill, the same command resumes.

    The folder gets shards, index.json and report.json, which lists what was read, changed and left
    out, and why. Engine and workers change only the time it takes, not the content.
    """
    from rich.console import Console

    from opennemo.data.cleaning import STAGES, Cleaning
    from opennemo.data.parts import Job
    from opennemo.data.preparation import prepare
    from opennemo.data.tally import table

    one_of("--engine", engine, ENGINES)
    names = [name.strip() for name in clean.split(",") if name.strip()]
    job = Job(
        inputs=tuple(i if "://" in i else Path(i) for i in inputs),
        tokenizer=tokenizer_path(tokenizer),
        out=out,
        cleaning=Cleaning(
            stages=STAGES if names == ["all"] else tuple(sorted({*names})),
            languages=tuple(language or ()),
            min_chars=min_chars,
            max_chars=max_chars,
        ),
        shard_tokens=shard_tokens,
    )
    began = time.monotonic()
    with stages("bytes") as show:
        report = prepare(
            job,
            engine=engine,
            workers=workers or processors(),
            progress=show,
        )
    seconds = time.monotonic() - began
    Console().print(table(report))
    kept, read = report["kept"], report["read"]
    print(
        f"Wrote {out}: {kept['tokens']:,} tokens of {kept['documents']:,} documents, in "
        f"{seconds:,.0f} s ({read['text_bytes'] / 1e6 / max(seconds, 1e-3):,.1f} MB/s of text)"
    )
    if broken := read["unreadable_lines"]:
        print(
            f"Left out: {count(broken, 'line')} not UTF-8, or not JSON with a text", file=sys.stderr
        )


@app.command()
def validate_data(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="Chat files of JSON lines, also .gz or .zst: mistral-finetune's messages, "
            "ShareGPT, Alpaca, or preferences with chosen and rejected."
        ),
    ],
    model: Annotated[
        str, typer.Option(help="The model to train, or a tokenizer alone.")
    ] = DEFAULT_MODEL,
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest conversation.")] = 4096,
    rank: Annotated[
        int, typer.Option(min=0, help="Of the LoRA to estimate; 0 for training all weights.")
    ] = 16,
    gpus: Annotated[
        str, typer.Option(help="To estimate for, as in `opennemo plan`: 1x4090, or 1xcpu.")
    ] = "1xcpu",
    prompts: Annotated[
        bool, typer.Option(help="The files are prompts to answer, as recipes of rl read them.")
    ] = False,
    fix: Annotated[
        Path | None, typer.Option(help="Write a copy with bad lines repaired or left out.")
    ] = None,
) -> None:
    """Look at chat files before training: what is in them, what is wrong, what a run takes.

    Exit code 0: every line is good, or --fix wrote a copy; 1: some are bad.
    """
    from rich.console import Console

    from opennemo.data.validation import epoch, validate
    from opennemo.data.validation import fix as write_fixed
    from opennemo.planning.machines import parse_machines
    from opennemo.tokenizer.load import open_tokenizer

    path, console = tokenizer_path(model), Console(highlight=False)
    tokenizer = open_tokenizer(path)
    report = validate(files, tokenizer, max_tokens, prompts=prompts)
    shares = (50, 90, 99, 100)
    lengths = ", ".join(
        f"{n:,} ({share} %)" for share, n in zip(shares, report.percentiles(*shares), strict=True)
    )
    shapes = "; ".join(f"{n:,} {name}" for name, n in report.shapes.most_common())
    rows = {
        "shapes": shapes,
        "conversations": f"{report.n_conversations:,}",
        "messages": f"{report.n_turns:,}, with {report.n_tool_calls:,} tool calls",
        "tokens": f"{report.n_tokens:,}, to be learned {report.n_trained_tokens:,}",
        "lengths": f"{lengths} at most",
        "languages": ", ".join(f"{n:,} {name}" for name, n in report.languages.most_common(12)),
    }
    for name, value in rows.items():
        console.print(f"{name:<13} {value or 'not given'}", soft_wrap=True)
    if not prompts and (path.is_dir() or path.suffix == ".gguf"):
        made = epoch(files, report, path, parse_machines(gpus, 1), width=max_tokens, rank=rank)
        what = f"a LoRA of rank {rank}" if rank else "all weights"
        console.print(
            f"an epoch      about {clock(made.seconds)} on {gpus} for {what}, "
            f"{made.total / 2**30:.1f} GiB with {max_tokens:,} tokens at once; "
            "`opennemo plan RECIPE` shows the arithmetic",
            soft_wrap=True,
        )
        for problem in made.problems:
            console.print(f"              does not fit: {problem}", soft_wrap=True)
    bad = report.bad
    if fix is not None:
        left_out = write_fixed(files, fix, report, tokenizer, max_tokens, prompts=prompts)
        print(
            f"Wrote {fix}: {count(len(bad) - len(left_out), 'line')} repaired, "
            f"{len(left_out):,} left out"
        )
        bad = left_out
    for line in bad if fix is not None else bad[:SHOWN]:
        print(line, file=sys.stderr)
    if fix is None and bad:
        more = f" ({len(bad) - SHOWN:,} more than shown)" if len(bad) > SHOWN else ""
        lines = "line" if len(bad) == 1 else "lines"
        print(f"{len(bad):,} bad {lines}{more}; --fix OUT writes a copy without", file=sys.stderr)
        raise typer.Exit(1)
