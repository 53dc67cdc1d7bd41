"""`opennemo chat` and `generate`: answers and continuations in the terminal."""

import re
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from opennemo.cli.options import (
    DEFAULT_MODEL,
    AdapterFolder,
    CacheDir,
    Device,
    Draft,
    Format,
    Guesses,
    KvFormat,
    KvScale,
    MaxCacheSize,
    MaxContext,
    MaxTokens,
    Model,
    NamesFormats,
    Ranks,
    Repeats,
    Seed,
    Temperature,
    TopK,
    TopP,
    given,
    read_text,
    stops_repeats,
    user_folder,
)
from opennemo.errors import InvalidRequest

app = typer.Typer()


@app.command(cls=NamesFormats)
def chat(
    model: Model = DEFAULT_MODEL,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    session: Annotated[
        str | None,
        typer.Option(help="Continue the conversation of this name, or begin it, and save it."),
    ] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    max_tokens: MaxTokens = 2048,
    repeats: Repeats = None,
    format: Format = "auto",
    max_context: MaxContext = None,
    kv_format: KvFormat = None,
    kv_scale: KvScale = None,
    device: Device = None,
    ranks: Ranks = 1,
    draft: Draft = None,
    guesses: Guesses = None,
    cache_dir: CacheDir = None,
    max_cache_size: MaxCacheSize = 10 * 2**30,
    adapter: AdapterFolder = None,
) -> None:
    """Talk to a model. Without a terminal, answer all of standard input as one message.

    Commands such as /help are for the terminal alone.

    A --session is saved in ~/.local/state/opennemo/sessions, and what was computed for it in
    ~/.cache/opennemo/prefixes, unless --cache-dir names another folder.
    """
    kept = None
    if session is not None:
        if not re.fullmatch(r"[\w-][\w.-]{0,99}", session):
            raise InvalidRequest(
                f"--session {session[:100]!r}: a name has up to 100 letters, digits, -, _ and ."
            )
        kept = user_folder("XDG_STATE_HOME", ".local/state") / "sessions" / f"{session}.json"
        cache_dir = cache_dir or user_folder("XDG_CACHE_HOME", ".cache") / "prefixes"
    sampling = given(
        temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, max_tokens=max_tokens,
        repetition_detection=stops_repeats(repeats),
    )  # fmt: skip
    text = None if sys.stdin.isatty() else read_text()
    from opennemo.terminal import answer, converse

    load = partial(
        _load, model, format, device, max_context=max_context, kv_format=kv_format,
        kv_scale=kv_scale, tensor_parallel_size=ranks, draft=draft, n_draft_tokens=guesses,
        cache_dir=cache_dir, max_cache_size=max_cache_size,
    )  # fmt: skip
    if text is None:
        converse(model, system, load, sampling, kept, adapter)
    else:
        answer(text, system, load, sampling, kept, adapter)


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
    repeats: Repeats = None,
    format: Format = "auto",
    max_context: MaxContext = None,
    kv_format: KvFormat = None,
    kv_scale: KvScale = None,
    device: Device = None,
    ranks: Ranks = 1,
    draft: Draft = None,
    guesses: Guesses = None,
    cache_dir: CacheDir = None,
    max_cache_size: MaxCacheSize = 10 * 2**30,
    adapter: AdapterFolder = None,
) -> None:
    """Continue a text as it is, without a chat layout."""
    if (prompt is None) == (file is None):
        raise InvalidRequest("give a prompt or --file FILE, one of the two")
    text = read_text(file) if file else prompt
    sampling = given(
        temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, max_tokens=max_tokens,
        repetition_detection=stops_repeats(repeats),
    )  # fmt: skip
    with _load(
        model, format, device, max_context=max_context, kv_format=kv_format, kv_scale=kv_scale,
        tensor_parallel_size=ranks, draft=draft, n_draft_tokens=guesses, cache_dir=cache_dir,
        max_cache_size=max_cache_size, adapters=adapter is not None,
    ) as llm:  # fmt: skip
        if adapter is not None:
            llm.load_adapter("own", adapter)
        asked = {"stop": tuple(stop or ()), "adapter": adapter and "own"}
        asked["heal"] = llm.tokenizer.has_superwords
        reply = llm.complete(text or "", **asked, **sampling)
        for piece in reply:
            print(piece, end="", flush=True)
        print()
        if not reply.text and reply.finish_reason == "stop":
            what = f"the answer began with {reply.answers[0].stopped_by!r}"
            if reply.answers[0].stopped_by is None:
                chats = llm.tokenizer.chat_template or llm.tokenizer.instruct_version
                hint = (
                    "; `opennemo chat` asks it in the layout of its conversations" if chats else ""
                )
                what = f"the model ended at once, without a word{hint}"
            warnings.warn(what, stacklevel=1)


def _load(
    model: str, format: str, device: str | None, *, adapters: bool = False, **settings: Any
) -> Any:
    from opennemo.engine import EngineConfig
    from opennemo.llm import LLM

    config = EngineConfig(adapters=adapters)  # room for some, which are loaded later
    return LLM.load(model, device=device, format=format, config=config, **settings)
