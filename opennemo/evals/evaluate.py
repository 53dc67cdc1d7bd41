"""From what a person asks for to a folder of results: the model, the run, the suite, the report.

Each suite is a function of what was asked and of who answers, to rows and items; this file knows
their names and which of a request's settings decide an answer, and so name a run.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opennemo.engine import EngineConfig
from opennemo.errors import InvalidRequest
from opennemo.evals import report
from opennemo.evals.benchmark_data import BenchmarkData, read_lines
from opennemo.evals.compare import side_by_side
from opennemo.evals.endpoint import ChatModel, LocalModel, RemoteModel
from opennemo.evals.rows import ResultRow
from opennemo.evals.runs import Run, digest, fingerprint
from opennemo.llm import LLM
from opennemo.model.hub import locate
from opennemo.tokenizer import load_tokenizer

Found = tuple[list[ResultRow], list[dict[str, Any]], list[str]]  # rows, items, notes


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to measure. Fields that only say where things are do not change a run's name."""

    model: str  # a folder, a .gguf, an id of the hub, or the address of a server
    suite: str
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    data: Path | None = None
    output: Path | None = None
    device: str | None = None
    chat: bool = False  # prompts are laid out as conversations, as instruct models are used
    model_name: str | None = None  # at a server
    key: str = "none"
    tokenizer: str | None = None  # of a server's model
    judge: str | None = None
    judge_name: str | None = None
    judge_key: str = "none"
    repeats: int = 1
    against: Path | None = None
    agreement: Path | None = None
    references: str = "gpt-4"
    grammar: bool = True
    required: bool = False
    run_code: bool = False
    texts: tuple[Path, ...] = ()
    lengths: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536, 131072)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    kv_format: str | None = None
    kv_scale: float | None = None


WHERE = {"data", "output", "device", "key", "judge_key"}
Load = Callable[[Request, str | None], LLM]  # in a number format, if one is named


def evaluate(
    request: Request, formats: Sequence[str], load: Load | None = None, n_engines: int = 1
) -> tuple[list[Path], report.Cells, list[str]]:
    """Measure a model, in several number formats one after the other if so many are named.

    -> the folders of results, a table of them, and what must be said beside it.

    Args:
        load: for a model that is not in this process, and has so many engines.

    Raises:
        InvalidRequest: the suite is unknown, or something that it needs is missing.
    """
    if request.suite not in SUITES:
        raise InvalidRequest(f"--suite {request.suite}: there are {', '.join(SUITES)}")
    if load and _is_server(request.model):
        raise InvalidRequest("--engine ray needs the model itself, not a server")
    settings = {k: v for k, v in asdict(request).items() if k not in WHERE}
    settings |= {"weights": _weights(request.model), "judge_weights": _weights(request.judge)}
    settings = json.loads(json.dumps(settings, default=str))
    name = request.model_name or Path(request.model.rstrip("/")).name.removesuffix(".gguf")
    parent = request.output or Path("runs") / f"{name}-{request.suite}-{digest(settings)[:8]}"
    folders, found = [], {}
    for format in formats or (None,):
        folder = parent / format if format and len(formats) > 1 else parent
        run = Run(folder, settings | {"format": format}, n_engines)
        try:
            with _speaker(request, format, load or _load) as model:
                shown = f"{model.name} {format or ''}".strip()
                rows, items, notes = SUITES[request.suite](request, model, run)
            run.write_items(items)
        finally:
            run.close()
        report.write(run.folder, rows, shown, notes)
        if request.suite == "long":
            report.heat_map(run.folder, rows)
        else:
            report.bars(run.folder, {shown: rows})
        folders.append(folder)
        found[shown] = rows
    if len(found) == 1:
        return folders, report.cells(rows, shown), report.remarks(rows)
    return folders, compare(parent, found), []


def compare(folder: Path | None, runs: dict[str, list[ResultRow]]) -> report.Cells:
    """Runs side by side, the first being what others are compared with; written down and drawn."""
    lines = side_by_side(runs)
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "comparison.md").write_text(report.markdown(lines), "utf-8")
        report.bars(folder, runs)
    return lines


def _load(request: Request, format: str | None) -> LLM:
    config = EngineConfig(kv_format=request.kv_format, kv_scale=request.kv_scale)
    return LLM.load(request.model, device=request.device, config=config, format=format)


@contextmanager
def _speaker(request: Request, format: str | None, load: Load) -> Iterator[ChatModel]:
    if _is_server(request.model):
        own = load_tokenizer(locate(request.tokenizer)) if request.tokenizer else None
        yield RemoteModel.connect(request.model, request.model_name, request.key, own)
        return
    with load(request, format) as llm:
        yield LocalModel(llm)


def _weights(model: str | None) -> str | None:
    """Which weights a name stands for now, as far as can be told."""
    return None if model is None or _is_server(model) else fingerprint(locate(model))


def _is_server(model: str) -> bool:
    return model.startswith(("http://", "https://"))


