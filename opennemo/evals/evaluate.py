"""From a request to a folder of results: the model, the run, the suite, the report."""

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from opennemo.engine import EngineConfig
from opennemo.errors import InvalidRequest
from opennemo.evals import report
from opennemo.evals.compare import side_by_side
from opennemo.evals.endpoint import LocalModel, is_server, open_model
from opennemo.evals.rows import ResultRow
from opennemo.evals.runs import Run, digest, fingerprint
from opennemo.evals.suites import Request, find_suite, options_of
from opennemo.llm import LLM
from opennemo.model.hub import locate

PLACES = {"options", "data", "output", "device"}  # of a request, that do not name its run
Load = Callable[[Request, str | None], LLM]  # in a number format, if one is named


def evaluate(
    request: Request, formats: Sequence[str], load: Load | None = None, n_engines: int = 1
) -> tuple[list[Path], report.Cells, list[str]]:
    """Measure a model, in several number formats one after the other if several are named.

    -> the folders of results, a table of them, and notes that belong beside it.

    Args:
        load: for a model that is not in this process, and has that many engines.

    Raises:
        InvalidRequest: the suite is unknown, or something that it needs is missing.
    """
    suite = find_suite(request.suite)
    at_server = is_server(request.model)
    if load and at_server:
        raise InvalidRequest("--engine ray needs the model itself, not a server")
    if at_server and not suite.servers:
        raise InvalidRequest(f"--suite {request.suite} needs the model itself, not a server")
    request = replace(request, options=request.options or suite.options())
    suite.prepare(request)
    settings = _settings(request)
    name = request.model_name or Path(request.model.rstrip("/")).name.removesuffix(".gguf")
    parent = request.output or Path("runs") / f"{name}-{request.suite}-{digest(settings)[:8]}"
    folders, measured = [], {}
    for format in formats or (None,):
        folder = parent / format if format and len(formats) > 1 else parent
        with (
            closing(Run(folder, settings | {"format": format}, n_engines)) as run,
            open_model(
                request.model, request.model_name, request.key, request.tokenizer,
                load=lambda format=format: (load or _load)(request, format),
            ) as model,
        ):  # fmt: skip
            title = f"{model.name} {format or ''}".strip()
            asked = model.llm if isinstance(model, LocalModel) and not suite.servers else model
            outcome = suite.measure(asked, request, run)
            run.write_items(outcome.items)
        report.write(run.folder, outcome.rows, title, outcome.notes)
        if suite.heat_map:
            report.heat_map(run.folder, outcome.rows)
        else:
            report.bars(run.folder, {title: outcome.rows})
        folders.append(folder)
        measured[title] = outcome.rows
    if not any(row.n for rows in measured.values() for row in rows):
        why = dict.fromkeys(
            why for rows in measured.values() for row in rows for why in row.trouble
        )
        raise InvalidRequest(f"--suite {request.suite} measured nothing: {'; '.join(why)}")
    if len(measured) == 1:
        (title, rows), *_ = measured.items()
        return folders, report.cells(rows, title), report.remarks(rows)
    return folders, compare(parent, measured), []


def compare(folder: Path | None, runs: dict[str, list[ResultRow]]) -> report.Cells:
    """Runs side by side, compared with the first; written to files and drawn."""
    lines = side_by_side(runs)
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "comparison.md").write_text(report.markdown(lines), "utf-8")
        report.bars(folder, runs)
    return lines


def _load(request: Request, format: str | None) -> LLM:
    config = EngineConfig(kv_format=request.kv_format, kv_scale=request.kv_scale)
    return LLM.load(request.model, device=request.device, config=config, format=format or "auto")


def _settings(request: Request) -> dict[str, Any]:
    """Everything that determines an answer; keys of servers do not, and are never written."""
    values = {k: v for k, v in asdict(request).items() if k not in PLACES} | asdict(request.options)
    settings = {k: v for k, v in values.items() if not k.endswith("key")}
    settings["weights"] = _weights(request.model)
    for name, _, _, option in options_of(find_suite(request.suite)):
        if option.weights:
            settings[f"{name}_weights"] = _weights(getattr(request.options, name))
    return json.loads(json.dumps(settings, default=str))


def _weights(model: str | None) -> str | None:
    """A fingerprint of the weights that a name stands for now; None at a server."""
    return None if model is None or is_server(model) else fingerprint(locate(model))
