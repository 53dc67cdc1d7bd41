"""Conversations marked by another model: MT-Bench, and WildBench's score (Table 2).

A judge sees a question and an answer and writes a mark. A mark that is not in the judge's text, or
an answer that does not come, is counted as missing, never guessed. Judges are biased (towards the
first answer, long answers, and their own), so three controls go with the marks: `repeats` marks
each answer more than once; `duel` shows two models' answers in both orders and counts a win only if
both agree; `calibrate` and `agree` measure how well a judge distinguishes right from broken, and
how it compares with given marks.

MT-Bench: arXiv:2306.05685 and FastChat's prompts. WildBench: arXiv:2406.04770, its template v2.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import stdev
from typing import Any

from opennemo.errors import InvalidRequest, OpenNemoError
from opennemo.evals.benchmark_data import BenchmarkData, read_lines
from opennemo.evals.endpoint import ChatModel, open_model
from opennemo.evals.rows import ResultRow, gather
from opennemo.evals.runs import Run, digest
from opennemo.evals.suites import Judges, Outcome, Request
from opennemo.llm import LLM

TASKS = ("mt-bench", "wildbench", "calibrate")
DEFAULT = TASKS[:2]
FASTCHAT = "github.com/lm-sys/FastChat, fastchat/llm_judge/data"
TEMPERATURE = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
WITH_REFERENCE = {"math", "reasoning", "coding"}
# WildBench's five kinds of tasks by primary tag, and what each weighs in its macro average.
KINDS = {
    "Creative Writing": "creative", "Editing": "creative", "Brainstorming": "creative",
    "Role playing": "creative", "Others": "creative", "Reasoning": "planning",
    "Planning": "planning", "Math": "maths", "Data Analysis": "maths",
    "Information seeking": "information", "Advice seeking": "information",
    "Coding & Debugging": "coding",
}  # fmt: skip
WEIGHTS = {"creative": 0.5, "planning": 1.25, "maths": 1.0, "information": 0.75, "coding": 1.25}
ANNOUNCED = {
    "MT-Bench": {"Mistral NeMo": 7.84, "Llama 3 8B": 6.85, "Mistral 7B": 6.48},
    "WildBench": {"Mistral NeMo": 42.57, "Llama 3 8B": 28.77, "Mistral 7B": 25.55},
}
NO_MARK = "the judge gave no mark"


def prepare(request: Request) -> None:
    """Raises InvalidRequest without a judge, or without the questions."""
    if not request.options.judge:
        raise InvalidRequest("--suite chat needs --judge, a model or the address of a server")
    data = BenchmarkData(request.data)
    MTBench(data, request.limit, request.options.references)
    if "wildbench" in request.chosen(TASKS, DEFAULT):
        wild_tasks(data, request.limit)


def measure(model: ChatModel, request: Request, run: Run) -> Outcome:
    """Marks of a judge for the model's answers, and the controls that were requested."""
    options: Judges = request.options
    data, judge = BenchmarkData(request.data), options.judge
    assert judge, "prepare asks for one"
    wanted = request.chosen(TASKS, DEFAULT)
    with open_model(
        judge, options.judge_name, options.judge_key, None,
        load=lambda: LLM.load(judge, device=request.device),
    ) as judge_model:  # fmt: skip
        judging = Judging(judge_model, run, options.repeats)
        rows, items, notes = [], [], []
        if judge_model.name == model.name:
            notes.append(f"{model.name} judges itself, which is known to favour it.")
        bench = MTBench(data, request.limit, options.references)
        if "mt-bench" in wanted:
            answers = bench.answers(model, run)
            marks = bench.grade(judging, answers)
            rows += bench.rows(marks, judge_model.name)
            items = [{"id": number, "answers": answer} for number, answer in answers.items()]
            items += [{"id": item, "value": mark} for item, mark in marks.items()]
            if options.against:
                lines = read_lines(options.against / "items.jsonl")
                theirs = {line["id"]: line["answers"] for line in lines if "answers" in line}
                rows += bench.duel(judging, answers, theirs, options.against.name)
        if "calibrate" in wanted:
            rows += bench.calibrate(judging)
        if options.agreement:
            given = read_lines(options.agreement)
            turns = {line["question_id"]: line["turns"] for line in given}
            scores = {
                f"{g['question_id']}/{i}": m for g in given for i, m in enumerate(g["scores"], 1)
            }
            rows += agree(bench.grade(judging, turns), scores)
        if "wildbench" in wanted:
            rows += wild_bench(data, model, judging, request.limit)
        if judging.spreads:
            spread = sum(judging.spreads) / len(judging.spreads)
            notes.append(f"Repeated marks of one answer have a standard deviation of {spread:.2f}.")
    return Outcome(rows, items, notes)


