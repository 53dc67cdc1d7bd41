"""The command line: `opennemo COMMAND`, each a few lines over the part that does the work.

Imports stand inside the commands, so that `opennemo --help` answers at once. Whatever a user can
cause ends in one line on standard error and exit code 2.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from opennemo.cli import adapt, data, evals, plan, tokenizer, train
from opennemo.cli.options import (
    Engines,
    RayAddress,
    Replicas,
    given,
    on_engines,
    one_of,
    serving,
    standard_input,
)
from opennemo.errors import InvalidRequest, OpenNemoError

app = typer.Typer(
    help="Train, adapt, measure and serve models like Mistral NeMo on hardware of your own.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

app.add_typer(tokenizer.app, name="tokenizer")
app.add_typer(evals.app, name="eval")
app.add_typer(train.app)
app.add_typer(plan.app)
app.add_typer(data.app)
app.add_typer(adapt.app)

DEFAULT_MODEL = "smollm2-135m-instruct"

Model = Annotated[
    str,
    typer.Argument(
        help="A model folder, a .gguf file, or a Hugging Face id such as "
        "mistralai/Mistral-Nemo-Instruct-2407."
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; by default a GPU if there is one.")]
Ranks = Annotated[
    int, typer.Option("--tensor-parallel-size", min=1, help="Processes, or GPUs, that share it.")
]
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
    max_tokens: MaxTokens = 2048,
    device: Device = None,
    ranks: Ranks = 1,
) -> None:
    """Talk to a model. Without a terminal, answer what stands on standard input, once."""
    sampling = given(
        temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, max_tokens=max_tokens
    )
    text = None if sys.stdin.isatty() else standard_input()
    from opennemo.terminal import answer, converse

    def load() -> Any:
        return _load(model, device, ranks)

    if text is None:
        converse(model, system, load, sampling)
    else:
        answer(text, system, load, sampling)


def _load(model: str, device: str | None, ranks: int) -> Any:
    from opennemo.engine import EngineConfig
    from opennemo.llm import LLM

    return LLM.load(model, device=device, config=EngineConfig(tensor_parallel_size=ranks))


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
    ranks: Ranks = 1,
) -> None:
    """Continue a text as it stands, without a chat layout."""
    if (prompt is None) == (file is None):
        raise InvalidRequest("give a prompt or --file FILE, one of the two")
    text = prompt if file is None else _read(file)
    sampling = given(
        temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, max_tokens=max_tokens
    )
    with _load(model, device, ranks) as llm:
        for piece in llm.complete(text or "", stop=tuple(stop or ()), **sampling):
            print(piece, end="", flush=True)
        print()


@app.command()
def convert(
    source: Model,
    folder: Annotated[Path, typer.Argument(help="The folder to write; it must not hold files.")],
    to: Annotated[
        str, typer.Option(help="hf (config.json, model.safetensors) or mistral (params.json).")
    ] = "hf",
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32; by default as stored.")
    ] = None,
) -> None:
    """Write a model in another layout: Mistral's own, or Hugging Face's."""
    import torch

    from opennemo.model.checkpoint import convert as convert_checkpoint
    from opennemo.model.hub import locate

    layout = one_of("--to", to, ("hf", "mistral"))
    name = None if dtype is None else one_of("--dtype", dtype, ("bfloat16", "float16", "float32"))
    with _progress("Converting") as progress:
        convert_checkpoint(
            locate(source),
            folder,
            to=layout,
            dtype=getattr(torch, name) if name else None,
            progress=progress,
        )
    print(f"Wrote {folder}")


@app.command()
def quantize(
    source: Model,
    folder: Annotated[Path, typer.Argument(help="The folder to write; it must not hold files.")],
    format: Annotated[
        str, typer.Option(help="fp8 and int8 round inputs as they come, fp8-static by calibration.")
    ] = "fp8",
    to: Annotated[str, typer.Option(help="hf, or mistral for fp8-static.")] = "hf",
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(help="Texts that fixed scales are found on: .jsonl, .txt."),
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(min=1, help="To read of them.")] = 4096,
    kv: Annotated[
        str | None, typer.Option(help="fp8 writes scales for a KV cache in FP8 along.")
    ] = None,
) -> None:
    """Write a model in a number format that serves faster and in less memory; vLLM reads it too."""
    from opennemo.model.compressed import SCHEMES
    from opennemo.model.export import calibrate as run_over
    from opennemo.model.export import quantize as quantize_checkpoint
    from opennemo.model.hub import locate
    from opennemo.model.quantization import FORMATS
    from opennemo.texts import Texts

    name, layout = (
        one_of("--format", format, tuple(SCHEMES)),
        one_of("--to", to, ("hf", "mistral")),
    )
    if kv is not None:
        one_of("--kv", kv, ("fp8",))
    path, calibration = locate(source), None
    if FORMATS[name].static or kv:
        if not calibrate:
            why = f"--kv {kv}" if kv else f"--format {name}"
            raise InvalidRequest(f"{why} needs texts to calibrate on: --calibrate FILE")
        texts = (text for _, text in Texts(calibrate))
        calibration = run_over(path, texts, calibration_tokens)
    with _progress("Quantizing") as progress:
        quantize_checkpoint(
            path, folder, format=name, to=layout, calibration=calibration, kv=bool(kv),
            progress=progress,
        )  # fmt: skip
    print(f"Wrote {folder}")


@app.command()
def info(model: Model) -> None:
    """What a model is, the memory it needs, and what fits on this machine; loads no weights."""
    from rich.console import Console
    from rich.table import Table

    from opennemo.model.checkpoint import open_checkpoint
    from opennemo.model.hub import locate
    from opennemo.model.memory import Needs, machine_memory

    checkpoint = open_checkpoint(locate(model))
    config, console = checkpoint.config, Console(highlight=False)
    needs = Needs.of(config)
    rows = {
        "parameters": f"{needs.n_parameters:,}",
        "layout": f"{checkpoint.layout}, stored as {str(checkpoint.dtype).removeprefix('torch.')}",
        "layers": f"{config.n_layers} of width {config.dim:,}, feed-forward {config.hidden_dim:,}",
        "heads": f"{config.n_heads} for queries, {config.n_kv_heads} for keys and values, "
        f"of {config.head_dim}",
        "vocabulary": f"{config.vocab_size:,}{', tied to the head' * config.tied_embeddings}",
        "context": f"{config.max_position_embeddings:,} tokens"
        + (f", window {config.sliding_window:,}" if config.sliding_window else ""),
    }
    for name, value in rows.items():
        console.print(f"{name:<11} {value}")
    lengths = [n for n in (1024, 8192, 32768, 131072) if n <= config.max_position_embeddings]
    table = Table("memory for", *(f"{n:,} tokens" for n in lengths), title_justify="left")
    for kv, size in needs.kv_per_token.items():
        table.add_row(f"KV cache in {kv}", *(_size(n * size) for n in lengths))
    console.print(table)
    fits = Table("weights in", "size", *(f"context on {d}" for d in machine_memory()))
    for weights, size in needs.weights.items():
        contexts = [
            f"{needs.max_context(memory, weights, 'bf16'):,}"
            for memory in machine_memory().values()
        ]
        fits.add_row(weights, _size(size), *contexts)
    console.print(fits)
    memory = ", ".join(f"{device} {_size(size)}" for device, size in machine_memory().items())
    console.print(f"Context: tokens that fit beside the weights, KV cache in bf16. {memory}.")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def serve(context: typer.Context) -> None:
    """Serve a model to OpenAI's, Mistral's, Anthropic's and NIM's clients; --help lists options."""
    with serving():
        from opennemo.serve.app import serve as run
        from opennemo.serve.settings import read_settings

    run(read_settings(context.args))


@app.command()
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
    max_model_len: Annotated[int | None, typer.Option(help="Tokens of context.")] = None,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="What bodies may call the model; repeatable.")
    ] = None,
    device: Device = None,
    tensor_parallel_size: Ranks = 1,
    engine: Engines = "process",
    replicas: Replicas = None,
    ray_address: RayAddress = None,
) -> None:
    """Answer a file of requests, many at once. After a kill, the same command goes on.

    Each line of the output holds custom_id, response and error, in the order in which they end
    (with --engine ray, in that of the input);
    lines that cannot be answered say why. Exit code 0: all are answered; 1: some with an error;
    2: stopped by what the last line says.
    """
    with serving():
        from opennemo.batch.offline import run_batch
        from opennemo.serve.settings import read_settings

    named = [f"--served-model-name={name}" for name in served_model_name or ()]
    chosen = given(
        max_num_seqs=max_num_seqs, max_model_len=max_model_len, device=device,
        tensor_parallel_size=tensor_parallel_size,
    )  # fmt: skip
    options = [f"--{name.replace('_', '-')}={value}" for name, value in chosen.items()]
    _, spread = on_engines(engine, replicas, ray_address)
    if spread:
        from opennemo.cluster.batch_parts import run_in_parts as run_batch
    # Nothing is listened on, whatever the environment says of hosts and keys.
    if not run_batch(
        requests, output, read_settings([model, "--insecure", *options, *spread, *named])
    ):
        raise typer.Exit(1)


def _size(n_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} GiB"


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for bytes (done, total) on standard error; in a pipe, a line for every tenth."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    console = Console(stderr=True)
    tenths = 0

    def line(done: int, total: int) -> None:
        nonlocal tenths
        if 10 * done // total > tenths:
            tenths = 10 * done // total
            print(f"{what}: {10 * tenths} % of {_size(total)}", file=sys.stderr)

    if not console.is_terminal:
        yield line
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True),
        TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
