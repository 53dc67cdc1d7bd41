"""Engines stepped by hand, and what their answers must be."""

import random
from collections import defaultdict

import torch

from opennemo.engine import LocalEngine, SamplingParams, Token
from opennemo.model.attention import Packed
from opennemo.model.transformer import Transformer


def prompts(n: int, shared: int = 0) -> list[list[int]]:
    rng = random.Random(1)
    start = [rng.randrange(320) for _ in range(shared)]
    return [start + [rng.randrange(320) for _ in range(rng.randint(1, 30))] for _ in range(n)]


def run(engine: LocalEngine, requests: list[tuple[list[int], SamplingParams]], **kwargs) -> list:
    """All tokens of each request, with the engine stepped by hand."""
    heard: dict[int, list[Token]] = defaultdict(list)
    ids = [
        engine.submit(prompt, params, lambda e: heard[e.request_id].append(e), **kwargs)
        for prompt, params in requests
    ]
    while engine.step():
        pass
    assert engine.cache.n_used == 0
    return [heard[id] for id in ids]


def answers(engine: LocalEngine, texts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    events = run(engine, [(text, params) for text in texts])
    return [[e.id for e in heard if e.id is not None] for heard in events]


@torch.inference_mode()
def greedy(model: Transformer, prompt: list[int], n: int) -> list[int]:
    """The definition: the whole text again for every token, no cache."""
    tokens = list(prompt)
    for _ in range(n):
        packed = Packed.of(len(tokens), window=model.config.sliding_window)
        hidden = model(torch.tensor(tokens), packed)
        tokens.append(int(model.output(hidden[-1]).argmax()))
    return tokens[len(prompt) :]
