"""Synthetic conversations with tools, to teach calling and to measure it.

A user asks for one thing, or for two at once; for something that no tool does; or forgets an
argument, and is asked for it. Every call is checked by making it (apis.py), and the assistant
reports what the APIs answer. The score is whether the same functions were called with the same
arguments.

Domains, verbs, nouns, arguments and most values of the split "test" do not occur in "train": a
model that calls those has learned to call, not what to call. This file knows no models or ids.
"""

import json
import random
from collections.abc import Iterator, Mapping
from typing import Any

from opennemo.errors import InvalidRequest
from opennemo.tokenizer.messages import Message, hash_id
from recipes.tool_data.apis import Api, Split, draw_api, draw_value, execute, join, parts

ENGLISH = 0.8  # share of conversations; the other languages share the rest
# What may happen in a turn, and how often, in conversations to learn from and in those that end
# with what is compared. Asking back is hard to learn, so it occurs more often.
KINDS = {
    "learned": {"single": 8, "parallel": 4, "none": 3, "missing": 5},
    "compared": {"single": 9, "parallel": 3, "none": 2, "missing": 3},
}
# How many turns and tools a conversation has: many turns, since tools take most of its tokens.
N_TURNS = {"learned": (2, 3, 4, 5), "compared": (1, 1, 1, 2, 3)}
N_TOOLS = {"learned": (1, 2, 2, 3), "compared": (1, 2, 2, 3, 4)}


def conversations(
    split: Split, n: int, seed: int, *, prompts: bool = False
) -> Iterator[dict[str, Any]]:
    """`n` lines of a chat file, each made from its own number, the seed and the split.

    With `prompts`, and in the split "test", each ends with the message that an answer is to be
    compared with (`exact_calls` of `opennemo/train/rewards.py`).
    """
    for i in range(n):
        rng = random.Random(f"{split} {seed} {i}")
        row = _Conversation(split, rng, compared=prompts or split == "test").make()
        check(row)
        yield row


def check(row: Mapping[str, Any]) -> None:
    """Make every call of a conversation, and compare the answers.

    Raises:
        InvalidRequest: a call has wrong arguments, or a result is not the API's.
    """
    tools = {tool["function"]["name"]: tool for tool in row["tools"]}
    answers: dict[str, dict] = {}
    for message in row["messages"]:
        for call in message.get("tool_calls", ()):
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            if name not in tools:
                raise InvalidRequest(f"{name} is not among the tools")
            answers[call["id"]] = execute(tools[name], json.loads(arguments))
        if message["role"] == "tool":
            id = message["tool_call_id"]
            if json.loads(message["content"]) != answers.get(id):
                raise InvalidRequest(f"{id}: not what its call is answered with")


