"""What commands do with what they are given."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from opennemo.errors import InvalidRequest, OpenNemoError

Engines = Annotated[
    str, typer.Option(help="process, or ray: --replicas engines, on many machines.")
]
Replicas = Annotated[int | None, typer.Option(min=1, help="ray: engines; 2 by default.")]
RayAddress = Annotated[
    str | None, typer.Option(help="ray: HOST:PORT or auto; by default this machine.")
]


def given(**options: Any) -> dict[str, Any]:
    """The options that were given; the rest is left to the model's defaults."""
    return {name: value for name, value in options.items() if value is not None}


def standard_input() -> str:
    """All of standard input, as one text.

    Raises:
        InvalidRequest: it is not UTF-8, or there is nothing.
    """
    try:
        text = sys.stdin.buffer.read().decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"standard input is not UTF-8 text (byte {error.start})") from None
    if not text:
        raise InvalidRequest("standard input is empty: write a text to it")
    return text


def on_engines(engine: str, replicas: int | None, ray_address: str | None) -> tuple[int, list[str]]:
    """How many engines, and what the server's settings say of them: nothing of one that is here."""
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


@contextmanager
def serving() -> Iterator[None]:
    """Around imports of the server, whose packages may be missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise OpenNemoError(
            f"{error.name} is missing: the server needs more packages; run `make serve`, or in the "
            "checkout: pip install -e '.[serve]'"
        ) from None
