"""The suites of `benchmarks.py`: tasks of lm-evaluation-harness, made into rows.

All tasks of a suite go through one call, so that whatever their questions share is computed once. A
task whose data are missing becomes a row that says so.
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from opennemo.errors import InvalidRequest
from opennemo.evals.benchmark_data import BenchmarkData, report_lacking
from opennemo.evals.benchmarks import BENCHMARKS, Benchmark
from opennemo.evals.patches import quiet_harness
from opennemo.evals.rows import MISSING, ResultRow
from opennemo.evals.runs import Run
from opennemo.evals.suites import Outcome, Request
from opennemo.llm import LLM

SHOTS_SEED = 1234  # the harness's own


def measure(llm: LLM, request: Request, run: Run) -> Outcome:
    """Rows of the suite's benchmarks, chosen by name, task or part; all by default."""
    from opennemo.evals.harness import OpenNemoLM

    chosen = _chosen(request)
    lm = OpenNemoLM(llm, run=run)
    rows, items = run_tasks(
        lm, chosen, BenchmarkData(request.data), request.limit, chat=request.chat
    )
    return Outcome(rows, items, [f"{b.name}: {b.why}." for b in chosen if b.why])


def prepare(request: Request) -> None:
    """Print what benchmarks lack; raises InvalidRequest if none can be measured."""
    chosen, data = _chosen(request), BenchmarkData(request.data)
    lacking = {b.key: lack for b in chosen if (lack := _lack(b, data))}
    report_lacking(lacking, len(chosen))
    if request.data is None:
        names = ", ".join(dict.fromkeys(b.data for b in chosen if b.key not in lacking))
        print(f"What is not in the cache yet is fetched from the Hugging Face hub: {names}.")


def _chosen(request: Request) -> list[Benchmark]:
    benchmarks, tasks = BENCHMARKS[request.suite], {*request.tasks}
    known = {name for b in benchmarks for name in (b.name, b.task, b.part)}
    if unknown := tasks - known:
        names = ", ".join(dict.fromkeys(b.name for b in benchmarks))
        raise InvalidRequest(f"--tasks {', '.join(sorted(unknown))}: there are {names}")
    return [b for b in benchmarks if not tasks or {b.name, b.task, b.part} & tasks]


def _lack(benchmark: Benchmark, data: BenchmarkData) -> str | None:
    """What a benchmark needs and lacks, as far as that is known before it is loaded."""
    if missing := [name for name in benchmark.packages if find_spec(name) is None]:
        return f"needs pip install {' '.join(missing)}"
    if "nltk" in benchmark.packages and not _has_sentences():
        return "needs NLTK's punkt_tab: python -m nltk.downloader punkt_tab"
    if not data.has(benchmark.data):
        return f"needs the data set {benchmark.data} of the hub, which is not in {data.folder}"
    return None


def _has_sentences() -> bool:
    """Whether NLTK's model of sentences is there; the harness would fetch it on import."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return False
    return True


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
        loaded = [(benchmark, *_load(benchmark, data)) for benchmark in benchmarks]
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


def _load(benchmark: Benchmark, data: BenchmarkData) -> tuple[dict[str, Any], dict[str, int]]:
    """Its tasks by name; without tasks, the reason as `trouble`."""
    from lm_eval import tasks

    if lack := _lack(benchmark, data):
        return {}, {f"{MISSING}: {lack}": 1}
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
        scores = _pmi(samples, lm) if metric == "pmi" else _values(samples, metric)
        also[metric] = 100 * sum(scores) / len(scores)
    return ResultRow(
        name=benchmark.name, part=benchmark.part, trouble=trouble, also=also,
        setting=f"{benchmark.shots}-shot, {benchmark.metric}", announced=benchmark.announced,
        items={_id(s): float(s[benchmark.metric]) for s in samples},
    )  # fmt: skip


def _values(samples: Sequence[Mapping[str, Any]], metric: str) -> list[float]:
    """A metric's values; some have several for a question, one for each of its instructions."""
    values = (s[metric] if isinstance(s[metric], list) else [s[metric]] for s in samples)
    return [float(value) for each in values for value in each]


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
