"""`opennemo eval MODEL --suite NAME`, and `opennemo eval compare RUN RUN ...`."""

import inspect
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from typer.core import TyperGroup

from opennemo.cli.options import (
    Device,
    Engines,
    KvFormat,
    NamesFormats,
    RayAddress,
    Replicas,
    extra,
    flags,
    given,
    need,
    on_engines,
    serving,
)
from opennemo.errors import InvalidRequest
from opennemo.evals.suites import SUITES, Option, Suite, find_suite, options_of


class ModelByDefault(TyperGroup):
    """A first argument that is not the name of a command is the model of `run`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=ModelByDefault,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure a model: opennemo eval MODEL --suite NAME (the word `run` may be left out).",
)


def with_suites(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with the options of all suites in place of `**own`."""
    parameters = [p for p in inspect.signature(command).parameters.values() if p.name != "own"]
    parameters += [
        _parameter(suite_name, *described)
        for suite_name, suite in SUITES.items()
        for described in options_of(suite)
    ]
    command.__signature__ = inspect.Signature(parameters)  # pyright: ignore
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _parameter(suite: str, name: str, kind: Any, default: Any, option: Option) -> inspect.Parameter:
    """How the command line takes an option: secrets by a variable, numbers between commas."""
    flags = []
    if option.env:
        name, kind, default = f"{name}_env", str, option.env
    elif kind == tuple[Path, ...]:
        kind, default = list[Path] | None, None
    elif get_origin(kind) is tuple:
        kind, default = str | None, None
    elif default is False:
        flags = [f"--{name.replace('_', '-')}"]  # without --no-...
    shown = typer.Option(*flags, help=f"{suite}: {option.help}", min=option.at_least)
    keyword, declared = inspect.Parameter.KEYWORD_ONLY, Annotated[kind, shown]
    return inspect.Parameter(name, keyword, default=default, annotation=declared)


def _options_from(suite: Suite, values: Mapping[str, Any]) -> Any:
    """The suite's own options, out of what the command line got for all suites."""
    chosen = {}
    for name, kind, _, option in options_of(suite):
        value = values[f"{name}_env" if option.env else name]
        if option.env:
            value = os.environ.get(value)
        elif kind == tuple[Path, ...]:
            value = tuple(value or ())
        elif get_origin(kind) is tuple:
            value = _numbers(f"--{name}", value, get_args(kind)[0])
        chosen[name] = value
    return suite.options(**given(**chosen))


@app.command(cls=NamesFormats)
@with_suites
def run(
    model: Annotated[
        str,
        typer.Argument(help="A folder, a .gguf, a Hugging Face id; or a server's http://.../v1"),
    ],
    suite: Annotated[str, typer.Option(help=f"{', '.join(SUITES)}.")],
    tasks: Annotated[str | None, typer.Option(help="Of the suite, commas between.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each benchmark.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="A folder of test data, laid out like the hub.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The run's folder; by default in runs/.")
    ] = None,
    format: Annotated[
        list[str] | None,
        typer.Option(
            help="Of the weights: auto, stored, {load}; repeat to compare with the first."
        ),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask in the model's chat layout.")] = False,
    model_name: Annotated[str | None, typer.Option(help="Its name at its server.")] = None,
    key_env: Annotated[
        str, typer.Option(help="The variable with a server's key.")
    ] = "OPENAI_API_KEY",
    tokenizer: Annotated[
        str | None, typer.Option(help="tools --no-grammar: of a server's model.")
    ] = None,
    kv_format: KvFormat = None,
    kv_scale: Annotated[float | None, typer.Option(help="For {scaled} without scales.")] = None,
    device: Device = None,
    engine: Engines = "process",
    replicas: Replicas = None,
    ray_address: RayAddress = None,
    **own: Any,
) -> None:
    """Measure a model and write a folder of results; after a kill the same command resumes."""
    need("evaluation", "matplotlib", "eval")  # which draws at the end
    n_engines, spread = on_engines(engine, replicas, ray_address)
    options = _options_from(find_suite(suite), own)
    with _packages():
        from opennemo.evals.evaluate import evaluate
        from opennemo.evals.report import show
        from opennemo.evals.suites import Request

        request = Request(
            model=model, suite=suite, options=options, limit=limit, data=data, output=output,
            tasks=tuple(tasks.split(",")) if tasks else (), device=device, chat=chat,
            model_name=model_name, key=os.environ.get(key_env, "none"), tokenizer=tokenizer,
            kv_format=kv_format, kv_scale=kv_scale,
        )  # fmt: skip
        folders, lines, notes = evaluate(
            request, format or [], partial(_load_replicas, spread) if spread else None, n_engines
        )
        show(lines, notes)
    for folder in folders:
        print(f"Wrote {folder}")


def _load_replicas(spread: list[str], request: Any, format: str | None) -> Any:
    """Many engines behind one interface, as `serve --replicas` has them."""
    with serving():
        from opennemo.cluster.fleet import open_fleet
        from opennemo.model.formats import FORMATS
        from opennemo.serve.logs import configure_logs
        from opennemo.serve.settings import read_settings

    configure_logs("warning")
    kv = FORMATS.get(request.kv_format or "")
    options = flags(
        format=format, device=request.device,
        kv_cache_dtype=kv.dtype_name if kv else request.kv_format, kv_scale=request.kv_scale,
    )  # fmt: skip
    # No port is opened; port 0 keeps these replicas apart from those of a server here.
    return open_fleet(read_settings([request.model, "--insecure", "--port=0", *spread, *options]))


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs; the first is the base.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the table and plots here.")
    ] = None,
) -> None:
    """Show runs side by side, with differences on the same items and their significance."""
    if output is not None:
        need("--output", "matplotlib", "eval")
    with _packages():
        from opennemo.evals.evaluate import compare as side_by_side
        from opennemo.evals.report import read, show

        if len(runs) < 2:
            raise InvalidRequest("name two runs or more")
        models = {}
        for folder in runs:
            name, rows = read(folder)
            models[name if name not in models else f"{name} ({folder})"] = rows
        show(side_by_side(output, models))


def _numbers(option: str, text: str | None, kind: type) -> tuple | None:
    try:
        return None if text is None else tuple(kind(number) for number in text.split(","))
    except ValueError:
        raise InvalidRequest(f"{option} {text}: expected numbers with commas between") from None


def _packages() -> AbstractContextManager[None]:
    return extra("evaluation", "eval")
