"""The benchmarks of two suites: a table of tasks of the harness, with the metric of each and why.

A new benchmark is a new entry. What was announced (Table 1 of https://mistral.ai/news/mistral-nemo;
by language, the model card of the base model) stands beside what is measured and is not the same
thing: Mistral says only that it used a library of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

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

OKAPI = "okapi/{}_multilingual"
MMLU_BY_LANGUAGE = {
    "fr": 62.3, "de": 62.7, "es": 64.6, "it": 61.3, "pt": 63.3, "ru": 59.2, "zh": 59.0, "ja": 59.0,
}  # fmt: skip
# Nobody has translated HellaSwag and ARC to Japanese for the harness, nor HellaSwag to Chinese.
MULTILINGUAL = [
    *(
        Benchmark(
            name="HellaSwag", part=language, task=f"hellaswag_{language}", shots=0,
            folder=OKAPI.format("hellaswag"), metric="acc_norm", why="as in English",
        )
        for language in ("fr", "de", "es", "it", "pt", "ru")
    ),
    *(
        Benchmark(
            name="ARC challenge", part=language, task=f"arc_{language}", shots=0,
            folder=OKAPI.format("arc"), metric="acc_norm", why="published numbers are acc_norm",
        )
        for language in ("fr", "de", "es", "it", "pt", "ru", "zh")
    ),
    *(
        Benchmark(
            name="MMLU", part=language, task=f"m_mmlu_{language}", shots=5,
            folder=OKAPI.format("mmlu"), metric="acc", why="as in English",
            announced={MODELS[0]: MMLU_BY_LANGUAGE[language]},
        )
        for language in ("fr", "de", "es", "it", "pt", "ru", "zh")
    ),
    Benchmark(
        name="MMLU", part="ja", task="global_mmlu_full_ja", folder="global_mmlu/full/ja", shots=5,
        metric="acc", why="Global-MMLU, as Okapi has no Japanese",
        announced={MODELS[0]: MMLU_BY_LANGUAGE["ja"]},
    ),
    *(
        Benchmark(
            name="MGSM", part=language, task=f"mgsm_native_cot_{language}", shots=8,
            folder="mgsm/native_cot", metric="exact_match", filter="flexible-extract",
            why="the last number of an answer that thinks in the language of the question",
        )
        for language in ("fr", "de", "es", "ru", "zh", "ja")
    ),
    *(
        Benchmark(
            name="XWinograd", part="ja" if language == "jp" else language, shots=0, metric="acc",
            task=f"xwinograd_{language}", folder="xwinograd", why="as Winogrande",
        )
        for language in ("fr", "pt", "ru", "zh", "jp")
    ),
    Benchmark(
        name="JCommonsenseQA", part="ja", task="ja_leaderboard_jcommonsenseqa", shots=3,
        folder="japanese_leaderboard", metric="acc", why="the likeliest answer",
    ),
]  # fmt: skip

BENCHMARKS = {"table1": TABLE1, "multilingual": MULTILINGUAL}
