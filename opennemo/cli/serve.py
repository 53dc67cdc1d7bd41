"""Commands that answer many requests: `serve` over HTTP, `batch` from a file.

`serve` assembles the server: the application, batches, and one engine or many replicas.
"""

from pathlib import Path
from typing import Annotated

import typer

from opennemo.cli.options import (
    DEFAULT_MODEL,
    CacheDir,
    Device,
    Draft,
    Engines,
    Format,
    MaxContext,
    Model,
    NamesFormats,
    Ranks,
    RayAddress,
    Replicas,
    flags,
    on_engines,
    serving,
)

app = typer.Typer()


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def serve(context: typer.Context) -> None:
    """Serve a model to OpenAI's, Mistral's, Anthropic's and NIM's clients; --help lists options."""
    with serving():
        from opennemo.batch.api import mount
        from opennemo.serve.app import create_app
        from opennemo.serve.loading import load_model
        from opennemo.serve.logs import configure_logs
        from opennemo.serve.server import run
        from opennemo.serve.service import Service
        from opennemo.serve.settings import read_settings

    settings, open_model = read_settings(context.args), load_model
    if settings.replicas:
        from opennemo.cluster.fleet import open_fleet as open_model  # one engine never imports Ray
    quiet = settings.is_talking and "log_level" not in settings.model_fields_set
    configure_logs("warning" if quiet else settings.log_level, text=settings.is_talking)
    service = Service(settings, open_model)
    server = create_app(service, load=service.load)
    mount(server)
    run(server)


@app.command(cls=NamesFormats)
def batch(
    requests: Annotated[
        Path,
        typer.Argument(
            help='Lines of OpenAI\'s batch format: {"custom_id": "1", "method": "POST", "url": '
            '"/v1/chat/completions", "body": {"messages": [...]}}; or Mistral\'s, without url.'
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file of answers to write.")],
    model: Model = DEFAULT_MODEL,
    max_num_seqs: Annotated[int, typer.Option(help="Lines answered side by side.")] = 64,
    max_model_len: MaxContext = None,
    format: Format = "auto",
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="A name of the model in bodies; repeatable.")
    ] = None,
    device: Device = None,
    tensor_parallel_size: Ranks = 1,
    draft: Draft = None,
    cache_dir: CacheDir = None,
    engine: Engines = "process",
    replicas: Replicas = None,
    ray_address: RayAddress = None,
) -> None:
    """Answer a file of requests, many at once. After a kill, the same command resumes.

    Each line of the output holds custom_id, response and error, in the order in which answers end
    (with --engine ray, in that of the input); a line that cannot be answered says why. Exit code 0:
    all are answered; 1: some with an error; 2: it stopped, and the last line says why.
    """
    with serving():
        from opennemo.batch.offline import run_batch
        from opennemo.serve.logs import configure_logs
        from opennemo.serve.settings import read_settings

    named = [f"--served-model-name={name}" for name in served_model_name or ()]
    options = flags(
        max_num_seqs=max_num_seqs, max_model_len=max_model_len, format=format, device=device,
        tensor_parallel_size=tensor_parallel_size, draft=draft, cache_dir=cache_dir,
    )  # fmt: skip
    _, spread = on_engines(engine, replicas, ray_address)
    configure_logs("warning" if spread else "error")
    if spread:
        from opennemo.cluster.batch_parts import run_in_parts as run_batch
    # No port is opened, whatever the environment says about hosts and keys.
    if not run_batch(
        requests, output, read_settings([model, "--insecure", *options, *spread, *named])
    ):
        raise typer.Exit(1)
