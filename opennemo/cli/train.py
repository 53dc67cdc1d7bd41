"""`opennemo train` and `opennemo plot`: runs from recipes, and their curves."""

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from opennemo.cli.options import Overrides, RecipeFile, check_place, extra, need
from opennemo.errors import InvalidRequest

app = typer.Typer()


@app.command()
def train(
    recipe: RecipeFile,
    run: Annotated[Path, typer.Option("--out", help="The run's folder; a stopped run resumes.")],
    set: Overrides = None,
) -> None:
    """Train a model: from text, conversations, preferences or rewards, as a recipe says.

    On several devices or machines: torchrun --nproc-per-node 8 -m opennemo train RECIPE ...
    Ctrl-C and SIGTERM save and stop (exit codes 130 and 143), a second Ctrl-C stops at once; the
    same command resumes, also after a kill.
    """
    import warnings

    need("training", "tensorboardX", "train")
    import torch.distributed as dist

    from opennemo.train.config import read_recipe
    from opennemo.train.run import begin, finish
    from opennemo.train.trainer import Stopped

    settings = read_recipe(recipe, set or ())
    # PyTorch warns at each checkpoint that there is one process, at each step that a view must not
    # be written to (nothing does), and at each gathered weight that two dimensions are two gathers.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if launched:
        import torch

        on_gpu = torch.cuda.is_available() and settings.device != "cpu"
        if on_gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if on_gpu else "gloo")
    trainer, caught = None, []
    try:
        _refuse_beyond_memory(settings)
        trainer = begin(settings, run, sample=_sampler(settings), rollout=_rollouts)
        if trainer.step and not trainer.quiet:
            done = trainer.step == settings.steps
            how = "all of them" if done else f"goes on after step {trainer.step:,}"
            print(f"opennemo: {run}: {how} of {settings.steps:,}", file=sys.stderr)
        with _stopping(trainer, caught):
            trainer.train()
        made = finish(trainer)
    except Stopped as stopped:
        print(f"opennemo: {run}: {stopped}; the same command resumes", file=sys.stderr)
        raise typer.Exit(128 + caught[0]) from None
    except KeyboardInterrupt:
        saved = trainer and trainer.checkpoints.latest()
        what = f"step {saved:,} is saved" if saved else "no step is saved yet"
        print(f"\nopennemo: {run}: {what}; the same command resumes", file=sys.stderr)
        raise typer.Exit(130) from None
    finally:
        if launched:
            dist.destroy_process_group()
    for what, folder in made.items():
        print(f"Wrote the {what} to {folder}")


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, drawn into the same plots.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A picture: .png, .svg or .pdf.")
    ] = Path("curves.png"),
) -> None:
    """Draw the curves of runs: loss, held-out loss, learning rate, gradients, speed."""
    from opennemo.train.metrics import plot as draw

    check_place(output)
    with extra("plotting", "train"):
        draw(runs, output)
    print(f"Wrote {output}")


@contextmanager
def _stopping(trainer: Any, caught: list[int]) -> Iterator[None]:
    """The first signal ends training after the step at hand; a second Ctrl-C ends it at once."""

    def stop(number: int, _: Any) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)
        trainer.stop()
        if number == signal.SIGINT and not trainer.quiet:
            print("\nopennemo: saving after this step; Ctrl-C again stops at once", file=sys.stderr)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _refuse_beyond_memory(recipe: Any) -> None:
    """Raises: InvalidRequest, by the arithmetic of `opennemo plan` a step cannot fit here."""
    from opennemo.model.hub import locate
    from opennemo.model.memory import open_device
    from opennemo.planning.estimate import plan, resolve_shape
    from opennemo.planning.machines import this_machine
    from opennemo.progress import size

    device = open_device(None if recipe.device == "auto" else recipe.device).partition(":")[0]
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    machine = this_machine(device, here, int(os.environ.get("WORLD_SIZE", "1")) // here)
    if recipe.model.path is not None:  # fetched now, if it is on the hub
        recipe = replace(recipe, model=replace(recipe.model, path=str(locate(recipe.model.path))))
    base = resolve_shape(recipe, None, None)
    made = plan(recipe, base.config, machine, stored=base.stored, in_blocks=base.in_blocks)
    room = machine.card.memory
    if made.total > room:
        data = recipe.data
        raise InvalidRequest(
            f"a step needs about {size(made.total)}, and {size(room)} are free: choose a smaller "
            f"data.window (it is {data.window:,}) or data.micro_rows ({data.micro_rows}); "
            "`opennemo plan` shows the arithmetic"
        )


def _rollouts(tokenizer: Any) -> Any:
    """The function that draws answers from the model as it is now."""
    from opennemo.rollouts import Rollouts

    return Rollouts(tokenizer)


def _sampler(recipe: Any) -> Any:
    """Answers to a file of conversations, by an engine around the model as it is now."""
    if recipe.evaluation.prompts is None:
        return None
    from opennemo.llm import answer_all
    from opennemo.texts import open_lines
    from opennemo.train.shapes import conversation_of, parse_line

    asked = []
    with open_lines(recipe.evaluation.prompts) as (_, lines):
        for line in lines:
            messages, tools = conversation_of(parse_line(line))
            while messages and messages[-1].get("role") == "assistant":  # the answer to sample
                messages.pop()
            asked.append((messages, tools))

    def sample(model: Any, tokenizer: Any) -> list[dict[str, Any]]:
        answers = answer_all(model, tokenizer, asked, max_tokens=recipe.evaluation.max_tokens)
        return [
            {"messages": messages, "answer": answer}
            for (messages, _), answer in zip(asked, answers, strict=True)
        ]

    return sample
