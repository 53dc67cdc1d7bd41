"""`opennemo info`, `convert`, `quantize` and `merge`: a model's files, and those made of them."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from opennemo.cli.options import Dtype, Model, NamesFormats, NewModel, given, one_of
from opennemo.errors import InvalidRequest
from opennemo.progress import count, progress, size

app = typer.Typer()
LAYOUTS = ("hf", "mistral")


@app.command()
def info(model: Model) -> None:
    """What a model is, the memory it needs, what fits here and how fast; loads no weights."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from opennemo.engine import EngineConfig
    from opennemo.engine.sizes import fit, fits
    from opennemo.model.checkpoint import open_checkpoint
    from opennemo.model.formats import names
    from opennemo.model.hub import locate
    from opennemo.model.memory import available_memory, kv_bytes, machine_memory
    from opennemo.planning.machines import read_bandwidth

    checkpoint = open_checkpoint(locate(model))
    config, console = checkpoint.config, Console(highlight=False)
    scaling = config.rope_scaling
    types = [
        f"{count(n, 'tensor')} in {type} ({size(n_bytes)})"
        for type, (n, n_bytes) in checkpoint.stored_types().items()
    ]
    rows = {
        "parameters": f"{sum(map(math.prod, checkpoint.shapes.values())):,}",
        "layout": checkpoint.layout,
        "stored": ", ".join(types),
        "layers": f"{config.n_layers} of width {config.dim:,}, feed-forward {config.hidden_dim:,}",
        "heads": f"{config.n_heads} for queries, {config.n_kv_heads} for keys and values, "
        f"of {config.head_dim}",
        "vocabulary": f"{config.vocab_size:,}{', tied to the head' * config.tied_embeddings}",
        "context": f"{config.max_position_embeddings:,} tokens"
        + (f", window {_windows(config.sliding_window)}" if config.sliding_window else "")
        + (f", RoPE by {scaling.kind}, factor {scaling.factor:g}" if scaling else ""),
    }
    for name, value in rows.items():
        console.print(f"{name:<11} {value}", soft_wrap=True)
    lengths = [n for n in (1024, 8192, 32768, 131072) if n <= config.max_position_embeddings]
    table = Table("memory for", *(f"{n:,} tokens" for n in lengths), title_justify="left")
    for kv in names("cache"):
        table.add_row(f"KV cache in {kv}", *(size(n * kv_bytes(config, kv)) for n in lengths))
    console.print(table)
    bandwidth, memory = read_bandwidth(), machine_memory()
    starred = False
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        speed = ["tokens/s at most"] if device == "cpu" else []
        table = Table(f"on {device}", "weights", "context that fits", "KV cache", *speed)
        try:
            chosen = fit(checkpoint, device, EngineConfig()).name
        except InvalidRequest:
            chosen = ""
        starred |= bool(chosen)
        for one in fits(checkpoint, device, EngineConfig()).values():
            context = f"{one.context:,}" if one.context else "does not fit"
            cells = [one.name + " *" * (one.name == chosen), size(one.needs.weights), context]
            cells += [one.kv_format, *(f"{bandwidth / one.needs.read:.1f}" for _ in speed)]
            table.add_row(*cells)
        console.print(table)
    for device, n_bytes in available_memory().items():
        console.print(f"{device}: {size(n_bytes)} of {size(memory[device])} are available.")
    console.print(
        f"Memory is read at {bandwidth / 1e9:.0f} GB/s; one answer at a time reads all weights for "
        "each token.",
        soft_wrap=True,
    )
    if starred:
        console.print("* what --format auto takes")


