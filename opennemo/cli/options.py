"""Options that several commands have, each declared once, and what commands do with them."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import requires
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from opennemo.errors import InvalidRequest, OpenNemoError

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
Draft = Annotated[
    str | None,
    typer.Option(
        help="A small model of the same vocabulary that guesses ahead; answers stay the same."
    ),
]
CacheDir = Annotated[
    Path | None,
    typer.Option(help="Keep computed prompts here, for after a restart; at most 10 GiB of them."),
]
MaxCacheSize = Annotated[int, typer.Option(min=0, help="Bytes of --cache-dir.")]
Guesses = Annotated[
    int | None,
    typer.Option(
        "--num-speculative-tokens",
        min=0,
        max=64,
        help="Guessed in each step; 0: off; by default as many as save time.",
    ),
]
KvScale = Annotated[
    float | None, typer.Option(help="For {scaled} where the model brings no scales, such as 1.")
]
AdapterFolder = Annotated[Path | None, typer.Option(help="A LoRA's folder, to answer with.")]
NewModel = Annotated[
    Path,
    typer.Argument(help="The folder to write, without files in it, or a new file NAME.gguf."),
]
KvFormat = Annotated[
    str | None, typer.Option("--kv-cache-dtype", help="Number format of the KV cache: {cache}.")
]
Format = Annotated[
    str,
    typer.Option(
        help="Of the weights: auto, stored, {load}. auto keeps what is stored, and rounds what "
        "does not fit into memory. Of four bits, q4_k loses far less than int4, which GPUs need."
    ),
]
MaxContext = Annotated[
    int | None,
    typer.Option("--max-model-len", min=1, help="Tokens of context; by default what fits."),
]
Dtype = Annotated[
    str | None, typer.Option(help="bfloat16, float16 or float32; by default as stored.")
]
Temperature = Annotated[
    float | None, typer.Option(help="0 is greedy; by default the model's own, 0.3 for NeMo.")
]
TopP = Annotated[float | None, typer.Option(help="Keep the likeliest tokens up to this mass.")]
TopK = Annotated[int | None, typer.Option(help="Keep this many of the likeliest tokens.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same answer again.")]
Repeats = Annotated[
    int | None,
    typer.Option(
        "--stop-repeats", min=2,
        help="End an answer that repeats a pattern of up to 256 tokens this many times in a row.",
    ),
]  # fmt: skip
MaxTokens = Annotated[int | None, typer.Option(help="The longest answer, in tokens.")]
Gpus = Annotated[
    str, typer.Option(help="Of a machine: 8xH100; H200, B200, A100-80, L40S, 4090; or 1xcpu.")
]
RecipeFile = Annotated[Path, typer.Argument(help="A recipe in TOML; recipes/ has some.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a setting, such as optim.lr=3e-4; repeatable."),
]
Engines = Annotated[
    str, typer.Option(help="process, or ray: --replicas engines, on many machines.")
]
Replicas = Annotated[int | None, typer.Option(min=1, help="ray: engines; 2 by default.")]
RayAddress = Annotated[
    str | None, typer.Option(help="ray: HOST:PORT or auto; by default this machine.")
]


class NamesFormats(TyperCommand):
    """A command whose help names number formats: {load}, {store}, ..., {scaled} or {mistral}.

    The table is read when that help is shown, since it imports torch.
    """

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from opennemo.model.formats import FORMATS, SCALED_KV, names
        from opennemo.model.gguf_writer import MIXTURES

        values = {use: ", ".join(names(use)) for use in ("load", "train", "store", "cache")}
        values |= {"gguf": ", ".join(MIXTURES), "scaled": SCALED_KV}
        values["mistral"] = ", ".join(name for name, row in FORMATS.items() if row.mistral)
        for option in self.params:
            if text := getattr(option, "help", None):
                for use, known in values.items():  # not `format`: examples have braces, too
                    text = text.replace(f"{{{use}}}", known)
                vars(option)["help"] = text
        super().format_help(ctx, formatter)


def given(**options: Any) -> dict[str, Any]:
    """The options that were given; the rest is left to the model's defaults."""
    return {name: value for name, value in options.items() if value is not None}


