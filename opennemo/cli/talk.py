"""`opennemo chat` and `generate`: answers and continuations in the terminal."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from opennemo.cli.options import (
    DEFAULT_MODEL,
    Device,
    Draft,
    Format,
    KvFormat,
    MaxContext,
    MaxTokens,
    Model,
    NamesFormats,
    Ranks,
    Seed,
    Temperature,
    TopK,
    TopP,
    given,
    read_text,
)
from opennemo.errors import InvalidRequest

app = typer.Typer()


@app.command(cls=NamesFormats)
def chat(
    model: Model = DEFAULT_MODEL,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    max_tokens: MaxTokens = 2048,
    format: Format = "auto",
    max_context: MaxContext = None,
    kv_format: KvFormat = None,
    device: Device = None,
    ranks: Ranks = 1,
    draft: Draft = None,
) -> None:
    """Talk to a model. Without a terminal, answer the text on standard input, once."""
    sampling = given(
        temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, max_tokens=max_tokens
    )
    text = None if sys.stdin.isatty() else read_text()
    from opennemo.terminal import answer, converse

    def load() -> Any:
        return _load(model, format, max_context, kv_format, device, ranks, draft)

    if text is None:
        converse(model, system, load, sampling)
    else:
        answer(text, system, load, sampling)


@app.command(cls=NamesFormats)
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
    format: Format = "auto",
    max_context: MaxContext = None,
    kv_format: KvFormat = None,
    device: Device = None,
    ranks: Ranks = 1,
    draft: Draft = None,
) -> None:
    """Continue a text as it stands, without a chat layout."""
    if (prompt is None) == (file is None):
        raise InvalidRequest("give a prompt or --file FILE, one of the two")
    text = read_text(file) if file else prompt
    sampling = given(
        temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, max_tokens=max_tokens
    )
    with _load(model, format, max_context, kv_format, device, ranks, draft) as llm:
        for piece in llm.complete(text or "", stop=tuple(stop or ()), **sampling):
            print(piece, end="", flush=True)
        print()


def _load(
    model: str,
    format: str,
    max_context: int | None,
    kv_format: str | None,
    device: str | None,
    ranks: int,
    draft: str | None,
) -> Any:
    from opennemo.engine import EngineConfig
    from opennemo.llm import LLM

    config = EngineConfig(
        max_context=max_context, kv_format=kv_format, tensor_parallel_size=ranks, draft=draft
    )
    return LLM.load(model, device=device, config=config, format=format)