class _Conversation:
    """One conversation in the making."""

    def __init__(self, split: Split, rng: random.Random, *, compared: bool):
        languages = parts()["languages"]
        others = range(1, len(languages))
        self.split: Split = split
        self.use = "compared" if compared else "learned"
        self.rng = rng
        self.language = 0 if rng.random() < ENGLISH else rng.choice(others)
        self.code = languages[self.language]
        self.phrases = parts()["phrases"][self.code]
        self.messages: list[Message] = []
        self.apis: list[Api] = []
        # Half of the time tools are of one domain, and hard to tell apart.
        self.domain = rng.choice([*parts()[split]["domains"]]) if rng.random() < 0.5 else None
        for _ in range(rng.choice(N_TOOLS[self.use])):
            self.apis.append(self._draw_api(self.domain))

    def make(self) -> dict[str, Any]:
        rng = self.rng
        n_turns, kinds = rng.choice(N_TURNS[self.use]), KINDS[self.use]
        kind = ""
        for turn in range(n_turns):
            kind = rng.choices([*kinds], [*kinds.values()])[0]
            getattr(self, f"_{kind}")()
            if self.use == "learned" or turn < n_turns - 1:
                self._conclude()
        if self.use == "compared" and kind == "missing" and rng.random() < 0.5:
            del self.messages[-2:]  # whether it asks back is what is compared
        kind = kind if n_turns == 1 else f"{kind}_after_{n_turns - 1}"
        return {
            "messages": self.messages,
            "tools": [api.tool for api in self.apis],
            "lang": self.code,
            "kind": f"tool_{kind}",
            "source": f"opennemo recipes/tool_data, {self.split}",
            "licence": "CC0-1.0",
        }

    def _single(self) -> None:
        api = self.rng.choice(self.apis)
        arguments = self._draw_arguments(api)
        self._say("user", self._ask(self._wish(api, arguments)))
        self._call((api, arguments))

    def _parallel(self) -> None:
        api = self.rng.choice(self.apis)
        first = self._draw_arguments(api)
        others = [other for other in self.apis if other is not api]
        if others and self.rng.random() < 0.5:
            other = self.rng.choice(others)
            second = self._draw_arguments(other)
            more = self._phrase("also").format(self._wish(other, second))
        else:
            other, second = api, first
            while second == first:
                second = {name: self._draw_value(api, name) for name in first}
            more = self._phrase("again").format(self._details(api, second))
        self._say("user", f"{self._ask(self._wish(api, first))} {more}")
        self._call((api, first), (other, second))

    def _none(self) -> None:
        if self.rng.random() < 0.5:
            question, answer = self.rng.choice(self.phrases["talk"])
        else:
            other = self._draw_api(None)
            question = self._ask(self._wish(other, self._draw_arguments(other)))
            answer = self._phrase("unable")
        self._say("user", question)
        self._say("assistant", answer)

    def _missing(self) -> None:
        api = self.rng.choice(self.apis)
        arguments = self._draw_arguments(api)
        name = self.rng.choice(api.required)
        argument, value = api.argument(name), arguments[name]
        others = {key: value for key, value in arguments.items() if key != name}
        self._say("user", self._ask(self._wish(api, others)))
        self._say("assistant", self._phrase("missing").format(argument.label(self.language)))
        words = argument.spoken(value, self.language, self.rng)
        if self.rng.random() < 0.3:
            words = argument.say(value, self.language, self.rng)
        self._say("user", self._phrase("given").format(words))
        self._call((api, {**others, name: value}))

    def _conclude(self) -> None:
        """Let the APIs answer the calls that were made last, and the assistant tell the user."""
        calls = self.messages[-1].get("tool_calls")
        if not calls:
            return
        answers = []
        tools = {api.name: api.tool for api in self.apis}
        for call in calls:
            function = call["function"]
            result = execute(tools[function["name"]], json.loads(function["arguments"]))
            self.messages.append(
                {"role": "tool", "tool_call_id": call["id"], "content": json.dumps(result)}
            )
            if "results" in result:
                answers.append(
                    self._phrase("found").format(join(result["results"], self.phrases["and"]))
                )
            else:
                answers.append(self._phrase("done").format(result["reference"]))
        self._say("assistant", " ".join(answers))

    def _say(self, role: str, text: str) -> None:
        self.messages.append({"role": role, "content": text})

    def _call(self, *calls: tuple[Api, dict[str, Any]]) -> None:
        self.messages.append(
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {
                        "id": hash_id(f"{len(self.messages)}/{i}/{self.rng.random()}"),
                        "type": "function",
                        "function": {
                            "name": api.name,
                            "arguments": json.dumps(arguments, ensure_ascii=False),
                        },
                    }
                    for i, (api, arguments) in enumerate(calls)
                ],
            }
        )

    def _phrase(self, kind: str) -> str:
        return self.rng.choice(self.phrases[kind])

    def _ask(self, wish: str) -> str:
        request = self._phrase("ask").format(wish)
        return request[0].upper() + request[1:]

    def _wish(self, api: Api, arguments: Mapping[str, Any]) -> str:
        wish, details = self.rng.choice(api.wishes[self.language]), self._details(api, arguments)
        if self.code == "de" and details:  # its verbs come last
            return f"{details} {wish}"
        return f"{wish} {details}".strip()

    def _details(self, api: Api, arguments: Mapping[str, Any]) -> str:
        return " ".join(
            api.argument(name).say(value, self.language, self.rng)
            for name, value in arguments.items()
        )

    def _draw_api(self, domain: str | None) -> Api:
        taken = {api.key for api in self.apis}
        return draw_api(self.rng, self.split, self.language, exclude=taken, domain=domain)

    def _draw_arguments(self, api: Api) -> dict[str, Any]:
        """All that is required, and some of the rest, in the order in which they will be said.

        A call that follows the words is easier to learn than one that follows the schema: the words
        tell what comes next, and what nobody said does not come up.
        """
        wanted = [a for a in api.arguments if a.name in api.required or self.rng.random() < 0.4]
        self.rng.shuffle(wanted)
        return {a.name: self._draw_value(api, a.name) for a in wanted}

    def _draw_value(self, api: Api, name: str) -> Any:
        return draw_value(self.rng, self.split, api.argument(name))
