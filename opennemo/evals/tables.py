"""The suites `table1` and `multilingual`: tasks of lm-evaluation-harness, made into rows.

All tasks of a suite go through one call, so that whatever their questions share is computed once. A
task whose data are missing becomes a row that says so.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opennemo.errors import InvalidRequest
from opennemo.evals.benchmark_data import BenchmarkData
from opennemo.evals.benchmarks import BENCHMARKS, Benchmark
from opennemo.evals.patches import quiet_harness
from opennemo.evals.rows import MISSING, ResultRow
from opennemo.evals.runs import Run
from opennemo.evals.suites import Outcome, Request
from opennemo.llm import LLM

SHOTS_SEED = 1234  # the harness's own


def measure(llm: LLM, request: Request, run: Run) -> Outcome:
    """Rows of the suite's benchmarks that were asked for by name, task or part; all by default."""
    from opennemo.evals.harness import OpenNemoLM

    benchmarks, tasks = BENCHMARKS[request.suite], {*request.tasks}
    chosen = [b for b in benchmarks if not tasks or {b.name, b.task, b.part} & tasks]
    if not chosen:
        names = ", ".join(dict.fromkeys(b.name for b in benchmarks))
        raise InvalidRequest(f"--tasks {', '.join(request.tasks)}: there are {names}")
    if request.data is None:
        print("Data that are not in the cache yet are fetched from the Hugging Face hub.")
    lm = OpenNemoLM(llm, run=run)
    rows, items = run_tasks(
        lm, chosen, BenchmarkData(request.data), request.limit, chat=request.chat
    )
    return Outcome(rows, items, [f"{b.name}: {b.why}." for b in chosen if b.why])


def run_tasks(
    lm: Any,
    benchmarks: Sequence[Benchmark],
    data: BenchmarkData,
    limit: int | None,
    chat: bool = False,
) -> tuple[list[ResultRow], list[dict[str, Any]]]:
    """Rows of the benchmarks, and their answers one by one.

    Args:
        lm: a model of the harness (lm_eval.api.model.LM), ours or another.
        limit: questions of each benchmark, the first ones; a group's are spread over its tasks.
        chat: whether questions and examples are turns of a conversation in the model's layout.
    """
    from lm_eval.evaluator import evaluate

    rows, items = [], []
    with quiet_harness(), data.as_hub():
        loaded = [(benchmark, *_load(benchmark)) for benchmark in benchmarks]
        chosen, samples = {}, {}
        for benchmark, tasks, _ in loaded:
            for name, task in tasks.items():
                task.set_config(key="num_fewshot", value=benchmark.shots)
                task.set_fewshot_seed(seed=SHOTS_SEED)
                chosen[name], n = task, len(task.eval_docs)
                samples[name] = list(range(n if limit is None else min(n, -(-limit // len(tasks)))))
        outcome: Any = chosen and evaluate(
            lm, {"tasks": chosen}, samples=samples, bootstrap_iters=0,
            apply_chat_template=chat, fewshot_as_multiturn=chat,
        )  # fmt: skip
        for benchmark, tasks, trouble in loaded:
            own = [
                sample | {"task": name}
                for name in tasks
                for sample in outcome["samples"][name]
                if sample["filter"] == benchmark.filter
            ]
            own.sort(key=lambda sample: (sample["task"], sample["doc_id"]))
            cut = getattr(lm, "cut", ())
            n_cut = sum(any(asked[0] in cut for asked in sample["arguments"]) for sample in own)
            trouble |= {"cut to the model's context": n_cut} if n_cut else {}
            rows.append(_row(benchmark, own, lm, trouble))
            items += [_item(benchmark, sample) for sample in own]
    return rows, items


def _load(benchmark: Benchmark) -> tuple[dict[str, Any], dict[str, int]]:
    """Its tasks by name, and as trouble why there are none."""
    from lm_eval import tasks

    folder = Path(tasks.__file__).parent / benchmark.folder
    manager = tasks.TaskManager(include_path=str(folder), include_defaults=False)
    try:
        return dict(manager.load([benchmark.task])["tasks"]), {}
    except (OSError, ValueError, KeyError, ImportError) as error:
        why = str(error).strip().splitlines()[0][:200]
        kind = "" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: "
        return {}, {f"{MISSING}: {kind}{why}": 1}


def _row(
    benchmark: Benchmark, samples: list[dict[str, Any]], lm: Any, trouble: Mapping[str, int]
) -> ResultRow:
    also = {}
    for metric in benchmark.also if samples else ():
        scores = _pmi(samples, lm) if metric == "pmi" else [float(s[metric]) for s in samples]
        also[metric] = 100 * sum(scores) / len(scores)
    return ResultRow(
        name=benchmark.name, part=benchmark.part, trouble=trouble, also=also,
        setting=f"{benchmark.shots}-shot, {benchmark.metric}", announced=benchmark.announced,
        items={_id(s): float(s[benchmark.metric]) for s in samples},
    )  # fmt: skip


def _pmi(samples: Sequence[Mapping[str, Any]], lm: Any) -> list[float]:
    """Whether the right choice gains most by the question, against "Answer:" in its place."""
    from lm_eval.api.instance import Instance

    asked = [("Answer:", choice) for s in samples for _, choice in s["arguments"]]
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i)
        for i, pair in enumerate(asked)
    ]
    without = iter(logprob for logprob, _ in lm.loglikelihood(requests))
    right = []
    for s in samples:
        gains = [response[0][0] - next(without) for response in s["resps"]]
        right.append(float(gains.index(max(gains)) == s["target"]))
    return right


def _id(sample: Mapping[str, Any]) -> str:
    return f"{sample['task']}/{sample['doc_id']}"


def _item(benchmark: Benchmark, sample: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": _id(sample),
        "value": float(sample[benchmark.metric]),
        "prompt": sample["arguments"][0][0],
        "choices": [arguments[1] for arguments in sample["arguments"]],
        "answers": [response[0] for response in sample["resps"]],
        "target": sample["target"],
    }