@app.command()
def convert(
    source: Model,
    out: NewModel,
    to: Annotated[
        str | None,
        typer.Option(
            help="hf (config.json, model.safetensors), mistral (params.json) or gguf; by default "
            "gguf for NAME.gguf, else hf."
        ),
    ] = None,
    dtype: Dtype = None,
    adapter: Annotated[
        Path | None,
        typer.Option(help="Write only this LoRA of the model, as NAME.gguf for llama.cpp."),
    ] = None,
) -> None:
    """Write a model in another layout: Mistral's own, Hugging Face's, or a GGUF file."""
    from opennemo.model.checkpoint import convert as convert_checkpoint
    from opennemo.model.export import to_gguf
    from opennemo.model.hub import locate

    if adapter is not None:
        from opennemo.model.checkpoint import read_config
        from opennemo.model.gguf_writer import write_adapter

        if dtype is not None:
            raise InvalidRequest(f"--dtype {dtype}: an adapter is written in float32")
        _layout(to, out, ("gguf",))
        write_adapter(out, adapter, read_config(locate(source)))
        print(f"Wrote {out}")
        return
    layout, stored_as = _layout(to, out, (*LAYOUTS, "gguf")), _dtype(dtype)
    with progress("Converting", unit="bytes") as bar:
        if layout == "gguf":
            to_gguf(locate(source), out, dtype=stored_as, progress=bar.update)
        else:
            convert_checkpoint(locate(source), out, to=layout, dtype=stored_as, progress=bar.update)
    print(f"Wrote {out}")


@app.command(cls=NamesFormats)
def quantize(
    source: Model,
    out: NewModel,
    format: Annotated[
        str,
        typer.Option(
            help="A folder in {store} (a static one needs --calibrate; vLLM cannot read int8; w8a8 "
            "is its int8; int4 loses far more than q4_k_m), or a GGUF file in {gguf}."
        ),
    ] = "fp8",
    to: Annotated[
        str | None, typer.Option(help="Of a folder: hf, or mistral for {mistral}.")
    ] = None,
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(
            help="Texts (.jsonl, .txt) that fixed scales are measured on, or for GGUF how much "
            "each input matters."
        ),
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(min=1, help="To read of them.")] = 4096,
    kv: Annotated[
        str | None, typer.Option(help="{scaled}: also write the scales of such a KV cache.")
    ] = None,
) -> None:
    """Write a model in fewer bits: a folder, for vLLM too but in int8, or a file for llama.cpp."""
    from opennemo.model import export
    from opennemo.model.formats import FORMATS, SCALED_KV, names
    from opennemo.model.gguf_writer import MIXTURES
    from opennemo.model.hub import locate
    from opennemo.texts import Texts

    name = one_of("--format", format, (*names("store"), *MIXTURES))
    if name not in MIXTURES and out.suffix == ".gguf" and to is None:
        raise InvalidRequest(f"{out}: {name} is written into a folder; files hold "
                             + ", ".join(MIXTURES))  # fmt: skip
    layout = _layout(to, out, ("gguf",) if name in MIXTURES else LAYOUTS)
    if kv is not None:
        one_of("--kv", kv, (SCALED_KV,))
    path, calibration, importance = locate(source), None, None
    texts = (text for _, text in Texts(calibrate or []))
    if layout == "gguf":
        if kv:
            raise InvalidRequest(f"--kv {kv} needs a folder: GGUF files have no such scales")
        if calibrate:
            with progress("Calibrating") as bar:
                importance = export.importance(path, texts, calibration_tokens, bar.update)
    elif FORMATS[name].static or kv:
        if not calibrate:
            why = f"--kv {kv}" if kv else f"--format {name}"
            raise InvalidRequest(f"{why} needs texts to calibrate on: --calibrate FILE")
        calibration = export.calibrate(path, texts, calibration_tokens)
    with progress("Quantizing", unit="bytes") as bar:
        if layout == "gguf":
            export.to_gguf(
                path, out, format=name, importance=importance, progress=bar.update, say=bar.say
            )
        else:
            export.quantize(
                path, out, format=name, to=layout, calibration=calibration, kv=bool(kv),
                progress=bar.update, say=bar.say,
            )  # fmt: skip
    print(f"Wrote {out}")


