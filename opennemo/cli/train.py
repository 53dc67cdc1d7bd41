"""`opennemo train` and `opennemo plot`: runs from recipes, and their curves."""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from opennemo.cli.options import Overrides, RecipeFile, extra

app = typer.Typer()


@app.command()
def train(
    recipe: RecipeFile,
    run: Annotated[
        Path, typer.Option("--out", help="The run's folder; one that was stopped goes on.")
    ],
    set: Overrides = None,
) -> None:
    """Train a model: from text, on conversations, or on preferences, as a recipe says.

    On several devices or machines: torchrun --nproc-per-node 8 -m opennemo train RECIPE ...
    SIGTERM saves and stops (exit code 143); the same command goes on, also after a kill.
    """
    import signal
    import warnings

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
    try:
        trainer = begin(settings, run, sample=_sampler(settings))
        before = signal.signal(signal.SIGTERM, lambda *_: trainer.stop())
        trainer.train()
        signal.signal(signal.SIGTERM, before)
        made = finish(trainer)
    except Stopped as stopped:
        print(f"opennemo: {run}: {stopped}; the same command goes on", file=sys.stderr)
        raise typer.Exit(143) from None
    finally:
        if launched:
            dist.destroy_process_group()
    for what, folder in made.items():
        print(f"Wrote the {what} to {folder}")


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, drawn into each other.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A picture: .png, .svg or .pdf.")
    ] = Path("curves.png"),
) -> None:
    """Draw the curves of runs: loss, held-out loss, learning rate, gradients, speed."""
    from opennemo.train.metrics import plot as draw

    with extra("plotting", "pip install 'opennemo[train]'"):
        draw(runs, output)
    print(f"Wrote {output}")


def _sampler(recipe: Any) -> Any:
    """Answers to a file of conversations, by an engine around the model as it stands."""
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
