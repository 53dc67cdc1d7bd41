"""The benchmarks of two suites: a table of tasks of the harness, with the metric of each and why.

A new benchmark is a new entry. What was announced (Table 1 of https://mistral.ai/news/mistral-nemo;
by language, the model card of the base model) stands beside what is measured and is not the same
thing: Mistral says only that it used a library of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MODELS = ("Mistral NeMo 12B", "Gemma 2 9B", "Llama 3 8B")


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A task, or a group of tasks, of the harness."""

    name: str
    task: str
    folder: str  # of the harness that defines it; indexing them all takes half a minute
    shots: int  # worked examples before the question
    metric: str
    filter: str = "none"  # of the answer, before it is compared
    part: str = ""
    also: tuple[str, ...] = ()  # further metrics of the same answers; `pmi` is ours
    why: str = ""
    announced: Mapping[str, float] = field(default_factory=dict)


def _announced(*scores: float) -> dict[str, float]:
    return dict(zip(MODELS, scores, strict=True))


TABLE1 = [
    Benchmark(
        name="HellaSwag", task="hellaswag", folder="hellaswag", shots=0, metric="acc_norm",
        also=("acc",), announced=_announced(83.5, 80.1, 80.6),
        why="endings differ in length, so their likelihood is divided by it",
    ),
    Benchmark(
        name="Winogrande", task="winogrande", folder="winogrande", shots=0, metric="acc",
        announced=_announced(76.8, 74.0, 73.5),
        why="what follows the two names is the same text, so nothing needs dividing",
    ),
    Benchmark(
        name="NaturalQuestions", task="nq_open", folder="nq_open", shots=5, metric="exact_match",
        filter="remove_whitespace", announced=_announced(31.2, 29.8, 28.2),
        why="a written answer, the same as one of the given ones but for case, articles and marks",
    ),
    Benchmark(
        name="TriviaQA", task="triviaqa", folder="triviaqa", shots=5, metric="exact_match",
        filter="remove_whitespace", announced=_announced(73.8, 71.3, 61.0),
        why="a written answer, the same as one of the aliases but for case and marks",
    ),
    Benchmark(
        name="MMLU", task="mmlu", folder="mmlu/default", shots=5, metric="acc",
        announced=_announced(68.0, 71.5, 62.3),
        why="the likeliest letter; all questions of the 57 subjects weigh the same",
    ),
    Benchmark(
        name="OpenBookQA", task="openbookqa", folder="openbookqa", shots=0, metric="acc_norm",
        also=("acc", "pmi"), announced=_announced(60.6, 50.8, 56.4),
        why="published numbers are acc_norm; the announced ones look like pmi, the likelihood "
        'divided by that of the same answer after "Answer:" alone (LLaMA, arXiv:2302.13971)',
    ),
    Benchmark(
        name="CommonsenseQA", task="commonsense_qa", folder="commonsense_qa", shots=0, metric="acc",
        announced=_announced(70.4, 60.8, 66.7),
        why="the likeliest letter; it is not known whether the announced ones compare letters",
    ),
    Benchmark(
        name="TruthfulQA", task="truthfulqa_mc2", folder="truthfulqa", shots=0, metric="acc",
        announced=_announced(50.3, 46.6, 43.0),
        why="mc2, the share of probability on true answers; others measure the announced 50",
    ),
    Benchmark(
        name="TruthfulQA mc1", task="truthfulqa_mc1", folder="truthfulqa", shots=0, metric="acc",
        why="whether the true answer is the likeliest; not in the announcement",
    ),
]  # fmt: skip

MMLU_BY_LANGUAGE = {
    "fr": 62.3, "de": 62.7, "es": 64.6, "it": 61.3, "pt": 63.3, "ru": 59.2, "zh": 59.0, "ja": 59.0,
}  # fmt: skip


def _in(languages: str, task: str, *, name: str, **fields: Any) -> list[Benchmark]:
    """A benchmark for each language, whose code stands in the name of the task."""
    scores = MMLU_BY_LANGUAGE if name == "MMLU" else {}
    return [
        Benchmark(
            name=name, part=language, task=task.format(language), **fields,
            announced={MODELS[0]: scores[language]} if language in scores else {},
        )
        for language in languages.split()
    ]  # fmt: skip


# Nobody has translated HellaSwag and ARC to Japanese for the harness, nor HellaSwag to Chinese.
MULTILINGUAL = [
    *_in("fr de es it pt ru", "hellaswag_{}", name="HellaSwag", shots=0, metric="acc_norm",
         folder="okapi/hellaswag_multilingual", why="as in English"),
    *_in("fr de es it pt ru zh", "arc_{}", name="ARC challenge", shots=0, metric="acc_norm",
         folder="okapi/arc_multilingual", why="published numbers are acc_norm"),
    *_in("fr de es it pt ru zh", "m_mmlu_{}", name="MMLU", shots=5, metric="acc",
         folder="okapi/mmlu_multilingual", why="as in English"),
    *_in("ja", "global_mmlu_full_{}", name="MMLU", shots=5, metric="acc",
         folder="global_mmlu/full/ja", why="Global-MMLU, as Okapi has no Japanese"),
    *_in("fr de es ru zh ja", "mgsm_native_cot_{}", name="MGSM", shots=8, metric="exact_match",
         folder="mgsm/native_cot", filter="flexible-extract",
         why="the last number of an answer that thinks in the language of the question"),
    *_in("fr pt ru zh", "xwinograd_{}", name="XWinograd", shots=0, metric="acc",
         folder="xwinograd", why="as Winogrande"),
    *_in("ja", "xwinograd_jp", name="XWinograd", shots=0, metric="acc",
         folder="xwinograd", why="as Winogrande"),
    *_in("ja", "ja_leaderboard_jcommonsenseqa", name="JCommonsenseQA", shots=3, metric="acc",
         folder="japanese_leaderboard", why="the likeliest answer"),
]  # fmt: skip

BENCHMARKS = {"table1": TABLE1, "multilingual": MULTILINGUAL}
