"""The benchmarks of four suites: a table of tasks of the harness, with the metric of each and why.

A new benchmark is a new entry. The announced numbers (Table 1 of
https://mistral.ai/news/mistral-nemo; by language, the model card of the base model) are shown
beside the measured ones and are not the same measure: Mistral says only that it used a library of
its own.
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
    data: str  # a data set of the hub
    packages: tuple[str, ...] = ()  # besides those of the extra `eval`
    shots: int  # worked examples before the question
    metric: str
    filter: str = "none"  # of the answer, before it is compared
    part: str = ""
    also: tuple[str, ...] = ()  # further metrics of the same answers; `pmi` is ours
    why: str = ""
    announced: Mapping[str, float] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.name} {self.part}".strip()


def _announced(*scores: float) -> dict[str, float]:
    return dict(zip(MODELS, scores, strict=True))


TABLE1 = [
    Benchmark(
        name="HellaSwag", task="hellaswag", folder="hellaswag", shots=0, metric="acc_norm",
        data="Rowan/hellaswag", also=("acc",), announced=_announced(83.5, 80.1, 80.6),
        why="endings differ in length, so their likelihood is divided by it",
    ),
    Benchmark(
        name="Winogrande", task="winogrande", folder="winogrande", shots=0, metric="acc",
        data="allenai/winogrande", announced=_announced(76.8, 74.0, 73.5),
        why="the same text follows both names, so nothing needs dividing",
    ),
    Benchmark(
        name="NaturalQuestions", task="nq_open", folder="nq_open", shots=5, metric="exact_match",
        filter="remove_whitespace", announced=_announced(31.2, 29.8, 28.2),
        why="a written answer, equal to a given one except for case, articles and punctuation",
        data="google-research-datasets/nq_open", ),
    Benchmark(
        name="TriviaQA", task="triviaqa", folder="triviaqa", shots=5, metric="exact_match",
        filter="remove_whitespace", announced=_announced(73.8, 71.3, 61.0),
        why="a written answer, equal to one of the aliases except for case and punctuation",
        data="mandarjoshi/trivia_qa", ),
    Benchmark(
        name="MMLU", task="mmlu", data="cais/mmlu", folder="mmlu/default", shots=5, metric="acc",
        announced=_announced(68.0, 71.5, 62.3),
        why="the likeliest letter; all questions of the 57 subjects weigh the same",
    ),
    Benchmark(
        name="OpenBookQA", task="openbookqa", folder="openbookqa", shots=0, metric="acc_norm",
        data="allenai/openbookqa", also=("acc", "pmi"), announced=_announced(60.6, 50.8, 56.4),
        why="published numbers are acc_norm; the announced ones look like pmi, the likelihood "
        'divided by that of the same answer after "Answer:" alone (LLaMA, arXiv:2302.13971)',
    ),
    Benchmark(
        name="CommonsenseQA", task="commonsense_qa", folder="commonsense_qa", shots=0, metric="acc",
        data="tau/commonsense_qa", announced=_announced(70.4, 60.8, 66.7),
        why="the likeliest letter; it is not known whether the announced ones compare letters",
    ),
    Benchmark(
        name="TruthfulQA", task="truthfulqa_mc2", folder="truthfulqa", shots=0, metric="acc",
        data="truthfulqa/truthful_qa", announced=_announced(50.3, 46.6, 43.0),
        why="mc2, the share of probability on true answers; others measure the announced 50",
    ),
    Benchmark(
        name="TruthfulQA mc1", task="truthfulqa_mc1", folder="truthfulqa", shots=0, metric="acc",
        why="whether the true answer is the likeliest; not in the announcement",
        data="truthfulqa/truthful_qa", ),
]  # fmt: skip

MMLU_BY_LANGUAGE = {
    "fr": 62.3, "de": 62.7, "es": 64.6, "it": 61.3, "pt": 63.3, "ru": 59.2, "zh": 59.0, "ja": 59.0,
}  # fmt: skip


def _in(languages: str, task: str, *, name: str, folder: str, **fields: Any) -> list[Benchmark]:
    """A benchmark for each language; the name of the task contains its code."""
    scores = MMLU_BY_LANGUAGE if name == "MMLU" else {}
    return [
        Benchmark(
            name=name, part=language, task=task.format(language), **fields,
            folder=folder.format(language),
            announced={MODELS[0]: scores[language]} if language in scores else {},
        )
        for language in languages.split()
    ]  # fmt: skip


# Nobody has translated HellaSwag and ARC to Japanese for the harness, nor HellaSwag to Chinese.
MULTILINGUAL = [
    *_in("fr de es it pt ru ar hi", "hellaswag_{}", name="HellaSwag", shots=0, metric="acc_norm",
         data="alexandrainst/m_hellaswag", folder="okapi/hellaswag_multilingual",
         why="as in English"),
    *_in("fr de es it pt ru zh ar hi", "arc_{}", name="ARC challenge", shots=0, metric="acc_norm",
         data="alexandrainst/m_arc", folder="okapi/arc_multilingual",
         why="published numbers are acc_norm"),
    *_in("fr de es it pt ru zh ar hi", "m_mmlu_{}", name="MMLU", shots=5, metric="acc",
         data="alexandrainst/m_mmlu", folder="okapi/mmlu_multilingual", why="as in English"),
    *_in("ja ko", "global_mmlu_full_{}", name="MMLU", shots=5, metric="acc",
         data="CohereForAI/Global-MMLU", folder="global_mmlu/full/{}",
         why="Global-MMLU, as Okapi has neither Japanese nor Korean"),
    *_in("fr de es ru zh ja", "mgsm_native_cot_{}", name="MGSM", shots=8, metric="exact_match",
         data="juletxara/mgsm", folder="mgsm/native_cot", filter="flexible-extract",
         why="the last number of an answer that thinks in the language of the question"),
    *_in("fr pt ru zh", "xwinograd_{}", name="XWinograd", shots=0, metric="acc",
         data="Muennighoff/xwinograd", folder="xwinograd", why="as Winogrande"),
    *_in("ja", "xwinograd_jp", name="XWinograd", shots=0, metric="acc",
         data="Muennighoff/xwinograd", folder="xwinograd", why="as Winogrande"),
    *_in("ja", "ja_leaderboard_jcommonsenseqa", name="JCommonsenseQA", shots=3, metric="acc",
         data="Rakuten/JGLUE", folder="japanese_leaderboard",
         why="the likeliest answer"),
    *_in("ar zh hi", "xstorycloze_{}", name="XStoryCloze", shots=0, metric="acc",
         data="juletxara/xstory_cloze", folder="xstorycloze", why="the likelier of two endings"),
    *(
        Benchmark(name="Belebele", part=part, task=f"belebele_{code}", data="facebook/belebele",
                  folder="belebele", shots=5, metric="acc", why="the likeliest letter")
        for part, code in (
            ("ar", "arb_Arab"), ("hi", "hin_Deva"), ("zh", "zho_Hans"), ("ko", "kor_Hang"),
        )
    ),
    *_in("ar", "arabicmmlu", name="ArabicMMLU", shots=5, metric="acc", data="MBZUAI/ArabicMMLU",
         folder="arabicmmlu", why="questions of Arabic schools; the likeliest letter"),
    *_in("zh", "cmmlu", name="CMMLU", shots=5, metric="acc", data="haonan-li/cmmlu",
         folder="cmmlu", why="questions of Chinese schools; the likeliest letter"),
    *_in("ko", "kmmlu", name="KMMLU", shots=5, metric="acc", data="HAERAE-HUB/KMMLU",
         folder="kmmlu/default", why="Korean examinations; the likeliest letter"),
    *_in("ko", "haerae", name="HAE-RAE", shots=5, metric="acc", data="HAERAE-HUB/HAE_RAE_BENCH",
         folder="haerae", why="Korean words, history and texts; the likeliest letter"),
]  # fmt: skip

INSTRUCTIONS = [
    Benchmark(
        name="IFEval", task="ifeval", data="google/IFEval", folder="ifeval", shots=0,
        metric="prompt_level_strict_acc", packages=("langdetect", "immutabledict", "nltk"),
        also=("inst_level_strict_acc", "prompt_level_loose_acc", "inst_level_loose_acc"),
        why="rules that a program checks; an answer counts if it follows all of its prompt's "
        "(arXiv:2311.07911)",
    ),
]  # fmt: skip

REASONING = [
    Benchmark(
        name="GSM8K", task="gsm8k_cot", data="openai/gsm8k", folder="gsm8k", shots=8,
        metric="exact_match", filter="flexible-extract",
        why="the last number of an answer that thinks first",
    ),
    Benchmark(
        name="MMLU-Pro", task="mmlu_pro", data="TIGER-Lab/MMLU-Pro", folder="mmlu_pro", shots=5,
        metric="exact_match", filter="custom-extract",
        why='the letter after "answer is" of an answer that thinks first, of up to ten',
    ),
    Benchmark(
        name="BBH", task="bbh_cot_fewshot", data="SaylorTwift/bbh", folder="bbh/cot_fewshot",
        shots=3, metric="exact_match", filter="get-answer",
        why='what follows "the answer is" in an answer that thinks first; 27 tasks',
    ),
]  # fmt: skip

BENCHMARKS = {
    "table1": TABLE1, "multilingual": MULTILINGUAL, "instructions": INSTRUCTIONS,
    "reasoning": REASONING,
}  # fmt: skip