def stops_repeats(count: int | None) -> Any:
    """What `--stop-repeats` asks of the engine."""
    if count is None:
        return None
    from opennemo.engine.repetition import Repetition

    return Repetition(max_pattern_size=256, min_count=count)


def flags(**options: Any) -> list[str]:
    """The options that were given, as `opennemo serve` takes them."""
    chosen = given(**options).items()
    return [f"--{name.replace('_', '-')}={value}" for name, value in chosen]


def tokenizer_path(name: str) -> Path:
    """Where the tokenizer of a name is: the package's own, or a model's."""
    from opennemo.model.hub import locate
    from opennemo.tokenizer.rank_files import OWN

    return Path(OWN) if name == OWN else locate(name)


def read_text(file: Path | None = None) -> str:
    """All of a file, or of standard input, as one text.

    Raises:
        InvalidRequest: it cannot be read or is not UTF-8, or nothing is written to standard input.
    """
    try:
        text = file.read_text("utf-8") if file else sys.stdin.buffer.read().decode().strip()
    except UnicodeDecodeError as error:
        name = file or "standard input"
        raise InvalidRequest(f"{name}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise InvalidRequest(f"{file}: {error.strerror}") from None
    if not text and file is None:
        raise InvalidRequest("standard input is empty: write a text to it")
    return text


def check_place(*files: Path | None) -> None:
    """Raises: InvalidRequest, one of these files could not be written where it is to be."""
    for file in files:
        if file is not None and not (file.parent.is_dir() and os.access(file.parent, os.W_OK)):
            raise InvalidRequest(f"{file}: cannot be written there")


def on_engines(engine: str, replicas: int | None, ray_address: str | None) -> tuple[int, list[str]]:
    """How many engines, and the server's settings for them: none for one in this process."""
    if one_of("--engine", engine, ("process", "ray")) == "ray":
        address = [f"--ray-address={ray_address}"] if ray_address else []
        return replicas or 2, [f"--replicas={replicas or 2}", *address]
    if ray_address is not None or replicas is not None:
        raise InvalidRequest("--replicas and --ray-address need --engine ray")
    return 1, []


def one_of(option: str, value: str, allowed: tuple[str, ...]) -> Any:
    """The value of an option that has a few. Raises: InvalidRequest, it is another."""
    if value not in allowed:
        raise InvalidRequest(f"{option} is {value}, allowed are {', '.join(allowed)}")
    return value


def user_folder(variable: str, default: str) -> Path:
    """The user's own folder of a kind, such as XDG_STATE_HOME, for files of this program."""
    return Path(os.environ.get(variable) or Path.home() / default) / "opennemo"


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def extra_of(module: str) -> str | None:
    """The extra that brings a module, from the package's metadata; None: no extra does."""
    name = module.partition(".")[0].lower()
    for line in requires("opennemo") or ():
        package, _, condition = line.partition(";")
        wanted = re.search(r"extra == ['\"](\w+)", condition)
        found = re.match(r"[\w.-]+", package)
        if wanted and wanted[1] != "dev" and found and found[0].lower().replace("-", "_") == name:
            return wanted[1]
    return None


def missing(module: str | None, what: str, wanted: str) -> str:
    """The message about a package that is missing."""
    return f"{module} is missing: {what} needs it; in the checkout: pip install -e '.[{wanted}]'"


@contextmanager
def extra(what: str, name: str) -> Iterator[None]:
    """Around imports that need the extra of this name, which is for `what`."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise OpenNemoError(missing(error.name, what, name)) from None


def need(what: str, module: str, name: str) -> None:
    """Raises: OpenNemoError, a module of the extra of this name is missing; it is not imported."""
    try:
        spec = find_spec(module)
    except ModuleNotFoundError:
        spec = None
    if spec is None:
        raise OpenNemoError(missing(module, what, name))


def serving() -> AbstractContextManager[None]:
    """Around imports of the server, whose packages may be missing."""
    return extra("the server", "serve")
