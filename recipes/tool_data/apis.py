"""Synthetic APIs: thousands of small functions, put together from verbs, nouns and arguments.

Each part (parts.toml) knows how a schema says it and how a person does, in four languages. So a
request and the call that answers it come from the same parts, with values in the person's own
words. An API can be called: it validates arguments with its own JSON schema, and its answer follows
from the call alone. conversations.py makes the conversations.
"""

import hashlib
import json
import random
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

from opennemo.errors import InvalidRequest
from opennemo.tokenizer.messages import Tool

Split = Literal["train", "test"]
# Kinds of values that are not strings.
TYPES = {"integer": "integer", "number": "number", "boolean": "boolean"}
LISTS = ("emails", "words", "dishes", "files", "symptoms", "plants", "reagents")
SYLLABLES = ("ba", "vel", "mo", "ra", "tin", "sor", "ke", "lu", "dan", "phi", "gor", "en", "wis")
MONTHS = ("January", "March", "April", "May", "June", "August", "October", "November")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@cache
def parts() -> dict[str, Any]:
    """The tables of parts.toml."""
    return tomllib.loads(Path(__file__).with_name("parts.toml").read_text("utf-8"))


@dataclass(frozen=True)
class Argument:
    """One parameter of an API, as its schema says it and as people do."""

    name: str
    spec: Mapping[str, Any]  # an entry of parts.toml

    @property
    def kind(self) -> str:
        return self.spec["kind"]

    def speaks(self, language: int) -> bool:
        """Whether there are words for it in a language."""
        texts = [self.spec[key] for key in ("say", "label", "otherwise") if key in self.spec]
        return all(text.count("|") >= language for text in texts)

    def label(self, language: int) -> str:
        """What it is called in a sentence."""
        return self.spec["label"].split("|")[language]

    def say(self, value: Any, language: int, rng: random.Random) -> str:
        """What a person says who wants this value."""
        key = "otherwise" if value is False else "say"
        way = rng.choice(self.spec[key].split("|")[language].split("/"))
        return way if self.kind == "boolean" else way.format(self.spoken(value, language, rng))

    def spoken(self, value: Any, language: int, rng: random.Random) -> str:
        """The value as it stands in a sentence."""
        if isinstance(value, list):
            return join(value, parts()["phrases"][parts()["languages"][language]]["and"])
        if self.kind in ("title", "sentence") and rng.random() < 0.5:
            return f'"{value}"'
        is_small = self.kind == "integer" and value < len(NUMBERS) and language == 0
        return NUMBERS[value] if is_small and rng.random() < 0.2 else str(value)

    @property
    def schema(self) -> dict[str, Any]:
        if self.kind in LISTS:
            return {"type": "array", "items": {"type": "string"}}
        choices = {"enum": self.spec["values"]} if self.kind == "choice" else {}
        return {"type": TYPES.get(self.kind, "string"), **choices}


@dataclass(frozen=True)
class Api:
    """A function that can be called, and how people ask for it."""

    name: str
    key: tuple[str, str]  # verb and noun
    wishes: tuple[tuple[str, ...], ...]  # by language, ways to ask for it without its arguments
    arguments: tuple[Argument, ...]
    required: tuple[str, ...]
    described: bool  # whether its arguments have descriptions

    def argument(self, name: str) -> Argument:
        return next(a for a in self.arguments if a.name == name)

    @cached_property
    def tool(self) -> Tool:
        """OpenAI's definition."""
        properties = {
            a.name: a.schema | ({"description": a.label(0)} if self.described else {})
            for a in self.arguments
        }
        wish = self.wishes[0][0]
        function = {
            "name": self.name,
            "description": f"{wish[0].upper()}{wish[1:]}.",
            "parameters": {
                "type": "object",
                "properties": properties,
                "required": list(self.required),
            },
        }
        return {"type": "function", "function": function}


