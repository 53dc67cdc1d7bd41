"""`opennemo plan`: what a recipe will need, before it is run."""

from pathlib import Path
from typing import Annotated

import typer

from opennemo.cli.options import Gpus, NamesFormats, Overrides, RecipeFile

app = typer.Typer()


@app.command(cls=NamesFormats)
def plan(
    recipe: RecipeFile,
    gpus: Gpus = "1xcpu",
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    shape: Annotated[
        str | None, typer.Option(help="Of a model that does not exist here yet: mistral-nemo-12b.")
    ] = None,
    stored: Annotated[
        str | None,
        typer.Option(help="Number format of its frozen weights: bf16, {store}."),
    ] = None,
    share_of_peak: Annotated[
        float | None,
        typer.Option(min=0.01, max=1, help="Of the card's operations a second, while computing."),
    ] = None,
    set: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="As `opennemo train` takes it; nothing is written.")
    ] = None,
) -> None:
    """Memory of a rank, tokens a second and days of a recipe, with the arithmetic.

    Exit code 1 if it does not fit; the last lines say why, and what would make it fit.
    """
    from opennemo.planning.estimate import plan as work_out
    from opennemo.planning.estimate import resolve_shape
    from opennemo.planning.machines import GIB, parse_machines
    from opennemo.train.config import read_recipe

    settings = read_recipe(recipe, set or ())
    machines = parse_machines(gpus, nodes)
    base = resolve_shape(settings, shape, stored)
    made = work_out(
        settings, base.config, machines, stored=base.stored, in_blocks=base.in_blocks,
        share_of_peak=share_of_peak,
    )  # fmt: skip
    room, ranks = machines.card.memory / GIB, f"{machines.n_ranks:,} x {machines.name}"
    for what, how, size in made.memory:
        print(f"{what:<30}{size / GIB:8.2f} GiB  {how}")
    if made.memory:
        print(f"{'a rank needs':<30}{made.total / GIB:8.2f} GiB  of {room:.1f}; {ranks}")
    for what, how in made.speed:
        print(f"{what:<30}{how}")
    for problem in made.problems:
        print(f"Does not fit: {problem}")
    if made.problems:
        raise typer.Exit(1)