@dataclass
class Judging:
    """A judge, and where its marks are kept."""

    judge: ChatModel
    run: Run
    repeats: int = 1
    seed: int = 0
    spreads: list[float] = field(default_factory=list)  # between an answer's repeated marks

    def marks(self, prompts: Mapping[str, list[dict[str, Any]] | str], find: Any) -> dict:
        """What `find` reads from the judge's answers, by item; a text where it finds nothing.

        With repeats an item's mark is their mean. A text in place of a prompt is the reason why
        nothing can be asked, and is returned in place of the mark.
        """
        asked = [
            (item, messages, self.seed + i)
            for item, messages in prompts.items()
            if not isinstance(messages, str)
            for i in range(self.repeats)
        ]
        heat = 0.0 if self.repeats == 1 else 0.7  # or each repeat would be the same
        answers = self.run.ask_all(
            f"Judging by {self.judge.name}", asked,
            key=lambda a: digest("judge", self.judge.name, a[1], a[2], heat),
            ask=lambda a: self.judge.ask(a[1], temperature=heat, max_tokens=2048, seed=a[2]),
        )  # fmt: skip
        repeated: dict[str, list[Any]] = {}
        for (item, _, _), answer in zip(asked, answers, strict=True):
            failed = isinstance(answer, OpenNemoError)
            mark = str(answer) if failed else find(answer.get("content") or "")
            repeated.setdefault(item, []).append(NO_MARK if mark is None else mark)
        marks: dict[str, Any] = {k: v for k, v in prompts.items() if isinstance(v, str)}
        for item, values in repeated.items():
            numbers = [v for v in values if not isinstance(v, str)]
            marks[item] = sum(numbers) / len(numbers) if numbers else values[0]
            self.spreads += [stdev(numbers)] if len(numbers) > 1 else []
        return marks


def rating(text: str) -> float | None:
    """The first [[number]] of a judgement from 1 to 10, else the first [number]."""
    return _mark(re.search(r"\[\[(\d+\.?\d*)\]\]", text) or re.search(r"\[(\d+\.?\d*)\]", text))


def wild_score(text: str) -> float | None:
    """The "score" of WildBench's JSON, from 1 to 10."""
    return _mark(re.search(r'"score"\s*:\s*"?\s*(\d+\.?\d*)', text))


def _mark(match: re.Match[str] | None) -> float | None:
    mark = float(match[1]) if match else 0.0
    return mark if 1 <= mark <= 10 else None


