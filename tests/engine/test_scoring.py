"""Scoring continuations: what is shared is computed once, and nothing changes by it."""

import random
import threading
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opennemo.engine import EngineConfig, LocalEngine, SamplingParams
from opennemo.engine.scoring import Pair
from opennemo.errors import ContextTooLong, InvalidRequest, OpenNemoError
from opennemo.model.attention import Packed
from opennemo.model.transformer import PRESETS, Transformer


@torch.inference_mode()
def defined(model: Transformer, pair: Pair) -> tuple[float, bool]:
    """The definition: the whole text in one pass, no cache."""
    context, continuation = pair
    tokens = context + continuation
    hidden = model(torch.tensor(tokens), Packed.of(len(tokens)))
    logprobs = model.output(hidden[len(context) - 1 : -1]).log_softmax(-1)
    targets = torch.tensor(continuation)
    own = logprobs.gather(1, targets[:, None]).sum().item()
    return own, bool((logprobs.argmax(-1) == targets).all())


def questions(seed: int, n: int) -> list[Pair]:
    """Contexts that share beginnings, each with some continuations that do, too."""
    rng = random.Random(seed)
    ids = lambda n: [rng.randrange(3) for _ in range(n)]  # noqa: E731
    examples, pairs = [ids(rng.randint(1, 40)) for _ in range(2)], []
    for _ in range(n):
        context = rng.choice(examples)[: rng.randint(1, 40)] + ids(rng.randint(0, 12))
        pairs += [(context, ids(rng.randint(1, 9))) for _ in range(rng.randint(1, 4))]
    rng.shuffle(pairs)
    return pairs


@pytest.mark.parametrize(
    "config",
    [
        EngineConfig(),
        EngineConfig(page_size=1),
        EngineConfig(page_size=4, n_pages=28),  # what is kept for others must be forgotten
        EngineConfig(max_batched_tokens=5),
        EngineConfig(kv_format="int8"),
    ],
    ids=lambda c: ",".join(f"{k}={v}" for k, v in vars(c).items() if v != vars(EngineConfig())[k]),
)
def test_scores_equal_the_definition(model, config):
    engine = LocalEngine(deepcopy(model), [], config)
    pairs = questions(3, 30)
    for score, pair in zip(engine.score(pairs), pairs, strict=True):
        logprob, greedy = defined(model, pair)
        if config.kv_format:  # rounded keys and values move them a little
            assert score.logprob == pytest.approx(logprob, abs=0.5)
        else:
            assert score.logprob == pytest.approx(logprob, abs=1e-3) and score.greedy == greedy
    assert engine.cache.n_used == 0


MODEL = Transformer(PRESETS["tiny"]).eval().requires_grad_(False)
ENGINE = LocalEngine(
    deepcopy(MODEL), [], EngineConfig(page_size=4, n_pages=40, max_batched_tokens=16)
)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_any_tree_of_requests_is_scored_and_leaves_no_page_behind(seed, n):
    pairs = questions(seed, n)
    for score, pair in zip(ENGINE.score(pairs), pairs, strict=True):
        assert score.logprob == pytest.approx(defined(MODEL, pair)[0], abs=1e-3)
    assert ENGINE.cache.n_used == 0


def test_each_different_prefix_is_computed_once(model):
    engine, pairs = LocalEngine(model, []), questions(5, 40)
    computed = []
    run = engine.runner.run
    engine.runner.run = lambda chunks: (
        computed.extend(len(c.tokens) for c in chunks),
        run(chunks),
    )[1]
    engine.score(pairs)
    inputs = [context + continuation[:-1] for context, continuation in pairs]
    prefixes = {tuple(tokens[:n]) for tokens in inputs for n in range(1, len(tokens) + 1)}
    assert sum(computed) == len(prefixes) < sum(map(len, inputs)) / 3


def test_choices_of_one_token_take_one_row(model):
    engine, rows = LocalEngine(model, []), []
    run = engine.runner.run
    engine.runner.run = lambda chunks: (rows.extend(c.n_rows for c in chunks), run(chunks))[1]
    scores = engine.score([([5, 6, 7], [token]) for token in (1, 2, 3)])
    assert rows == [1] and len({score.logprob for score in scores}) == 3


def test_scoring_and_answering_go_on_side_by_side(model):
    engine, pairs = (
        LocalEngine(deepcopy(model), [], EngineConfig(max_batched_tokens=16)),
        questions(7, 20),
    )
    tokens, ended, heard = [], threading.Event(), []

    def listen(event):
        tokens.append(event.id)
        if event.finish_reason:
            ended.set()

    engine.start()
    engine.submit([1, 2, 3], SamplingParams(max_tokens=30), listen)
    scores = engine.score(pairs, lambda i, score: heard.append(i))
    assert ended.wait(30)
    engine.stop()
    assert sorted(heard) == list(range(len(pairs)))
    assert scores[0].logprob == pytest.approx(defined(model, pairs[0])[0], abs=1e-3)
    alone, engine = [], LocalEngine(deepcopy(model), [])
    engine.submit([1, 2, 3], SamplingParams(max_tokens=30), lambda e: alone.append(e.id))
    while engine.step():
        pass
    assert tokens == alone


def test_an_engine_that_stops_ends_a_score_with_an_error(model):
    engine, context = LocalEngine(model, []), list(range(200))
    engine.start()
    done = []

    def score() -> None:
        with pytest.raises(OpenNemoError, match=r"cancelled|stopped"):
            engine.score([(context[i:], [i]) for i in range(150)], lambda i, score: done.append(i))

    thread = threading.Thread(target=score)
    thread.start()
    while not done:
        pass
    engine.stop()
    thread.join(30)
    assert not thread.is_alive() and len(done) < 150 and engine.cache.n_used == 0


def test_a_wrong_request_says_so_and_a_failure_gives_pages_back(model):
    engine = LocalEngine(model, [], EngineConfig(max_context=20))
    for pair in (([], [1]), ([1], []), ([1], [320]), ([-1], [2])):
        with pytest.raises(InvalidRequest):
            engine.score([pair])
    with pytest.raises(ContextTooLong, match=r"21 tokens of context.*20"):
        engine.score([([1] * 20, [2, 3])])
    assert engine.score([([1] * 20, [2])])
    broken = deepcopy(MODEL)
    broken.norm.weight.fill_(float("nan"))
    broken = LocalEngine(broken, [])
    with pytest.raises(OpenNemoError, match="not finite"):
        broken.score(questions(1, 5))
    assert broken.cache.n_used == 0
