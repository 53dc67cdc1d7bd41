"""`opennemo eval MODEL --suite NAME`, and `opennemo eval compare RUN RUN ...`."""

import os
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from opennemo.cli.options import Engines, RayAddress, Replicas, extra, given, on_engines, serving
from opennemo.errors import InvalidRequest


class ModelByDefault(TyperGroup):
    """Whatever is not the name of a command is the model of `run`, which needs no name."""

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


@app.command()
def run(
    model: Annotated[
        str,
        typer.Argument(help="A folder, a .gguf, a Hugging Face id; or a server's http://.../v1"),
    ],
    suite: Annotated[
        str, typer.Option(help="table1, multilingual, code, chat, tools, long or ppl.")
    ],
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
        typer.Option(help="fp32, bf16, fp8, int8 or int4; repeat to compare with the first."),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask in the model's chat layout.")] = False,
    judge: Annotated[
        str | None, typer.Option(help="chat: a model, or a server's http://.../v1")
    ] = None,
    judge_name: Annotated[str | None, typer.Option(help="Its name at that server.")] = None,
    judge_key_env: Annotated[
        str, typer.Option(help="The variable that holds its key.")
    ] = "JUDGE_API_KEY",
    repeats: Annotated[int, typer.Option(min=1, help="chat: judgements of each answer.")] = 1,
    against: Annotated[
        Path | None, typer.Option(help="chat: a run of another model, judged in both orders.")
    ] = None,
    agreement: Annotated[
        Path | None, typer.Option(help="chat: answers with marks, to compare the judge's with.")
    ] = None,
    references: Annotated[str, typer.Option(help="chat: gpt-4 or gpt-4-0125-preview.")] = "gpt-4",
    grammar: Annotated[bool, typer.Option(help="tools: hold answers to valid calls.")] = True,
    required: Annotated[
        bool, typer.Option("--required", help="tools: every answer must be a call.")
    ] = False,
    model_name: Annotated[str | None, typer.Option(help="Its name at its server.")] = None,
    key_env: Annotated[
        str, typer.Option(help="The variable that holds a server's key.")
    ] = "OPENAI_API_KEY",
    tokenizer: Annotated[
        str | None, typer.Option(help="tools --no-grammar: of a server's model.")
    ] = None,
    run_code: Annotated[
        bool, typer.Option("--run-code", help="code: run what the model wrote, on this machine.")
    ] = False,
    texts: Annotated[list[Path] | None, typer.Option(help="ppl: .jsonl, .txt; repeatable.")] = None,
    lengths: Annotated[str | None, typer.Option(help="long: tokens, commas between.")] = None,
    depths: Annotated[str | None, typer.Option(help="long: 0 to 1, commas between.")] = None,
    kv_cache_dtype: Annotated[
        str | None, typer.Option(help="Of the KV cache: fp8 or int8, for instance.")
    ] = None,
    kv_scale: Annotated[float | None, typer.Option(help="For fp8, where a model has none.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    engine: Engines = "process",
    replicas: Replicas = None,
    ray_address: RayAddress = None,
) -> None:
    """Measure a model and write a folder of results; the same command goes on after a kill."""
    n_engines, spread = on_engines(engine, replicas, ray_address)
    with _packages():
        from opennemo.evals.evaluate import Request, evaluate
        from opennemo.evals.report import show

        settings = given(
            limit=limit, data=data, output=output, judge=judge, judge_name=judge_name,
            against=against, agreement=agreement, model_name=model_name, tokenizer=tokenizer,
            kv_format=kv_cache_dtype, kv_scale=kv_scale, device=device,
            lengths=_numbers("--lengths", lengths, int),
            depths=_numbers("--depths", depths, float),
        )  # fmt: skip
        request = Request(
            model=model, suite=suite, tasks=tuple(tasks.split(",")) if tasks else (), chat=chat,
            repeats=repeats, references=references, grammar=grammar, required=required,
            run_code=run_code, texts=tuple(texts or ()), key=os.environ.get(key_env, "none"),
            judge_key=os.environ.get(judge_key_env, "none"), **settings,
        )  # fmt: skip
        folders, lines, notes = evaluate(
            request, format or [], partial(_load_replicas, spread) if spread else None, n_engines
        )
        show(lines, notes)
    for folder in folders:
        print(f"Wrote {folder}")


def _load_replicas(spread: list[str], request: Any, format: str | None) -> Any:
    """Many engines that look like one, as `serve --replicas` has them."""
    with serving():
        from opennemo.cluster.fleet import open_fleet
        from opennemo.serve.logs import configure_logs
        from opennemo.serve.settings import read_settings

    configure_logs("warning")
    chosen = given(
        quantization=None if format in ("fp32", "bf16") else format, device=request.device,
        kv_cache_dtype=request.kv_format, kv_scale=request.kv_scale,
        dtype={"fp32": "float32", "bf16": "bfloat16"}.get(format or ""),
    )  # fmt: skip
    options = [f"--{name.replace('_', '-')}={value}" for name, value in chosen.items()]
    # Nothing is listened on; without a port they are apart from those of a server here.
    return open_fleet(read_settings([request.model, "--insecure", "--port=0", *spread, *options]))


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs; the first is the base.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the table and plots here.")
    ] = None,
) -> None:
    """Show runs side by side, with differences on the same items and their significance."""
    with _packages():
        from opennemo.evals.evaluate import compare as side_by_side
        from opennemo.evals.report import read, show

        if len(runs) < 2:
            raise InvalidRequest("name two runs or more")
        found = {}
        for folder in runs:
            name, rows = read(folder)
            found[name if name not in found else f"{name} ({folder})"] = rows
        show(side_by_side(output, found))


def _numbers(option: str, text: str | None, kind: type) -> tuple | None:
    try:
        return None if text is None else tuple(kind(number) for number in text.split(","))
    except ValueError:
        raise InvalidRequest(f"{option} {text}: expected numbers with commas between") from None


def _packages() -> AbstractContextManager[None]:
    return extra("evaluation", "in the checkout: pip install -e '.[eval]'")