class MTBench:
    """80 questions of two turns, with GPT-4's answers to those that can be right or wrong."""

    def __init__(self, data: BenchmarkData, limit: int | None, references: str = "gpt-4"):
        read = lambda name: data.lines(f"mt_bench/{name}.jsonl", FASTCHAT)  # noqa: E731
        self.questions = read("question")[:limit]
        self.prompts = {prompt["name"]: prompt for prompt in read("judge_prompts")}
        self.references = {
            line["question_id"]: line["choices"][0]["turns"]
            for line in read(f"reference_answer_{references}")
        }
        self.setting = f"marks of 10, references {references}"

    def answers(self, model: ChatModel, run: Run) -> dict[int, list[str] | str]:
        """Both turns of each conversation, or why there are none."""

        def converse(question: Mapping[str, Any]) -> list[str]:
            messages, heat = [], TEMPERATURE.get(question["category"], 0.0)
            for turn in question["turns"]:
                messages.append({"role": "user", "content": turn})
                reply = model.ask(messages, temperature=heat, max_tokens=1024, seed=0)
                messages.append({"role": "assistant", "content": reply["content"] or ""})
            return [m["content"] for m in messages[1::2]]

        conversations = run.ask_all(
            f"Answers of {model.name}", self.questions,
            key=lambda q: digest("mt-bench", model.name, q["turns"]), ask=converse,
        )  # fmt: skip
        return {
            q["question_id"]: str(a) if isinstance(a, OpenNemoError) else a
            for q, a in zip(self.questions, conversations, strict=True)
        }

    def grade(self, judging: Judging, answers: Mapping[int, list[str] | str]) -> dict[str, Any]:
        """A mark for each turn, by "question/turn"; a text where there is none."""
        prompts: dict[str, Any] = {}
        for question in self.questions:
            answer = answers.get(question["question_id"], "no answer is given")
            for turn in (1, 2):
                item = f"{question['question_id']}/{turn}"
                prompts[item] = _reason(answer) or self._prompt(
                    "single", question, turn, answer=answer
                )
        return judging.marks(prompts, rating)

    def _prompt(
        self, kind: str, question: Mapping[str, Any], turn: int, **answers: Sequence[str]
    ) -> list[dict[str, str]]:
        """FastChat's prompt that shows one answer (`single`) or two (`pair`), up to a turn."""
        version = {"single": "v1", "pair": "v2"}[kind]
        shown = {"question": question["turns"], **answers}
        if question["category"] in WITH_REFERENCE:
            version = "math-v1"
            shown["ref_answer"] = self.references[question["question_id"]]
        fields = {name: texts[0] for name, texts in shown.items()}
        fields |= {
            f"{k}_{i}": text for k, texts in shown.items() for i, text in enumerate(texts, 1)
        }
        prompt = self.prompts[f"{kind}-{version}{'-multi-turn' * (turn == 2)}"]
        text = prompt["prompt_template"].format(**fields)
        return [{"role": "system", "content": prompt["system_prompt"]},
                {"role": "user", "content": text}]  # fmt: skip

    def rows(self, marks: Mapping[str, Any], judge: str) -> list[ResultRow]:
        """The mean of all marks, of each turn, and of each category."""
        settings = {"setting": f"{self.setting}, judge {judge}", "percent": False}
        categories = {str(q["question_id"]): q["category"] for q in self.questions}
        return [
            *gather("MT-Bench", marks, announced=ANNOUNCED["MT-Bench"], **settings),
            *gather("MT-Bench", marks, parts=lambda i: f"turn {i.split('/')[1]}", **settings),
            *gather("MT-Bench", marks, parts=lambda i: categories[i.split("/")[0]], **settings),
        ]

    def duel(
        self, judging: Judging, ours: Mapping[int, Any], theirs: Mapping[int, Any], against: str
    ) -> list[ResultRow]:
        """The share of questions won against another model, a tie being half.

        Each is judged with our answer first and with theirs first; verdicts that differ are ties.
        """
        prompts: dict[str, Any] = {}
        for question in self.questions:
            number = question["question_id"]
            pair = ours[number], theirs.get(number, "the other model gave no answer")
            for order in ("ab", "ba"):
                sides = {f"answer_{side}": texts for side, texts in zip(order, pair, strict=True)}
                prompts[f"{number}/{order}"] = _reason(*pair) or self._prompt(
                    "pair", question, 2, **sides
                )
        verdicts = judging.marks(prompts, _verdict)
        values: dict[str, float | str] = {}
        n_turned = 0
        for number in (question["question_id"] for question in self.questions):
            first, second = verdicts[f"{number}/ab"], verdicts[f"{number}/ba"]
            why = _reason(first, second)
            turned = why is None and first != 1 - second  # in the second order we are B
            n_turned += turned
            values[str(number)] = why or (0.5 if turned else first)
        (row,) = gather(f"wins against {against}", values, setting="both orders, ties are half")
        changed = {"verdict changed with the order": n_turned} if n_turned else {}
        return [replace(row, trouble={**row.trouble, **changed})]

    def calibrate(self, judging: Judging) -> list[ResultRow]:
        """How often the judge marks a reference answer above the same with its words shuffled."""
        prompts, rng, values = {}, random.Random(judging.seed), {}
        right_or_wrong = [q for q in self.questions if q["question_id"] in self.references]
        for question in right_or_wrong:
            right = self.references[question["question_id"]][0]
            words = right.split()
            broken = " ".join(rng.sample(words, len(words)))
            for name, text in (("right", right), ("broken", broken)):
                prompt = self._prompt("single", question, 1, answer=[text])
                prompts[f"{question['question_id']}/{name}"] = prompt
        marks = judging.marks(prompts, rating)
        for number in (question["question_id"] for question in right_or_wrong):
            right, broken = (marks[f"{number}/{name}"] for name in ("right", "broken"))
            values[str(number)] = _reason(right, broken) or float(right > broken)
        return gather("judge tells right from broken", values, setting=judging.judge.name)


def _reason(*values: Any) -> str | None:
    """The first text among values that have a text where they are missing."""
    return next((value for value in values if isinstance(value, str)), None)


