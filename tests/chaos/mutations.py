"""Strategies that make good files strange: slightly, or beyond recognition."""

import json
import random
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

NUMBERS = [0, 1, 2, 7, 8, 127, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63]
NUMBERS += [2**64 - 1]
WORDS = [
    "null",
    "true",
    "1e999",
    "-1",
    "NaN",
    "9" * 5000,
    '""',
    "[" * 40,
    "{}",
    '"\\ud800"',
    "\x00",
]


class Same(str):
    """A key that may occur twice in an object."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def odd_values() -> st.SearchStrategy[Any]:
    """What stands where something else should."""
    deep: Any = "x"
    for _ in range(200):
        deep = [deep]
    return st.sampled_from(
        [
            None, True, False, 0, 1, -1, 2, 3, 0.5, -0.0, 1e300, float("inf"), float("nan"),
            2**31, 2**53 + 1, 2**63, 2**64, 10**30, -(2**63), "", "x", "\x00", "\ud800", "🦙" * 50,
            "x" * 100_000, "../../etc/passwd", "{{ 7 }}", "(a+)+$", [], [[]], {}, {"": {}}, [None],
            ["x"] * 1000, {"x": 1}, [1, 2], deep,
        ]
    )  # fmt: skip


def trees(good: Any) -> st.SearchStrategy[Any]:
    """The tree of a JSON file with one to three of its parts replaced, lost, doubled or renamed."""

    @st.composite
    def draw_tree(draw: Callable) -> Any:
        tree = json.loads(json.dumps(good))
        for _ in range(draw(st.integers(1, 3))):
            place = tree
            if not isinstance(tree, dict | list) or not tree:
                return draw(odd_values())
            while True:
                keys = [*place] if isinstance(place, dict) else [*range(len(place))]
                key = keys[draw(st.integers(0, len(keys) - 1))]
                inner = place[key]
                if not isinstance(inner, dict | list) or not inner or draw(st.integers(0, 3)) == 0:
                    break
                place = inner
            match draw(st.sampled_from(["replace", "replace", "lose", "double", "rename", "near"])):
                case "replace":
                    place[key] = draw(odd_values())
                case "lose":
                    del place[key]
                case "double" if isinstance(place, dict):
                    place[Same(key)] = draw(odd_values())
                case "double" if isinstance(place, list):
                    place.insert(key, inner)
                case "rename" if isinstance(place, dict):
                    place[draw(st.sampled_from(["", "x", key + " ", *place]))] = place.pop(key)
                case "near" if isinstance(inner, int | float):
                    place[key] = inner + draw(st.sampled_from([-1, 1, 2, 64, 2**20]))
                case _:
                    place[key] = [inner]
        return tree

    return draw_tree()


def json_files(good: bytes) -> st.SearchStrategy[bytes]:
    """A JSON file, strange in its tree or in its text."""
    strange = trees(json.loads(good)).map(json.dumps).map(str.encode)
    return st.one_of(strange, strange, strange, raw_files(good))


def raw_files(good: bytes, head: int | None = None) -> st.SearchStrategy[bytes]:
    """Any file with some bytes changed, lost, put in or moved; most of them before `head`."""
    end = max(1, min(head or len(good), len(good)))

    def change(seed: int) -> bytes:
        rng = random.Random(seed)
        data = bytearray(good)
        for _ in range(rng.choice([1, 1, 1, 2, 5])):
            at = rng.randrange(min(end, len(data)) or 1)
            match rng.randrange(8):
                case 0 if data:
                    data[min(at, len(data) - 1)] = rng.randrange(256)
                case 1 if data:
                    data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
                case 2:
                    width = rng.choice([1, 2, 4, 8])
                    number = rng.choice(NUMBERS) & (1 << 8 * width) - 1
                    data[at : at + width] = number.to_bytes(width, "little")
                case 3:
                    del data[at : at + rng.choice([1, 4, 8, 100])]
                case 4:
                    data[at:at] = rng.randbytes(rng.choice([1, 8, 300]))
                case 5:
                    data[at:at] = data[at : at + rng.randrange(200)]
                case 6:
                    data[at:at] = rng.choice(WORDS).encode()
                case _:
                    del data[rng.randrange(len(data) + 1) :]
        return bytes(data)

    return st.integers(0, 2**48).map(change)


def safetensors_files(good: bytes) -> st.SearchStrategy[bytes]:
    """A safetensors file whose header says other things than its bytes."""
    n = int.from_bytes(good[:8], "little")
    header, rest = json.loads(good[8 : 8 + n]), good[8 + n :]

    def join(tree: Any) -> bytes:
        text = json.dumps(tree).encode()
        return len(text).to_bytes(8, "little") + text + rest

    def overlap(pair: tuple[int, int]) -> bytes:
        names = [name for name in header if name != "__metadata__"]
        a, b = (names[i % len(names)] for i in pair)
        return join(header | {a: header[b]})

    pairs = st.tuples(st.integers(0, 999), st.integers(0, 999)).map(overlap)
    return st.one_of(trees(header).map(join), trees(header).map(join), pairs, raw_files(good, n))


def line_files(good: bytes) -> st.SearchStrategy[bytes]:
    """JSON lines, some of them strange."""
    lines = [line for line in good.split(b"\n") if line]
    strange = st.sampled_from(lines).flatmap(json_files)
    mixed = st.lists(st.one_of(st.sampled_from(lines), strange, strange), min_size=1, max_size=4)
    return mixed.map(b"\n".join)


def toml_files(good: bytes) -> st.SearchStrategy[bytes]:
    """A TOML file with values that are other things, or with strange text."""
    lines = good.decode().splitlines()
    values = [
        "-1",
        "0",
        "1e308",
        "inf",
        "nan",
        '""',
        "'x'",
        "[]",
        "{}",
        "true",
        "2020-01-01",
        "[[1]]",
    ]
    values += [
        "9" * 30,
        '"\\u0000"',
        "0x7fffffffffffffff",
        "[" * 3000,
        "{a={a={a=1}}}",
        "''' \n'''",
    ]

    def change(at: int, value: str) -> bytes:
        found = list(lines)
        at %= len(found)
        found[at] = f"{found[at].partition('=')[0].strip() or 'x'} = {value}"
        return "\n".join(found).encode()

    changed = st.builds(change, st.integers(0, 999), st.sampled_from(values))
    return st.one_of(changed, changed, raw_files(good))
