"""`opennemo validate-data` and `merge`: around the adaptation of a model."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from opennemo.cli.options import one_of

app = typer.Typer()
SHOWN = 20  # bad lines on the screen; --fix lists those it leaves out in full


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
    ] = "smollm2-135m-instruct",
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest conversation.")] = 4096,
    rank: Annotated[
        int, typer.Option(min=0, help="Of the LoRA to estimate; 0 for training all weights.")
    ] = 16,
    gpus: Annotated[
        str, typer.Option(help="To estimate for, as in `opennemo plan`: 1x4090, or 1xcpu.")
    ] = "1xcpu",
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
    from opennemo.model.hub import locate
    from opennemo.planning.machines import parse_machines
    from opennemo.tokenizer.rank_files import OWN, open_tokenizer

    path, console = Path(OWN) if model == OWN else locate(model), Console(highlight=False)
    tokenizer = open_tokenizer(path)
    report = validate(files, tokenizer, max_tokens)
    shares = (50, 90, 99, 100)
    lengths = ", ".join(
        f"{n:,} ({share} %)" for share, n in zip(shares, report.percentiles(*shares), strict=True)
    )
    rows = {
        "conversations": f"{report.n_conversations:,}",
        "messages": f"{report.n_turns:,}, with {report.n_tool_calls:,} tool calls",
        "tokens": f"{report.n_tokens:,}, to be learned {report.n_trained_tokens:,}",
        "lengths": f"{lengths} at most",
        "languages": ", ".join(f"{n:,} {name}" for name, n in report.languages.most_common(12)),
    }
    for name, value in rows.items():
        console.print(f"{name:<13} {value or 'not given'}", soft_wrap=True)
    if path.is_dir() or path.suffix == ".gguf":
        made = epoch(files, report, path, parse_machines(gpus, 1), width=max_tokens, rank=rank)
        what = f"a LoRA of rank {rank}" if rank else "all weights"
        console.print(
            f"an epoch      about {_duration(made.seconds)} on {gpus} for {what}, "
            f"{made.total / 2**30:.1f} GiB with {max_tokens:,} tokens at once; "
            "`opennemo plan RECIPE` shows the arithmetic",
            soft_wrap=True,
        )
        for problem in made.problems:
            console.print(f"              does not fit: {problem}", soft_wrap=True)
    bad = report.bad
    if fix is not None:
        left_out = write_fixed(files, fix, report, tokenizer, max_tokens)
        print(
            f"Wrote {fix}: {len(bad) - len(left_out):,} lines repaired, {len(left_out):,} left out"
        )
        bad = left_out
    for line in bad if fix is not None else bad[:SHOWN]:
        print(line, file=sys.stderr)
    if fix is None and bad:
        more = f" ({len(bad) - SHOWN:,} more than shown)" if len(bad) > SHOWN else ""
        lines = "line" if len(bad) == 1 else "lines"
        print(f"{len(bad):,} bad {lines}{more}; --fix OUT writes a copy without", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def merge(
    model: Annotated[str, typer.Argument(help="A model folder, .gguf file or Hugging Face id.")],
    adapter: Annotated[Path, typer.Argument(help="A LoRA's folder, as PEFT writes it.")],
    folder: Annotated[Path, typer.Argument(help="The folder to write; it must not hold files.")],
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32; by default as stored.")
    ] = None,
) -> None:
    """Fold an adapter into the weights of a model, in the layout that it has."""
    import torch

    from opennemo.cli import _progress
    from opennemo.model.export import merge as fold
    from opennemo.model.hub import locate

    name = None if dtype is None else one_of("--dtype", dtype, ("bfloat16", "float16", "float32"))
    with _progress("Merging") as progress:
        fold(
            locate(model), adapter, folder,
            dtype=getattr(torch, name) if name else None, progress=progress,
        )  # fmt: skip
    print(f"Wrote {folder}")


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} seconds"
