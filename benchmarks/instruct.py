"""The gains and costs of adapting a model: exact calls of functions, conversation, preferences.

    python benchmarks/instruct.py MODEL [MODEL ...] [--n 200] [--chat FILE] [--prefs FILE]
                                  [--adapter FOLDER] [--shown 0] [--json FILE]

It asks `n` held-out cases, whose functions and arguments do not occur in the training split of
`recipes/tool_data`: `free`, without a grammar, and `grammar`, restricted to valid calls. An answer
is exact if it calls the same functions with the same arguments, or nothing where no call is right;
it is parsed if it is complete and calls declared tools with arguments that their schemas allow.

--chat is a chat file whose answers' loss is compared; --prefs a file of pairs, of which the model
should find the chosen answer likelier, as a whole and per token. The others are derived from the
first model (`opennemo merge` folds an adapter into it); with --adapter it is measured once more,
with that beside it. Goals: 60 % exact when free and 100 % parsed by grammar, after an adapter was
learned in 20 minutes of processor time; at most 1 % more loss; 5 points more as preferred.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from measure import Row, write_rows
from rich.console import Console
from rich.table import Table

from opennemo.engine import EngineConfig
from opennemo.engine.scoring import Pair
from opennemo.errors import InvalidRequest
from opennemo.llm import LLM
from opennemo.tokenizer.chat import encode_chat, parse_reply
from opennemo.tokenizer.messages import Message
from opennemo.train.conversations import Example, read_examples, read_pairs
from opennemo.train.rewards import exact_calls
from recipes.tool_data.apis import execute
from recipes.tool_data.conversations import conversations

LOSS = "loss in conversation, nats a token"
MAX_ANSWER = 300  # tokens


def kind_of(case: dict[str, Any]) -> str:
    calls = case["messages"][-1].get("tool_calls", ())
    if calls:
        return "one call" if len(calls) == 1 else "two calls"
    return "to ask back" if "missing" in case["kind"] else "no call"


def is_parsed(case: dict[str, Any], reply: Message, finish_reason: str | None) -> bool:
    tools = {tool["function"]["name"]: tool for tool in case["tools"]}
    if finish_reason == "length" or "<tool_call>" in (reply["content"] or ""):
        return False
    try:
        for call in reply.get("tool_calls") or ():
            execute(tools[call["function"]["name"]], json.loads(call["function"]["arguments"]))
    except (KeyError, ValueError, InvalidRequest):
        return False
    return True


def ask(
    llm: LLM, cases: list[dict[str, Any]], adapter: str | None, grammar: bool
) -> list[tuple[Message, str | None]]:
    settings: dict[str, Any] = {
        "adapter": adapter, "max_tokens": MAX_ANSWER, "temperature": 0.0,
    }  # fmt: skip
    asked = [(case["messages"][:-1], case["tools"]) for case in cases]
    if grammar:
        replies = [llm.chat(messages, tools=tools, **settings) for messages, tools in asked]
        return [(reply.message, reply.finish_reason) for reply in replies]
    replies = [llm.complete(encode_chat(llm.tokenizer, *both), **settings) for both in asked]
    return [
        (parse_reply(llm.tokenizer, llm.tokenizer.encode(reply.text)), reply.finish_reason)
        for reply in replies
    ]


def answers_of(example: Example) -> Iterator[Pair]:
    """Each answer's ids after all that comes before it."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], example.mask, [False]))))
    ids = example.ids.tolist()
    for start, end in edges.reshape(-1, 2):
        yield ids[:start], ids[start:end]


def chat_loss(llm: LLM, file: Path) -> float:
    """Nats per token of the assistant's words."""
    examples, _ = read_examples([file], llm.tokenizer, max_tokens=llm.engine.max_context)
    pairs = [pair for example in examples for pair in answers_of(example)]
    return -sum(s.logprob for s in llm.score(pairs)) / sum(len(pair[1]) for pair in pairs)


def preferred(llm: LLM, file: Path) -> tuple[float, float]:
    """Share of pairs whose chosen answer is likelier than the other: as a whole, by the token."""
    found, _ = read_pairs([file], llm.tokenizer, max_tokens=llm.engine.max_context)
    pairs = [next(answers_of(e)) for pair in found for e in (pair.chosen, pair.rejected)]
    wholes = np.array([score.logprob for score in llm.score(pairs)])
    by_token = wholes / [len(answer) for _, answer in pairs]
    whole, each = (float((x[::2] > x[1::2]).mean()) for x in (wholes, by_token))
    return whole, each


def measure(
    llm: LLM, cases: list[dict[str, Any]], options: argparse.Namespace, adapter: str | None
) -> dict[str, float]:
    """Shares by what was measured, and the loss."""
    found: dict[str, float] = {}
    kinds = Counter(kind_of(case) for case in cases)
    for how in ("free", "grammar") if cases else ():
        exact, parsed, shown = Counter(), 0, 0
        for case, (reply, reason) in zip(
            cases, ask(llm, cases, adapter, how == "grammar"), strict=True
        ):
            right = exact_calls(case["messages"][-1], reply)
            exact[kind_of(case)] += right
            parsed += is_parsed(case, reply, reason)
            if not right and shown < options.shown:
                shown += 1
                print(json.dumps([how, case["messages"][-2:], reply], ensure_ascii=False))
        found[f"{how}: exact"] = exact.total() / len(cases)
        found |= {f"{how}: exact, {kind} ({n})": exact[kind] / n for kind, n in kinds.items()}
        found[f"{how}: parsed"] = parsed / len(cases)
    if options.chat and adapter is None:
        found[LOSS] = chat_loss(llm, options.chat)
    if options.prefs and adapter is None:
        whole, each = preferred(llm, options.prefs)
        found |= {"preferred": whole, "preferred, by the token": each}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--chat", type=Path)
    parser.add_argument("--prefs", type=Path)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--shown", type=int, default=0, help="wrong answers to print")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cases = list(conversations("test", options.n, 0))
    measured: dict[str, dict[str, float]] = {}
    for model in options.models:
        with LLM.load(model, config=EngineConfig(adapters=True)) as llm:
            measured[model] = measure(llm, cases, options, None)
            print(json.dumps({model: measured[model]}), flush=True)
            if options.adapter and model == options.models[0]:
                llm.engine.load_adapter("adapter", options.adapter)
                measured[str(options.adapter)] = measure(llm, cases, options, "adapter")
    table, rows = Table("", *measured), []
    base = next(iter(measured))
    for what, before in measured[base].items():
        share = what != LOSS
        values = [found.get(what) for found in measured.values()]
        n = len(cases) if what.endswith(("exact", "parsed")) else 0  # standard errors of these
        errors = (
            f" ± {(v * (1 - v) / n) ** 0.5:.1%}" if v is not None and n else "" for v in values
        )
        texts = ("" if v is None else f"{v:.1%}" if share else f"{v:.4f}" for v in values)
        texts = (text + error for text, error in zip(texts, errors, strict=True))
        table.add_row(what, *texts)
        for name, ours in zip(measured, values, strict=True):
            if ours is None or name == base:
                continue
            better, worse = (ours, before) if share else (before, ours)
            rows.append(
                Row(name=f"{name}: {what}", ours=ours, peer=before, peer_name=base,
                    unit="share" if share else "nats/token",
                    ratio=better / worse if worse else float("inf"),
                    goal=None if share else 1 / 1.01)
            )  # fmt: skip
    Console().print(table)
    write_rows(rows, options.json)


if __name__ == "__main__":
    main()
