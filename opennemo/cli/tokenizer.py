"""`opennemo tokenizer COMMAND`: look at, compare and learn vocabularies."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from opennemo.cli.options import check_place, given, need, one_of, read_text, tokenizer_path
from opennemo.progress import count, stages

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Look at, compare and learn vocabularies."
)
TEXTS = "JSON lines (text, language), text files or folders, .gz or .zst too."
TokenizerFile = Annotated[
    str,
    typer.Argument(
        help="tekken.json, tokenizer.json, tokenizer.model, a tiktoken file, a .gguf, a folder, "
        "or opennemo-tekken-32k, which is built in."
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
    layout: Annotated[
        list[str] | None,
        typer.Option(
            help="document (as texts are, the default), paragraph or sentence; repeatable."
        ),
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the rows here as CSV.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write everything here as JSON.")] = None,
    plot: Annotated[
        list[Path] | None, typer.Option(help="Draw the ratios here: .png, .svg, .pdf.")
    ] = None,
) -> None:
    """Count the tokens that tokenizers need for the same texts, by language.

    A paragraph's lines are joined by spaces; a sentence stands alone. Only documents have tokens
    for line breaks, so tokenizers may compare differently in each layout.
    """
    import json as formats

    from rich.console import Console

    from opennemo.data.compression import as_csv, open_all
    from opennemo.data.compression import compare as measure
    from opennemo.texts import LAYOUTS, Texts

    check_place(csv, json, *(plot or ()))
    if plot:
        need("--plot", "matplotlib", "train")
    opened = open_all(tokenizers)
    reference = reference or next(iter(opened))
    layouts = [one_of("--layout", each, LAYOUTS) for each in layout or LAYOUTS[:1]]
    results = [measure(opened, Texts(texts), reference, each) for each in layouts]
    for each in results:
        Console().print(each.table())
    if csv:
        csv.write_text(as_csv([row for each in results for row in each.rows()]), "utf-8")
    if json:
        contents = {each.layout: each.content() for each in results}
        content = contents if len(contents) > 1 else results[0].content()
        json.write_text(formats.dumps(content), "utf-8")
    if plot:
        result = results[0]
        shown = sorted(result.languages, key=lambda c: -result.n_bytes[c])[:13]
        result.plot(plot, {language: language for language in sorted(shown)})


@app.command()
def train(
    corpus: Annotated[list[Path], typer.Argument(help=TEXTS)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    vocab_size: Annotated[
        int | None, typer.Option(help="Number of ids, control tokens included; 131072 by default.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Above 1, small languages count for more.")
    ] = None,
    superwords: Annotated[
        bool, typer.Option("--superwords", help="Merge across spaces in a second stage.")
    ] = False,
    transition: Annotated[
        int | None, typer.Option(help="Number of ids before superwords begin; by default 11 of 16.")
    ] = None,
    max_words: Annotated[
        int | None, typer.Option(help="The most words in a superword; 4 by default.")
    ] = None,
    settings: Annotated[
        Path | None, typer.Option(help="A TOML file of settings, as in recipes/.")
    ] = None,
    extend: Annotated[
        Path | None, typer.Option(help="A tekken.json to extend; its ids stay as they are.")
    ] = None,
    processes: Annotated[int, typer.Option(help="Processes that count words.")] = 2,
) -> None:
    """Learn a byte-level BPE vocabulary; writes tekken.json and tokenizer.json with equal ids."""
    from opennemo.data.vocabulary import make_settings
    from opennemo.data.vocabulary import train as learn
    from opennemo.texts import Texts
    from opennemo.tokenizer.tekken import Tekken

    changes = given(
        vocab_size=vocab_size, temperature=temperature, superwords=superwords or None,
        transition=transition, token_words=max_words,
    )  # fmt: skip
    wanted = make_settings(settings, **changes)
    with stages("share") as report:
        base = Tekken.load(extend) if extend else None
        trained = learn(Texts(corpus), wanted, base=base, processes=processes, report=report)
    trained.save(output)
    print(f"Wrote {output}: {trained.tokenizer.vocab_size:,} ids")
    if broken := trained.record["unreadable_lines"]:
        print(f"Left out: {count(broken, 'line')} not in UTF-8, or not JSON", file=sys.stderr)
