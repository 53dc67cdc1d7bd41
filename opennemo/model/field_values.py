"""Values in the settings of an untrusted file: read within a range, or refused by name."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from opennemo.errors import CheckpointError

FolderLayout = Literal["mistral", "hf"]
Layout = FolderLayout | Literal["gguf"]


def read_number(value: Any, most: float, where: Path, name: str, kind: type = int) -> Any:
    # Every number has a range, wide enough for any model so far.
    if type(value) not in (int, kind) or not 0 < value <= most:
        shown = "missing" if value is None else short(value)
        wanted = f"{'a whole number' if kind is int else 'a number'} up to {most:,}"
        raise CheckpointError(f"{where}: {name} is {shown}, not {wanted}")
    return value


def numbers_of(values: Mapping[str, Any], table: str, where: Path) -> Any:
    """A function that reads numbers of a table, by default floats."""

    def number(
        name: str, most: float, default: float | None = None, kind: type = float, zero: bool = False
    ) -> Any:
        value = default if values.get(name) is None else values[name]
        if zero and value == 0:
            return 0.0
        value = read_number(value, most, where, f"{table}.{name}" if table else name, kind)
        return kind(value)

    return number


def read_table(value: Any, name: str, known: Sequence[str], where: Path) -> dict[str, Any]:
    """A table of settings; any unknown entry that is not empty is refused."""
    if not isinstance(value, dict):
        refuse(where, name, value, ["a table"])
    for key, entry in value.items():
        if key not in known and entry:
            refuse(where, f"{name}.{key}", entry, [", ".join(known)])
    return value


def refuse(where: Path, name: str, value: Any, allowed: Sequence[Any]) -> NoReturn:
    only = f"; supported: {' or '.join(map(str, allowed))}" if allowed else ""
    shown = "missing" if value is None else f"= {short(value)}"
    verb = "" if value is None else " is not supported"
    raise CheckpointError(f"{where}: {name} {'is ' if value is None else ''}{shown}{verb}{only}")


def no_name(layout: str, what: Any, understood: str) -> NoReturn:
    raise CheckpointError(f"{layout} has no name for {short(what)}, only for {understood}")


def short(value: object) -> str:
    """A value from a file, as a message may quote it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
