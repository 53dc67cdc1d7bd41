"""Rows as a table in the terminal, as Markdown, CSV and JSON, and as plots.

Announced numbers of other models have columns of their own, under a line that says how comparable
they are; a missing standard error, or trouble, is always shown beside its number.
"""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from opennemo.errors import InvalidRequest
from opennemo.evals.rows import ResultRow
from opennemo.files import write_json

Cells = list[list[str]]
CAVEAT = (
    "Announced numbers are Mistral's own, made with settings that were not published; other "
    "laboratories measure up to 5 points more or less on the same weights."
)


def cells(rows: Sequence[ResultRow], model: str) -> Cells:
    """A head and lines of text: what, how, of how many, the score, what was announced, trouble."""
    announced = list(dict.fromkeys(name for row in rows for name in row.announced))
    head = ["benchmark", "setting", "items", model, *(f"{name}, announced" for name in announced)]
    lines = [[*head, "also", "trouble"]]
    for row in rows:
        shown = [f"{row.announced[name]:g}" if name in row.announced else "" for name in announced]
        also = ", ".join(f"{name} {value:.3g}" for name, value in row.also.items())
        trouble = "; ".join(f"{what}: {n}" for what, n in row.trouble.items())
        lines.append([row.key, row.setting, f"{row.n:,}", score(row), *shown, also, trouble])
    kept = [i for i in range(len(lines[0])) if any(line[i] for line in lines[1:])]
    return [[line[i] for i in kept] for line in lines]


def score(row: ResultRow) -> str:
    """The score with its standard error, or a dash."""
    if row.score is None:
        return "-"
    digits = 1 if row.percent else 3 if row.weights else 2
    error = "" if row.error is None else f" ± {row.error:.{digits}f}"
    return f"{row.score:.{digits}f}{error}"


def show(lines: Cells, notes: Sequence[str] = ()) -> None:
    """On standard output: a table in a terminal, else Markdown; then notes."""
    console = Console(highlight=False)
    if console.is_terminal:
        shown = Table(*lines[0])
        for line in lines[1:]:
            shown.add_row(*line)
        console.print(shown)
    else:
        print(markdown(lines))
    for note in notes:
        console.print(note, soft_wrap=True, markup=False)


def markdown(lines: Cells) -> str:
    head, *rest = [" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines]
    rule = " | ".join("---" for _ in lines[0])
    return "".join(f"| {line} |\n" for line in (head, rule, *rest))


def remarks(rows: Sequence[ResultRow]) -> list[str]:
    """Notes that belong beside these rows."""
    return [CAVEAT] if any(row.announced for row in rows) else []


def write(folder: Path, rows: Sequence[ResultRow], model: str, notes: Sequence[str] = ()) -> None:
    """results.json, .md and .csv."""
    notes = [*notes, *remarks(rows)]
    results = {"model": model, "notes": notes, "rows": [row.as_json() for row in rows]}
    text = "".join(f"\n{note}\n" for note in notes)
    text = f"# {model}\n\n{markdown(cells(rows, model))}{text}"
    (folder / "results.md").write_text(text, "utf-8")
    with (folder / "results.csv").open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file)
        names = "benchmark", "part", "setting", "items", "score", "standard_error", "trouble"
        out.writerow(names)
        for row in rows:
            trouble = sum(row.trouble.values())
            out.writerow([row.name, row.part, row.setting, row.n, row.score, row.error, trouble])
    write_json(folder / "results.json", results)  # last, since it marks the run as done


def read(folder: Path) -> tuple[str, list[ResultRow]]:
    """The model's name and the rows of a run; raises InvalidRequest if it is not done."""
    try:
        results = json.loads((folder / "results.json").read_text("utf-8"))
        return results["model"], [ResultRow.from_json(row) for row in results["rows"]]
    except OSError:
        raise InvalidRequest(f"{folder}: no run that is done (it has no results.json)") from None
    except (ValueError, TypeError, KeyError):
        raise InvalidRequest(f"{folder / 'results.json'}: not what a run writes") from None


def bars(folder: Path, models: Mapping[str, Sequence[ResultRow]]) -> None:
    """One panel a benchmark, a group of bars a part, a bar a model, with standard errors."""
    runs = [(name, {row.key: row for row in rows}) for name, rows in models.items()]
    parts: dict[str, list[ResultRow]] = {}
    for row in runs[0][1].values():
        if row.score is not None:
            parts.setdefault(row.name if row.part else "", []).append(row)

    def draw(axes: Any) -> None:
        for ax, (title, base) in zip(axes, parts.items(), strict=True):
            names = list(dict.fromkeys(name for row in base for name in row.announced))
            width = 0.8 / (len(runs) + len(names))
            for i, (name, rows) in enumerate(runs):
                places = [x - 0.4 + width * (i + 0.5) for x in range(len(base))]
                bars = [rows.get(row.key, ResultRow(name="", items={})) for row in base]
                ax.bar(places, [bar.score or 0 for bar in bars], width, label=name, color=f"C{i}",
                       yerr=[bar.error or 0 for bar in bars])  # fmt: skip
            for i, name in enumerate(names):
                places = [x - 0.4 + width * (len(runs) + i + 0.5) for x in range(len(base))]
                ax.bar(places, [row.announced.get(name, 0) for row in base], width,
                       label=f"{name} (announced)", color=str(0.6 + 0.1 * i))  # fmt: skip
            labels = [row.part or row.key for row in base]
            ax.set_xticks(range(len(base)), labels, rotation=0 if title else 20)
            ax.set_title(title)
            ax.set_ylabel("%" if base[0].percent else "score")
            ax.legend(fontsize="x-small")

    if parts:
        _plot(folder / "scores", len(parts), draw)


def heat_map(folder: Path, rows: Sequence[ResultRow]) -> None:
    """Depth by length for each benchmark; items are named "benchmark/length/depth/number"."""
    names = list(dict.fromkeys(row.name for row in rows))
    grids: dict[str, dict[tuple[int, int], list[float]]] = {name: {} for name in names}
    for row in rows:
        for item, value in row.items.items():
            length, depth = map(int, item.split("/")[1:3])
            grids[row.name].setdefault((length, depth), []).append(value)

    def draw(axes: Any) -> None:
        for ax, (name, grid) in zip(axes, grids.items(), strict=True):
            lengths, depths = (sorted({at[i] for at in grid}) for i in (0, 1))
            nothing = [float("nan")]
            shares = [
                [sum(v := grid.get((n, d), nothing)) / len(v) for n in lengths] for d in depths
            ]
            ax.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            for y, line in enumerate(shares):
                for x, share in enumerate(line):
                    ax.text(x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize="small")
            ax.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
            ax.set_yticks(range(len(depths)), [f"{d} %" for d in depths])
            ax.set(title=name, xlabel="tokens", ylabel="depth")

    if any(grids.values()):
        _plot(folder / "heatmap", len(names), draw)


def _plot(path: Path, n_panels: int, draw: Callable[[Any], None]) -> None:
    """Draw panels below each other, as PNG and SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "opennemo"}):
        figure = Figure(figsize=(9, 3.2 * n_panels), layout="constrained")
        draw(figure.subplots(n_panels, squeeze=False)[:, 0])
        figure.savefig(path.with_suffix(".png"), dpi=130)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