def _llm(model: ChatModel, suite: str) -> LLM:
    if not isinstance(model, LocalModel):
        raise InvalidRequest(f"--suite {suite} needs the model itself, not a server")
    return model.llm


def _tables(request: Request, model: ChatModel, run: Run) -> Found:
    llm = _llm(model, request.suite)  # before imports that take seconds
    from opennemo.evals.harness import OpenNemoLM
    from opennemo.evals.suites import BENCHMARKS
    from opennemo.evals.tables import measure

    known = BENCHMARKS[request.suite]
    chosen = [b for b in known if not request.tasks or {b.name, b.task, b.part} & {*request.tasks}]
    if not chosen:
        names = ", ".join(dict.fromkeys(b.name for b in known))
        raise InvalidRequest(f"--tasks {', '.join(request.tasks)}: there are {names}")
    data = BenchmarkData(request.data)
    if request.data is None:
        print("Data that are not in the cache yet are fetched from the Hugging Face hub.")
    lm = OpenNemoLM(llm, run=run)
    rows, items = measure(lm, chosen, data, request.limit, chat=request.chat)
    return rows, items, [f"{b.name}: {b.why}." for b in chosen if b.why]


def _code(request: Request, model: ChatModel, run: Run) -> Found:
    from opennemo.evals.coding import measure

    if not request.run_code:
        raise InvalidRequest(
            "--suite code runs programs that the model wrote: allow it by --run-code"
        )
    llm = _llm(model, request.suite)
    rows, items = measure(llm, BenchmarkData(request.data), run, request.limit)
    return rows, items, []


def _tools(request: Request, model: ChatModel, run: Run) -> Found:
    from opennemo.evals.functions import CATEGORIES, measure

    chosen = request.tasks or CATEGORIES
    if unknown := set(chosen) - set(CATEGORIES):
        raise InvalidRequest(f"--tasks {', '.join(unknown)}: there are {', '.join(CATEGORIES)}")
    how = {"grammar": request.grammar, "required": request.required}
    if request.required and not request.grammar:
        raise InvalidRequest("--required needs the grammar, which --no-grammar leaves out")
    rows, items = measure(model, run, chosen, request.limit, **how)
    return rows, items, []


def _long(request: Request, model: ChatModel, run: Run) -> Found:
    from opennemo.evals import long_context

    llm = _llm(model, request.suite)
    made = long_context.tasks(BenchmarkData(request.data), request.tasks)
    rows, items = long_context.measure(
        llm, run, made, request.lengths, request.depths, request.limit or 10, request.chat
    )
    return rows, items, []


def _perplexity(request: Request, model: ChatModel, run: Run) -> Found:
    from opennemo.evals.perplexity import measure

    if not request.texts:
        raise InvalidRequest("--suite ppl needs --texts FILE, repeatable")
    return measure(_llm(model, request.suite), request.texts, run, request.limit), [], []


def _chat(request: Request, model: ChatModel, run: Run) -> Found:
    from opennemo.evals.judging import Judging, MTBench, agree, wild_bench

    data, notes = BenchmarkData(request.data), []
    if not request.judge:
        raise InvalidRequest("--suite chat needs --judge, a model or the address of a server")
    wanted = request.tasks or ("mt-bench", "wildbench")
    asked = Request(model=request.judge, suite="chat", model_name=request.judge_name,
                    key=request.judge_key, device=request.device)  # fmt: skip
    with _speaker(asked, None, _load) as judge:
        judging = Judging(judge, run, request.repeats)
        if judge.name == model.name:
            notes.append(f"{judge.name} judges itself, which is known to favour it.")
        rows, items = [], []
        bench = MTBench(data, request.limit, request.references)
        if "mt-bench" in wanted:
            answers = bench.answers(model, run)
            marks = bench.grade(judging, answers)
            rows += bench.rows(marks, judge.name)
            items = [{"id": number, "answers": answer} for number, answer in answers.items()]
            items += [{"id": item, "value": mark} for item, mark in marks.items()]
            if request.against:
                lines = read_lines(request.against / "items.jsonl")
                theirs = {line["id"]: line["answers"] for line in lines if "answers" in line}
                rows += bench.duel(judging, answers, theirs, request.against.name)
        if "calibrate" in wanted:
            rows += bench.calibrate(judging)
        if request.agreement:
            given = read_lines(request.agreement)
            turns = {line["question_id"]: line["turns"] for line in given}
            known = {
                f"{g['question_id']}/{i}": m for g in given for i, m in enumerate(g["scores"], 1)
            }
            rows += agree(bench.grade(judging, turns), known)
        if "wildbench" in wanted:
            rows += wild_bench(data, model, judging, request.limit)
        if judging.spreads:
            spread = sum(judging.spreads) / len(judging.spreads)
            notes.append(f"Repeated marks of one answer have a standard deviation of {spread:.2f}.")
    return rows, items, notes


SUITES: dict[str, Callable[[Request, ChatModel, Run], Found]] = {
    "table1": _tables, "multilingual": _tables, "code": _code, "chat": _chat, "tools": _tools,
    "long": _long, "ppl": _perplexity,
}  # fmt: skip
