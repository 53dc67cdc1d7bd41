"""How much of a long context a model uses: passkey, and RULER's tasks, from 4k to 128k tokens.

Every task is a haystack that grows in units (sentences, words, documents) and needles that go into
it at given depths; a prompt is the largest that fits its length by the model's own tokenizer.
Prompts, answer prefixes, limits and marking are RULER's (arXiv:2404.06654), so that numbers can be
compared; words are ours, and so is the text between needles, as RULER's essays have no licence. Two
of its tasks are missing (cwe, fwe: counting words). Passkey is that of Landmark Attention
(arXiv:2305.16300). The harness has RULER's tasks, too, but fetches words, essays and a sentence
splitter from the network, runs code of the tokenizer's author, makes 500 prompts of a length and
has no setting for depth.
"""

import itertools
import random
import string
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from opennemo.errors import InvalidRequest, OpenNemoError
from opennemo.evals.benchmark_data import BenchmarkData
from opennemo.evals.rows import gather
from opennemo.evals.runs import Run, digest
from opennemo.evals.suites import Haystacks, Outcome, Request
from opennemo.llm import LLM

RULER = "github.com/NVIDIA/RULER (its data, as JSON lines)"
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
ADJECTIVES = (
    "able brave calm dark eager fair gentle happy idle jolly keen lively merry neat odd proud "
    "quick rare sharp tidy upset vast warm young zesty bold cheap dense early faint grand harsh"
)
NOUNS = (
    "anchor basket candle desert engine falcon garden hammer island jacket kettle ladder mirror "
    "needle orange pencil quarry ribbon saddle temple umbrella valley window yard zebra bridge "
    "castle dragon feather glacier harbor insect jungle kitchen lantern meadow notebook ocean"
)


@dataclass(frozen=True)
class Prompt:
    """A text, how the answer begins, and what it must contain."""

    text: str
    begins: str
    answers: tuple[str, ...]
    any_of: bool = False  # one of them is enough


Make = Callable[[random.Random, int, float], Prompt]  # (rng, units of haystack, depth) -> prompt


def words(rng: random.Random, n: int) -> list[str]:
    """n different words of the kind that RULER takes as keys."""
    return rng.sample([f"{a}-{b}" for a in ADJECTIVES.split() for b in NOUNS.split()], n)


def passkey(rng: random.Random, n: int, depth: float) -> Prompt:
    key = str(rng.randint(10000, 99999))
    lines = [NOISE] * n
    lines.insert(round(depth * n), f"The pass key is {key}. Remember it. {key} is the pass key.")
    text = (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize "
        "them. I will quiz you about the important information there.\n"
        + "\n".join(lines)
        + "\nWhat is the pass key?"
    )
    return Prompt(text, "The pass key is", (key,))


def needles(
    sentences: Sequence[str] | None, *, keys: int = 1, values: int = 1, queries: int = 1,
    kind: str = "numbers", hay: str = "noise",
) -> Make:  # fmt: skip
    """Needles in noise, in sentences of a text, or among other needles; some are queried."""

    def value(rng: random.Random) -> str:
        if kind == "numbers":
            return str(rng.randint(10**6, 10**7 - 1))
        return str(uuid.UUID(int=rng.getrandbits(128)))

    def make(rng: random.Random, n: int, depth: float) -> Prompt:
        names = words(rng, keys)
        truth = {name: [value(rng) for _ in range(values)] for name in names}
        if hay == "needles":
            others = words(rng, min(n, 1000))
            lines = [
                NEEDLE.format(kind=kind, key=others[i % len(others)], value=value(rng))
                for i in range(n)
            ]
        else:
            lines = [sentences[i % len(sentences)] for i in range(n)] if sentences else [NOISE] * n
        hidden = [NEEDLE.format(kind=kind, key=k, value=v) for k, vs in truth.items() for v in vs]
        first, *rest = hidden  # the first, which is always queried, is at the wanted depth
        places = sorted([round(depth * n), *(rng.randint(0, n) for _ in rest)], reverse=True)
        at = places.index(round(depth * n))
        rng.shuffle(rest)
        for i, place in enumerate(places):
            lines.insert(place, first if i == at else rest.pop())
        asked = names[:queries]
        one = queries * values == 1
        noun, verb = (kind[:-1], "is") if one else (kind, "are all")
        query = ", ".join(asked[:-1]) + ", and " + asked[-1] if queries > 1 else asked[0]
        what = f"the special magic {noun} for {query} mentioned in the provided text"
        text = (
            f"{'A' if one else 'Some'} special magic {noun} {'is' if one else 'are'} hidden within "
            "the following text. Make sure to memorize it. I will quiz you about the "
            f"{noun} afterwards.\n{(' ' if hay == 'text' else chr(10)).join(lines)}\n"
            f"What {verb} {what}?"
        )
        begins = f"T{what[1:]} {'is' if one else 'are'}"
        return Prompt(text, begins, tuple(v for name in asked for v in truth[name]))

    return make


