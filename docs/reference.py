"""The reference pages of the documentation site, written from the code each time the site is built.

MkDocs calls `on_files` (mkdocs.yml, `hooks`). Nothing of what this makes is kept in the repository,
so it cannot be out of date.
"""

import ast
import contextlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import typer
from pydantic import TypeAdapter
from typer.main import get_command

from opennemo import cli
from opennemo.model import transformer
from opennemo.serve.prometheus import Metrics
from opennemo.serve.settings import NIM, Settings
from opennemo.train import config as recipes


def on_files(files: Any, config: Any) -> Any:
    """MkDocs' event: add the generated pages to those of the folder."""
    # Of the extra `docs`; tests read the pages without.
    from mkdocs.structure.files import File  # pyright: ignore[reportMissingImports]

    for name, page in PAGES.items():
        files.append(File.generated(config, f"reference/{name}.md", content=page()))
    return files


def commands() -> str:
    """Every command's --help."""
    lines = ["# Commands", "", "What `opennemo COMMAND --help` prints.", ""]
    for words in _walk(get_command(cli.app), ["opennemo"]):
        lines += [f"## `{' '.join(words)}`", "", "```text", _help(words[1:]), "```", ""]
    return "\n".join(lines)


def _walk(command: Any, words: list[str]) -> Iterator[list[str]]:
    yield words
    for name, inner in getattr(command, "commands", {}).items():
        if not inner.hidden:
            yield from _walk(inner, [*words, name])


def _help(words: list[str]) -> str:
    text = io.StringIO()
    os.environ["COLUMNS"] = "96"  # of argparse, which prints the server's settings
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit, typer.Exit):
        cli.app(
            [*words, "--help"], prog_name="opennemo", standalone_mode=False, max_content_width=96
        )
    # Defaults that follow from who asks are shown as they are written.
    return text.getvalue().strip().replace(str(Path.home()), "~")


def settings() -> str:
    """Every setting of the server."""
    nim = {ours: name for name, ours in NIM.items()}
    lines = [
        "# Settings of the server",
        "",
        "Each is an option of `opennemo serve`, a variable of the environment, and a key of the"
        " TOML file of `--config` (`max_num_seqs = 8`).",
        "",
        "| option | variable | NIM's | type | default | meaning |",
        "|---|---|---|---|---|---|",
    ]
    properties = Settings.model_json_schema()["properties"]
    for name, field in Settings.model_fields.items():
        option = "`MODEL`" if name == "model" else f"`--{name.replace('_', '-')}`"
        default = "" if field.default_factory or field.default is None else field.default
        cells = [
            option,
            f"`OPENNEMO_{name.upper()}`",
            f"`{nim[name]}`" if name in nim else "",
            _bounds(properties[name]),
            f"`{default}`" if default not in ("", []) else "",
            field.description or "",
        ]
        lines.append(_row(cells))
    return "\n".join(lines) + "\n"


def _bounds(schema: dict[str, Any]) -> str:
    """A field's JSON schema in a few words."""
    if kinds := schema.get("anyOf"):
        return " or ".join(_bounds(kind) for kind in kinds if kind.get("type") != "null")
    if "$ref" in schema:
        return "a table"
    if schema.get("type") == "array" and "items" in schema:
        return f"a list of {_bounds(schema['items'])}"
    if allowed := schema.get("enum"):
        return ", ".join(f"`{value}`" for value in allowed)
    limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    words = [f"{sign} {schema[key]:,}" for key, sign in limits.items() if key in schema]
    return " ".join([str(schema.get("const") or schema.get("type", "")), ", ".join(words)]).strip()


def recipe() -> str:
    """Every key of a recipe. Meanings are the comments beside the fields of train/config.py."""
    comments = _comments(recipes) | _comments(transformer)  # the latter of a new model's shape
    schema = TypeAdapter(recipes.Recipe).json_schema()
    tables = schema["$defs"] | {"Recipe": schema}
    lines = [
        "# Keys of a recipe",
        "",
        "A recipe is a TOML file (`recipes/` has some). `--set optim.lr=3e-4` overrides a key. A"
        " key in bold must be given.",
    ]
    waiting = [("", "Recipe")]
    while waiting:
        prefix, kind = waiting.pop(0)
        table, required = tables[kind], tables[kind].get("required", ())
        lines += ["", f"## {f'`[{prefix}]`' if prefix else 'At the top'}", ""]
        if about := table.get("description"):
            lines += [about, ""]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        for name, field in table["properties"].items():
            key = f"{prefix}.{name}" if prefix else name
            inner = re.search(r"#/\$defs/(\w+)", str(field))
            if inner and key not in [known for known, _ in waiting]:
                waiting.append((key, inner[1]))
            default = field.get("default")
            shown = "" if default is None or inner else f"`{json.dumps(default)}`"
            key = f"**`{key}`**" if name in required else f"`{key}`"
            lines.append(_row([key, _bounds(field), shown, comments.get(kind, {}).get(name, "")]))
    return "\n".join(lines) + "\n"


def _comments(module: ModuleType) -> dict[str, dict[str, str]]:
    """Of each class and each of its fields."""
    source = Path(str(module.__file__)).read_text("utf-8")
    return {
        node.name: {
            ast.unparse(field.target): _comment(field, source.splitlines())
            for field in node.body
            if isinstance(field, ast.AnnAssign)
        }
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef)
    }


def _comment(field: ast.AnnAssign, source: list[str]) -> str:
    """What stands behind the field, or in the lines above it."""
    assert field.end_lineno
    _, _, comment = source[field.end_lineno - 1].partition("  # ")
    if comment and not comment.startswith("pyright"):
        return comment
    above = []
    for line in reversed(source[: field.lineno - 1]):
        if not line.strip().startswith("#"):
            break
        above.insert(0, line.strip("# "))
    return " ".join(above)


def metrics() -> str:
    """Every series of /metrics."""
    lines = ["# Metrics", "", "What `GET /metrics` holds.", "", "| name | kind | meaning |"]
    lines.append("|---|---|---|")
    rows = [
        (f"{metric.name}{'_total' * (metric.type == 'counter')}", metric.type, metric.documentation)
        for metric in every_metric()
    ]
    lines += [_row([f"`{name}`", kind, about]) for name, kind, about in rows]
    return "\n".join(lines) + "\n"


def every_metric() -> list[Any]:
    """Families of a server whose engine is idle."""
    server = Metrics("model", n_requests=1)
    server.watch(_Idle())  # pyright: ignore[reportArgumentType]
    return list(server.registry.collect())


class _Idle:
    """A model of which only the engine's numbers are asked."""

    @property
    def engine(self) -> "_Idle":
        return self

    def stats(self) -> dict[str, float]:
        from opennemo.serve.prometheus import ENGINE

        return dict.fromkeys(ENGINE, 0.0) | {"kv_cache_pages": 1}


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


PAGES: dict[str, Callable[[], str]] = {
    "commands": commands, "settings": settings, "recipe": recipe, "metrics": metrics,
}  # fmt: skip