@app.command()
def merge(
    models: Annotated[
        list[str],
        typer.Argument(
            help="MODEL ADAPTER OUT: a model, a LoRA's folder as PEFT writes it, what to write. "
            "With --method, models of one shape."
        ),
    ],
    method: Annotated[
        str | None, typer.Option(help="Merge models: linear, slerp, ties or dare, as in mergekit.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="What to write, as for convert.")] = None,
    base: Annotated[
        str | None, typer.Option(help="ties, dare: what the models were made of.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="One of each model, 0.7,0.3; equal shares by default.")
    ] = None,
    densities: Annotated[
        str | None,
        typer.Option(help="ties, dare: the share of each model's changes that stays; 1, all."),
    ] = None,
    t: Annotated[
        float | None,
        typer.Option(help="slerp: 0 is the first model, 1 the second; 0.5 by default."),
    ] = None,
    normalize: Annotated[
        bool | None,
        typer.Option(help="Divide by the sum of weights; by default linear and ties do."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="dare: the same seed drops the same changes; by default 0.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Of which of the models settings, tokenizer and template are; the base's, else "
            "the first's."
        ),
    ] = None,
    to: Annotated[str | None, typer.Option(help="With --method: hf, mistral or gguf.")] = None,
    dtype: Dtype = None,
) -> None:
    """Fold an adapter into a model, in the layout that it has or as NAME.gguf; or merge models."""
    from opennemo.model.hub import locate

    stored_as = _dtype(dtype)
    mixed = given(weights=weights, densities=densities, t=t, normalize=normalize, seed=seed)
    if method is None:
        from opennemo.model.export import merge as fold

        for name in mixed | given(base=base, tokenizer=tokenizer, to=to):
            raise InvalidRequest(f"--{name} belongs to merging models: give --method, too")
        if len(models) + (out is not None) != 3:
            raise InvalidRequest("merge takes MODEL ADAPTER OUT, or models, --method and --out")
        out = Path(models[2]) if out is None else out
        with progress("Merging", unit="bytes") as bar:
            fold(locate(models[0]), Path(models[1]), out, dtype=stored_as, progress=bar.update)
    else:
        from opennemo.model.merge_models import METHODS, Mixing, merge_models

        for name in {"weights", "densities"} & mixed.keys():
            mixed[name] = _numbers(f"--{name}", mixed[name])
        mixing = Mixing(method=one_of("--method", method, METHODS), **mixed)
        if out is None:
            raise InvalidRequest(f"--method {method} needs --out: what to write")
        with progress("Merging", unit="bytes") as bar:
            merge_models(
                [*map(locate, models)], out, mixing, base=locate(base) if base else None,
                companions=locate(tokenizer) if tokenizer else None,
                to=_layout(to, out, (*LAYOUTS, "gguf")), dtype=stored_as,
                progress=bar.update, say=bar.say,
            )  # fmt: skip
    print(f"Wrote {out}")


def _numbers(option: str, text: str) -> tuple[float, ...]:
    """Numbers between commas."""
    try:
        return tuple(map(float, text.split(",")))
    except ValueError:
        raise InvalidRequest(f"{option} {text}: allowed are numbers between commas") from None


def _windows(window: Any) -> str:
    """One window, or those that are repeated through the layers."""
    widths = window if isinstance(window, tuple) else (window,)
    return ", ".join(f"{width:,}" if width else "none" for width in widths)


def _layout(to: str | None, out: Path, allowed: tuple[str, ...]) -> Any:
    """The layout that is asked for, by name or by that of the output."""
    is_file = out.suffix == ".gguf"
    layout = one_of("--to", to or ("gguf" if is_file or "hf" not in allowed else "hf"), allowed)
    if is_file != (layout == "gguf"):
        raise InvalidRequest(f"{out}: a GGUF file is called NAME.gguf; other names are folders")
    return layout


def _dtype(name: str | None) -> Any:
    import torch

    allowed = ("bfloat16", "float16", "float32")
    return None if name is None else getattr(torch, one_of("--dtype", name, allowed))