def _verdict(text: str) -> float | None:
    match = re.search(r"\[\[([ABC])\]\]", text)
    return {"A": 1.0, "B": 0.0, "C": 0.5}[match[1]] if match else None


def agree(marks: Mapping[str, Any], given: Mapping[str, float]) -> list[ResultRow]:
    """How a judge's marks compare with given ones of the same answers."""
    common = [item for item in given if not isinstance(marks.get(item, ""), str)]
    missing = {"without a mark of both": n} if (n := len(given) - len(common)) else {}
    near = {item: float(abs(marks[item] - given[item]) <= 1) for item in common}
    apart = {item: marks[item] - given[item] for item in common}
    ours, theirs = ([m[item] for item in common] for m in (marks, given))
    also = {"correlation": 0.0, "of ranks": 0.0}
    if min(len({*ours}), len({*theirs})) > 1:  # else one of the two does not vary
        from scipy import stats  # which lm-eval brings

        pearson, spearman = stats.pearsonr(ours, theirs), stats.spearmanr(ours, theirs)
        also = {"correlation": pearson.statistic, "of ranks": spearman.statistic}  # pyright: ignore
    return [
        ResultRow(name="agreement", part="within one mark", items=near, also=also, trouble=missing),
        ResultRow(name="agreement", part="mean difference", items=apart, percent=False),
    ]


def wild_tasks(data: BenchmarkData, limit: int | None) -> tuple[str, str, list[dict[str, Any]]]:
    """Name, template and tasks of WildBench; without its tasks, Arena-Hard's questions.

    Tasks are read from `wildbench/tasks.jsonl`, lines of the hub's allenai/WildBench (v2).
    """
    source = "github.com/allenai/WildBench, evaluation"
    template = data.find("wildbench/eval_template.score.v2.md", source).read_text("utf-8")
    if data.look("wildbench/tasks.jsonl"):
        return "WildBench", template, data.lines("wildbench/tasks.jsonl", "")[:limit]
    lines = data.lines("arena_hard_v0.1/question.jsonl", "github.com/lmarena/arena-hard-auto")
    tasks = [
        {"session_id": line["uid"],
         "conversation_input": [{"role": "user", "content": line["prompt"]}]}
        for line in lines[:limit]
    ]  # fmt: skip
    return "Arena-Hard, marked by WildBench's template", template, tasks


def wild_bench(
    data: BenchmarkData, model: ChatModel, judging: Judging, limit: int | None
) -> list[ResultRow]:
    """The score of WildBench or its substitute, in total and by kind of task."""
    name, template, tasks = wild_tasks(data, limit)
    talks = [
        [{k: m[k] for k in ("role", "content")} for m in t["conversation_input"]] for t in tasks
    ]
    answers = judging.run.ask_all(
        f"Answers of {model.name}", talks, key=lambda t: digest("wildbench", model.name, t),
        ask=lambda talk: model.ask(talk, temperature=0, max_tokens=4096, seed=0),
    )  # fmt: skip
    prompts: dict[str, Any] = {}
    for task, talk, answer in zip(tasks, talks, answers, strict=True):
        failed = isinstance(answer, OpenNemoError)
        fields = {
            "history": "".join(f"{m['role'].upper()}: {m['content']}\n\n" for m in talk[:-1]),
            "user_query": talk[-1]["content"],
            "model_output": "" if failed else answer["content"] or "",
            "checklist": "".join(f"- {point}\n" for point in task.get("checklist") or ()),
        }
        text = re.sub(r"\{\$(\w+)\}", lambda match, fields=fields: fields[match[1]], template)
        prompts[task["session_id"]] = str(answer) if failed else [{"role": "user", "content": text}]
    marks = judging.marks(prompts, wild_score)
    scores = {k: v if isinstance(v, str) else (v - 5) * 20 for k, v in marks.items()}
    kinds = {t["session_id"]: KINDS.get(str(t.get("primary_tag")), "") for t in tasks}
    settings = {"setting": f"(mark - 5) x 20, judge {judging.judge.name}", "percent": False}
    by_kind = gather(name, scores, parts=kinds.__getitem__, **settings)
    parts = [(WEIGHTS[r.part], r.score) for r in by_kind if r.part and r.score is not None]
    total = sum(weight for weight, _ in parts)
    also = {"macro": sum(weight * score for weight, score in parts) / total} if total else {}
    whole = gather(name, scores, also=also, announced=ANNOUNCED.get(name, {}), **settings)
    return [*whole, *(row for row in by_kind if row.part)]