def draw_api(
    rng: random.Random,
    split: Split,
    language: int,
    *,
    exclude: set[tuple[str, str]],
    domain: str | None = None,
) -> Api:
    """A new API of this domain, or of any, whose verb and noun together are not excluded."""
    tables = parts()[split]
    while True:
        place = domain or rng.choice([*tables["domains"]])
        of = tables["domains"][place]
        verb, noun = rng.choice(of["verbs"]), rng.choice([*of["nouns"]])
        if (verb, noun) not in exclude:
            break
    pool = [Argument(name, tables["arguments"][name]) for name in of["arguments"]]
    pool = [a for a in pool if a.speaks(language)]
    chosen = rng.sample(pool, min(len(pool), rng.choice((1, 2, 3, 3, 4, 4, 5))))
    if all(a.kind == "boolean" for a in chosen):
        chosen.append(rng.choice([a for a in pool if a.kind != "boolean"]))
    firm = [a.name for a in chosen if a.kind != "boolean"]
    return Api(
        name=_function_name(rng, verb.replace(" ", "_"), noun, place),
        key=(verb, noun),
        wishes=_wishes(tables["verbs"][verb], of["nouns"][noun]),
        arguments=tuple(chosen),
        required=tuple(rng.sample(firm, rng.randint(1, -(-len(firm) // 2)))),
        described=rng.random() < 0.5,
    )


def draw_value(rng: random.Random, split: Split, argument: Argument) -> Any:
    """A value such as a person would give."""
    spec, values = argument.spec, parts()[split]["values"]
    match argument.kind:
        case "boolean":
            return rng.random() < 0.6
        case "choice":
            return rng.choice(spec["values"])
        case "integer":
            return rng.randint(spec["least"], spec["most"])
        case "number":
            number = round(rng.uniform(spec["least"], spec["most"]), rng.choice((0, 1, 1, 2)))
            return int(number) if number == int(number) else number
        case "place":
            return rng.choice(values["places"]) if rng.random() < 0.6 else invented(rng)
        case "person":
            return f"{rng.choice(values['first'])} {rng.choice((*values['last'], invented(rng)))}"
        case "brand":
            return invented(rng)
        case "title":
            thing = rng.choice((*values["things"], invented(rng)))
            return f"{rng.choice(values['qualities'])} {thing}"
        case "sentence":
            return rng.choice(values["sentences"])
        case "email":
            return _email(rng, values)
        case "emails":
            return [_email(rng, values) for _ in range(rng.randint(1, 3))]
        case "phone":
            return f"{rng.randint(100, 999)}-{rng.randint(1000, 9999)}"
        case "code":
            return code(rng)
        case "address":
            return f"{rng.randint(1, 99)} {rng.choice(values['streets'])}"
        case "date":
            month, day = rng.randint(1, 12), rng.randint(1, 28)
            ways = (f"2025-{month:02}-{day:02}", f"{day}/{month}", f"{rng.choice(MONTHS)} {day}")
            return rng.choice(ways)
        case "time":
            hour, minutes = rng.randint(7, 23), rng.choice(("00", "15", "30", "45"))
            return rng.choice((f"{hour}:{minutes}", f"{hour % 12 + 1} pm", f"{hour % 12 + 1} am"))
    return rng.sample(values[argument.kind], rng.randint(1, 3))


def execute(tool: Tool, arguments: Any) -> dict[str, Any]:
    """Call a synthetic API: it answers a query with results, anything else with success.

    Raises:
        InvalidRequest: the arguments do not satisfy its schema.
    """
    import jsonschema

    function = tool["function"]
    schema = function["parameters"] | {"additionalProperties": False}
    for error in jsonschema.Draft202012Validator(schema).iter_errors(arguments):
        raise InvalidRequest(f"{function['name']}: {error.message}")
    called = json.dumps([function["name"], arguments], sort_keys=True)
    rng = random.Random(hashlib.sha256(called.encode()).digest())
    description = function["description"].lower()
    if any(description.startswith(f"{verb} ") for verb in parts()["queries"]):
        return {"results": [invented(rng) for _ in range(rng.randint(1, 3))]}
    return {"status": "ok", "reference": code(rng)}


def join(words: Sequence[str], last: str) -> str:
    """a, b and c."""
    *others, end = words
    return f"{', '.join(others)} {last} {end}" if others else end


def invented(rng: random.Random) -> str:
    """A name that nobody has seen before."""
    return "".join(rng.choices(SYLLABLES, k=rng.choice((2, 2, 3)))).capitalize()


def code(rng: random.Random) -> str:
    """Such as B1226 or XXP-4406."""
    letters = "".join(rng.choices("ABCDEFGHKLMNPRSTUVWXYZ", k=rng.choice((1, 2, 3))))
    return f"{letters}{rng.choice(('-', ''))}{rng.randint(10, 9999)}"


def _email(rng: random.Random, values: Mapping[str, list]) -> str:
    domain = f"{invented(rng).lower()}.{rng.choice(('com', 'org', 'net'))}"
    return f"{rng.choice(values['first']).lower()}@{domain}"


def _function_name(rng: random.Random, verb: str, noun: str, domain: str) -> str:
    first, *more = verb.split("_")
    camel = first + "".join(word.capitalize() for word in (*more, noun))
    names = (f"{verb}_{noun}", f"{verb}_{noun}", camel, f"{noun}_{verb}", f"{domain}_{verb}_{noun}")
    return rng.choice(names)


def _wishes(verb: str, noun: str) -> tuple[tuple[str, ...], ...]:
    """Ways to say both, by language; in German the verb comes last."""
    pairs = zip(parts()["languages"], verb.split("|"), noun.split("|"), strict=True)
    return tuple(
        tuple(f"{thing} {way}" if code == "de" else f"{way} {thing}" for way in do.split("/"))
        for code, do, thing in pairs
    )
