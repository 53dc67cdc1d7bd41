"""`opennemo tokenizer COMMAND`: look at, compare and learn vocabularies."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from opennemo.cli.options import check_place, given, need, read_text, tokenizer_path
from opennemo.progress import stages

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Look at, compare and learn vocabularies."
)
TEXTS = "JSON lines (text, language), text files or folders, .gz or .zst too."
TokenizerFile = Annotated[
    str,
    typer.Argument(
        help="tekken.json, tokenizer.json, tokenizer.model, a tiktoken file, a .gguf, a folder, "
        "or opennemo-tekken-32k, which comes along."
    ),
]


@app.command()
def show(
    tokenizer: TokenizerFile,
    text: Annotated[str | None, typer.Argument(help="The text; else standard input.")] = None,
) -> None:
    """Show a text's tokens in colours, with their ids and bytes."""
    from rich.console import Console

    from opennemo.data.display import show as render
    from opennemo.tokenizer.load import open_tokenizer

    Console().print(render(open_tokenizer(tokenizer_path(tokenizer)), text or read_text()))


@app.command()
def compare(
    tokenizers: Annotated[list[str], typer.Argument(help="Files or folders; NAME=PATH names one.")],
    texts: Annotated[list[Path], typer.Option(help=TEXTS)],
    reference: Annotated[
        str | None, typer.Option(help="Compare the others with this one; by default the first.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the rows here as CSV.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write everything here as JSON.")] = None,
    plot: Annotated[
        list[Path] | None, typer.Option(help="Draw the ratios here: .png, .svg, .pdf.")
    ] = None,
) -> None:
    """Count the tokens that tokenizers need for the same texts, by language."""
    from rich.console import Console

    from opennemo.data.compression import compare as measure
    from opennemo.data.compression import open_all
    from opennemo.texts import Texts

    check_place(csv, json, *(plot or ()))
    if plot:
        need("--plot", "matplotlib", "train")
    opened = open_all(tokenizers)
    result = measure(opened, Texts(texts).read(lambda n: None), reference or next(iter(opened)))
    Console().print(result.table())
    if csv:
        csv.write_text(result.csv(), "utf-8")
    if json:
        json.write_text(result.json(), "utf-8")
    if plot:
        shown = sorted(result.languages, key=lambda c: -result.n_bytes[c])[:13]
        result.plot(plot, {language: language for language in sorted(shown)})


@app.command()
def train(
    corpus: Annotated[list[Path], typer.Argument(help=TEXTS)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    vocab_size: Annotated[
        int | None, typer.Option(help="Ids in all, control tokens included; 131072 by default.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Above 1, small languages count for more.")
    ] = None,
    settings: Annotated[
        Path | None, typer.Option(help="A TOML file of settings, as in recipes/.")
    ] = None,
    extend: Annotated[
        Path | None, typer.Option(help="A tekken.json to extend; its ids stay as they are.")
    ] = None,
    processes: Annotated[int, typer.Option(help="That count words side by side.")] = 2,
) -> None:
    """Learn a byte-level BPE vocabulary; writes tekken.json and tokenizer.json with equal ids."""
    from opennemo.data.vocabulary import make_settings
    from opennemo.data.vocabulary import train as learn
    from opennemo.texts import Texts
    from opennemo.tokenizer.tekken import Tekken

    wanted = make_settings(settings, **given(vocab_size=vocab_size, temperature=temperature))
    with stages("share") as report:
        base = Tekken.load(extend) if extend else None
        trained = learn(Texts(corpus), wanted, base=base, processes=processes, report=report)
    trained.save(output)
    print(f"Wrote {output}: {trained.tokenizer.vocab_size:,} ids")
    if broken := trained.record["unreadable_lines"]:
        print(f"{broken:,} lines were not UTF-8 or not JSON and were left out", file=sys.stderr)
