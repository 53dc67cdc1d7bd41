"""The command line: `opennemo COMMAND`, each a few lines over the part that does the work.

Imports stand inside the commands, so that `opennemo --help` answers at once. Whatever a user can
cause ends in one line on standard error and exit code 2.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from opennemo.errors import InvalidRequest, OpenNemoError

app = typer.Typer(
    help="Train, adapt, measure and serve models like Mistral NeMo on hardware of your own.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

DEFAULT_MODEL = "smollm2-135m-instruct"

Model = Annotated[
    str,
    typer.Argument(
        help="A model folder, a .gguf file, or a Hugging Face id such as "
        "mistralai/Mistral-Nemo-Instruct-2407."
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; by default a GPU if there is one.")]
Temperature = Annotated[
    float | None, typer.Option(help="0 is greedy; by default the model's own, 0.3 for NeMo.")
]
TopP = Annotated[float | None, typer.Option(help="Keep the likeliest tokens up to this mass.")]
TopK = Annotated[int | None, typer.Option(help="Keep this many of the likeliest tokens.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same answer again.")]
MaxTokens = Annotated[int | None, typer.Option(help="The longest answer, in tokens.")]


def main() -> None:
    """Run the command line; the console script `opennemo`."""
    try:
        app()
    except OpenNemoError as error:
        print(f"opennemo: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `opennemo generate ... | head` is no reason to complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        sys.exit(130)


def _given(**options: object) -> dict[str, object]:
    """The options that were given; the rest is left to the model's defaults."""
    return {name: value for name, value in options.items() if value is not None}


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise InvalidRequest(f"{path}: {error.strerror}") from None


@app.command()
def chat(
    model: Model = DEFAULT_MODEL,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    max_tokens: MaxTokens = None,
    device: Device = None,
) -> None:
    """Talk to a model. Without a terminal, answer what stands on standard input, once."""
    from opennemo.terminal import converse

    sampling = _given(
        temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, max_tokens=max_tokens
    )
    converse(model, system, device, sampling)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(help="The text to continue.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Read the prompt from a UTF-8 file.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; repeatable.")
    ] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    max_tokens: MaxTokens = 256,
    device: Device = None,
) -> None:
    """Continue a text as it stands, without a chat layout."""
    from opennemo.llm import LLM

    if (prompt is None) == (file is None):
        raise InvalidRequest("give a prompt or --file FILE, one of the two")
    text = prompt if file is None else _read(file)
    sampling = _given(
        temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, max_tokens=max_tokens
    )
    with LLM.load(model, device=device) as llm:
        for piece in llm.complete(text or "", stop=tuple(stop or ()), **sampling):
            print(piece, end="", flush=True)
        print()