def variable_tracking(rng: random.Random, n: int, depth: float, hops: int = 4) -> Prompt:
    """A chain of assignments through the noise; all its variables are queried."""

    def chain(length: int, n_lines: int) -> tuple[str, str, list[str]]:
        names = ["".join(rng.choices(string.ascii_uppercase, k=length)) for _ in range(hops + 1)]
        number = str(rng.randint(10000, 99999))
        lines, start = [NOISE] * n_lines, round(depth * max(0, n_lines - 1))
        places = sorted([start, *(rng.randint(start, n_lines) for _ in range(hops))])
        steps = [f"VAR {names[0]} = {number}"]
        steps += [f"VAR {b} = VAR {a}" for a, b in itertools.pairwise(names)]
        for offset, (place, step) in enumerate(zip(places, steps, strict=True)):
            lines.insert(place + offset, step)
        question = (
            "Memorize and track the chain(s) of variable assignment hidden in the following text."
            f"\n\n{chr(10).join(lines)}\nQuestion: Find all variables that are assigned the value "
            f"{number} in the text above."
        )
        begins = (
            "Answer: According to the chain(s) of variable assignment in the text above, "
            f"{hops + 1} variables are assgined the value {number}, they are:"  # sic
        )
        return question, begins, names

    example, begins, answer = chain(3, 5)
    worked = f"{example} {begins} {' '.join(answer)}\n\n"
    question, begins, names = chain(5, n)
    return Prompt(worked + question, begins, tuple(names))


def documents(questions: Sequence[tuple[str, Sequence[str], Sequence[str]]]) -> Make:
    """A question whose own documents are among those of others."""
    every = sorted({document for _, _, own in questions for document in own})
    order = " Only give me the answer and do not output any other words."
    order = "Answer the question based on the given documents." + order

    def make(rng: random.Random, n: int, depth: float) -> Prompt:
        question, answers, own = rng.choice(questions)
        others = [d for d in rng.sample(every, min(len(every), n + len(own))) if d not in own][:n]
        for document in own:
            others.insert(round(depth * len(others)), document)
        shown = "\n\n".join(f"Document {i}:\n{d}" for i, d in enumerate(others, 1))
        text = f"{order}\n\nThe following are given documents.\n\n{shown}\n\n{order}\n\n"
        return Prompt(f"{text}Question: {question}", "Answer:", tuple(answers), any_of=True)

    return make


NEEDLES: dict[str, dict[str, Any]] = {
    "niah_single_1": {},
    "niah_single_2": {"hay": "text"},
    "niah_single_3": {"hay": "text", "kind": "uuids"},
    "niah_multikey_1": {"hay": "text", "keys": 4},
    "niah_multikey_2": {"hay": "needles"},
    "niah_multikey_3": {"hay": "needles", "kind": "uuids"},
    "niah_multivalue": {"hay": "text", "values": 4},
    "niah_multiquery": {"hay": "text", "keys": 4, "queries": 4},
}
TASKS = ("passkey", *NEEDLES, "vt", "qa_1", "qa_2")
WITHOUT_DATA = ("passkey", "niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt")


def task(data: BenchmarkData, name: str) -> tuple[Make, int]:
    """How a task's prompts are made, and the tokens of an answer; its data must be there."""
    match name:
        case "passkey":
            return passkey, 8
        case "vt":
            return variable_tracking, 30
        case "qa_1":
            return documents(_squad(data)), 32
        case "qa_2":
            return documents(_hotpot(data)), 32
    settings = NEEDLES[name]
    return needles(_sentences(data) if settings.get("hay") == "text" else None, **settings), 128


def _sentences(data: BenchmarkData) -> list[str]:
    texts = data.lines("ruler/haystack_state_union.jsonl", "any text you like, as {'text': ...}")
    whole = " ".join(" ".join(line["text"].split()) for line in texts)
    return [f"{sentence}." for sentence in whole.split(". ") if sentence]


