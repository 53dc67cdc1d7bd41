"""The command line: `opennemo COMMAND`, each a few lines over the part that does the work.

Imports are inside the commands, so that `opennemo --help` answers at once. Every error that a
user can cause ends in one line on standard error and exit code 2.
"""

import io
import os
import sys
import warnings
from typing import Annotated

import typer
from typer.exceptions import TyperException

from opennemo import __version__
from opennemo.cli import data, evals, models, plan, serve, talk, tokenizer, train
from opennemo.cli.options import extra_of, missing
from opennemo.errors import OpenNemoError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _say_version(wanted: bool) -> None:
    if wanted:
        print(f"opennemo {__version__}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Say which.")
    ] = False,
) -> None:
    """Train, adapt, measure and serve models like Mistral NeMo on hardware of your own."""


for part in (talk, serve, models, train, plan, data):
    app.add_typer(part.app)
app.add_typer(tokenizer.app, name="tokenizer")
app.add_typer(evals.app, name="eval")


def _show(message: Warning | str, *_: object, **__: object) -> None:
    """A warning as a line, without the place in the source."""
    print(f"opennemo: {message}", file=sys.stderr)


def main() -> None:
    """Run the command line; the console script `opennemo`."""
    warnings.showwarning = _show
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.encoding.lower() != "utf-8":
        sys.stdout.reconfigure(errors="replace")  # a locale may lack some letters
    try:
        sys.exit(app(prog_name="opennemo", standalone_mode=False))
    except OpenNemoError as error:
        print(f"opennemo: {error}", file=sys.stderr)
        sys.exit(2)
    except TyperException as error:  # an option or a command that is not there
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "opennemo"
        message = getattr(error, "format_message", error.__str__)().rstrip(".")
        print(f"opennemo: {message} (see `{command} --help`)", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        if (wanted := extra_of(error.name or "")) is None:
            raise
        print(f"opennemo: {missing(error.name, 'this', wanted)}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `opennemo generate ... | head` is not an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:  # a file that cannot be read or written
        if error.filename is None or error.strerror is None:
            raise
        print(f"opennemo: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
