"""The command line: `opennemo COMMAND`, each a few lines over the part that does the work.

Imports stand inside the commands, so that `opennemo --help` answers at once. Every error that a
user can cause ends in one line on standard error and exit code 2.
"""

import os
import sys

import typer

from opennemo.cli import data, evals, models, plan, serve, talk, tokenizer, train
from opennemo.errors import OpenNemoError

app = typer.Typer(
    help="Train, adapt, measure and serve models like Mistral NeMo on hardware of your own.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for part in (talk, serve, models, train, plan, data):
    app.add_typer(part.app)
app.add_typer(tokenizer.app, name="tokenizer")
app.add_typer(evals.app, name="eval")


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