def _squad(data: BenchmarkData) -> list[tuple[str, list[str], list[str]]]:
    return [
        (question["question"], question["answers"], [line["context"]])
        for line in data.lines("ruler/squad_dev.jsonl", RULER)
        for question in line["qas"]
        if question["answers"]
    ]


def _hotpot(data: BenchmarkData) -> list[tuple[str, list[str], list[str]]]:
    return [
        (line["question"], [line["answer"]], [f"{t}\n{''.join(s)}" for t, s in line["context"]])
        for line in data.lines("ruler/hotpotqa_dev.jsonl", RULER)
    ]


def prepare(request: Request) -> dict[str, tuple[Make, int]]:
    """The tasks, as `task` gives them; raises InvalidRequest if data of one are missing."""
    names = request.chosen(TASKS, None if request.data else WITHOUT_DATA)
    return {name: task(BenchmarkData(request.data), name) for name in names}


def measure(llm: LLM, request: Request, run: Run) -> Outcome:
    """The share of answers that are right, by task and length, ten prompts for each and depth.

    Items are "task/length/depth/number". Without data, the tasks that need none are measured.
    """
    options: Haystacks = request.options
    tasks = prepare(request)

    def ask(question: tuple[Prompt, int]) -> str:
        prompt, max_tokens = question
        settings: dict[str, Any] = {"temperature": 0.0, "max_tokens": max_tokens}
        if not request.chat:
            return llm.complete(f"{prompt.text} {prompt.begins}", **settings).text
        talk: list[dict[str, Any]] = [{"role": "user", "content": prompt.text}]
        talk += [{"role": "assistant", "content": prompt.begins, "prefix": True}]
        return llm.chat(talk, **settings).text

    rows, items = [], []
    for (name, (make, max_tokens)), length in itertools.product(tasks.items(), options.lengths):
        cells = [
            (f"{name}/{length}/{100 * depth:.0f}/{i}", depth)
            for depth in options.depths
            for i in range(request.limit or 10)
        ]
        values: dict[str, float | str] = {}
        if length > llm.engine.max_context:
            why = f"the model's context is {llm.engine.max_context:,} tokens"
            values = {key: why for key, _ in cells}
        else:
            room = length - max_tokens
            size = largest(llm, make, room)
            prompts = {key: fitting(llm, make, key, size, depth, room) for key, depth in cells}
            answers = run.ask_all(
                f"{name}, {length:,} tokens", [(prompt, max_tokens) for prompt in prompts.values()],
                key=lambda q: digest("long", request.chat, q[0].text, q[0].begins, q[1]), ask=ask,
                side_by_side=max(1, min(8, llm.engine.max_context // length)),
            )  # fmt: skip
            for (key, prompt), text in zip(prompts.items(), answers, strict=True):
                failed = isinstance(text, OpenNemoError)
                values[key] = str(text) if failed else mark(prompt, text)
                items.append({"id": key, "value": values[key], "answer": str(text),
                              "target": prompt.answers})  # fmt: skip
        rows += gather(name, values, parts=lambda item: f"{int(item.split('/')[1]):,}")
    return Outcome(rows, items)


def mark(prompt: Prompt, answer: str) -> float:
    """RULER's: the share of the expected strings in the answer, or whether any is there."""
    hits = [wanted.lower() in answer.lower() for wanted in prompt.answers]
    return float(any(hits)) if prompt.any_of else sum(hits) / len(hits)


def _n_tokens(llm: LLM, prompt: Prompt) -> int:
    return len(llm.encode(f"{prompt.text} {prompt.begins}")) + 32  # and a chat's layout


def largest(llm: LLM, make: Make, room: int) -> int:
    """Units of haystack that certainly fit."""
    fits = lambda n: _n_tokens(llm, make(random.Random(0), n, 0.5)) <= room  # noqa: E731
    if not fits(1):
        raise InvalidRequest(f"--lengths: {room} tokens are too few for this task")
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 64):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def fitting(llm: LLM, make: Make, key: str, size: int, depth: float, room: int) -> Prompt:
    """A prompt with random numbers of its own, a little smaller if its words take more tokens."""
    while True:
        prompt = make(random.Random(key), size, depth)
        if size == 1 or _n_tokens(llm, prompt) <= room:
            return prompt
        size = max(1, size - max(1, size // 50))
