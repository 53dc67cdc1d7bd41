"""The engine over a tiny random model: however work is cut and shared, answers stay the same."""

import os
from collections import defaultdict
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from opennemo.engine import EngineConfig, LocalEngine, SamplingParams, Token
from opennemo.errors import ContextTooLong, Overloaded
from opennemo.model.formats import FORMATS
from opennemo.model.positions import QueryScaling, RopeScaling
from opennemo.model.quantization import quantize_
from opennemo.model.transformer import Transformer
from tests.engine.stepping import answers, greedy, prompts, run

EOS = 7
BIAS = {id: 5.0 * (-1) ** id for id in range(300)}
SAMPLED = SamplingParams(temperature=1.0, top_p=0.9, top_k=40, seed=11, max_tokens=20)


def test_greedy_equals_the_definition(model):
    engine = LocalEngine(deepcopy(model), eos_ids=[])
    params = SamplingParams(max_tokens=12)
    for prompt in prompts(6):
        assert answers(engine, [prompt], params) == [greedy(model, prompt, 12)]


@pytest.mark.parametrize(
    "config",
    [
        EngineConfig(),
        EngineConfig(prefix_caching=False),
        EngineConfig(max_batched_tokens=5),
        EngineConfig(page_size=4, n_pages=24),  # room for about two: the others are preempted
        EngineConfig(max_sequences=3),
        EngineConfig(n_draft_tokens=4),
        EngineConfig(n_draft_tokens=4, max_batched_tokens=7, page_size=4, n_pages=24),
    ],
    ids=lambda c: ",".join(f"{k}={v}" for k, v in vars(c).items() if v != vars(EngineConfig())[k]),
)
@pytest.mark.parametrize(
    "params",
    [SamplingParams(max_tokens=20), SamplingParams(max_tokens=20, logit_bias=BIAS), SAMPLED],
    ids=["greedy", "biased", "seed"],
)
def test_answers_do_not_depend_on_how_work_is_shared(model, config, params):
    texts = prompts(12, shared=20)
    alone = [answers(LocalEngine(deepcopy(model), [EOS]), [text], params)[0] for text in texts]
    engine = LocalEngine(deepcopy(model), [EOS], config)
    assert answers(engine, texts, params) == alone
    assert answers(engine, texts, params) == alone  # now with whatever the cache has learnt
    if config.n_pages:
        assert engine.scheduler.n_preemptions > 0


@pytest.mark.parametrize("kv", ["fp32", "bf16", "fp8", "int8"])
@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_fifty_greedy_answers_are_the_same_in_any_company(model, weights, kv):
    if weights != "fp32":
        quantize_(model, FORMATS[weights], head=FORMATS[weights])
    texts, params = prompts(50, shared=20), SamplingParams(max_tokens=12)

    def engine(**config) -> LocalEngine:
        formats = EngineConfig(kv_format=kv, kv_scale=2**-7 if kv == "fp8" else None, **config)
        return LocalEngine(deepcopy(model), [EOS], formats)

    one = engine(prefix_caching=False)
    alone = [answers(one, [text], params)[0] for text in texts]
    for config in (
        {"max_sequences": 32, "max_batched_tokens": 4096},
        {"max_batched_tokens": 40, "prefix_caching": False},  # prompts in chunks
        {"page_size": 4, "n_pages": 60},  # many are preempted
    ):
        crowd = engine(**config)
        assert answers(crowd, texts, params) == alone, config
        if "n_pages" in config:
            assert crowd.scheduler.n_preemptions > 0


def test_windows_by_layer_and_scaled_positions_equal_the_definition(model):
    config = replace(
        model.config, n_layers=4, sliding_window=(None, 20, 20, 20),
        rope_scaling=RopeScaling(kind="yarn", factor=16.0, original=16, high=32.0),
        query_scaling=QueryScaling(beta=0.5, original=16),
    )  # fmt: skip
    torch.manual_seed(0)
    net = Transformer(config).requires_grad_(False)
    for parameter in net.parameters():
        parameter.mul_(4) if parameter.dim() == 2 else None
    params, texts = SamplingParams(max_tokens=12), prompts(6, shared=40)
    expected = [greedy(net, text, 12) for text in texts]
    for settings in (EngineConfig(), EngineConfig(max_batched_tokens=16)):
        assert answers(LocalEngine(deepcopy(net), [], settings), texts, params) == expected


def test_prefix_cache_saves_work_and_says_so(model):
    engine = LocalEngine(deepcopy(model), [EOS])
    prompt = prompts(1, shared=40)[0]
    params = SamplingParams(max_tokens=2)
    cold = run(engine, [(prompt, params)])[0]
    warm = run(engine, [(prompt, params)])[0]
    other_tenant = run(engine, [(prompt, params)], salt=b"b")[0]
    assert cold[-1].n_cached_tokens == other_tenant[-1].n_cached_tokens == 0
    assert warm[-1].n_cached_tokens == (len(prompt) - 1) // 16 * 16


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_n_answers_share_the_prompt_and_differ(model, prefix_caching):
    engine = LocalEngine(
        deepcopy(model), [], EngineConfig(prefix_caching=prefix_caching, page_size=4)
    )
    prompt = prompts(1, shared=41)[0]
    events = run(engine, [(prompt, SAMPLED)], n=5)[0]
    texts = [tuple(e.id for e in events if e.index == i) for i in range(5)]
    assert len(set(texts)) == 5 and all(len(t) == 20 for t in texts)
    assert all(e.n_cached_tokens == (len(prompt) - 1) // 4 * 4 for e in events if e.index > 0)
    alone = run(LocalEngine(deepcopy(model), []), [(prompt, SAMPLED)])[0]
    assert texts[0] == tuple(e.id for e in alone)


def test_the_border_of_the_context(model):
    engine = LocalEngine(deepcopy(model), [], EngineConfig(max_context=64))
    for room, prompt in ((1, [1] * 63), (2, [1] * 62)):
        events = run(engine, [(prompt, SamplingParams())])[0]
        assert [e.finish_reason for e in events] == [None] * (room - 1) + ["length"]
    for n in (64, 65):
        with pytest.raises(ContextTooLong, match=rf"{n + 1}.* 64"):
            engine.submit([1] * n, SamplingParams(), print)
    whole = answers(engine, [[3] * 60], SamplingParams(max_tokens=1000))[0]
    assert len(whole) == 4


def test_a_full_queue_refuses_and_recovers(model):
    engine = LocalEngine(deepcopy(model), [], EngineConfig(max_queued=3))
    params, heard = SamplingParams(max_tokens=1), []
    for _ in range(3):
        engine.submit([1, 2], params, heard.append)
    with pytest.raises(Overloaded):
        engine.submit([1, 2], params, heard.append)
    while engine.step():
        pass
    engine.submit([1, 2], params, heard.append)
    while engine.step():
        pass
    assert [e.finish_reason for e in heard] == ["length"] * 4


def test_a_number_that_is_not_finite_fails_its_own_request_only(model):
    bad = Transformer(model.config)
    bad.load_state_dict(model.state_dict())
    bad.requires_grad_(False)
    bad.tok_embeddings.weight[300] = torch.nan
    engine = LocalEngine(deepcopy(bad), [])
    params = SamplingParams(max_tokens=5)
    first, broken, last = run(engine, [([1, 2], params), ([1, 300], params), ([3], params)])
    assert broken[-1].finish_reason == "error" and "not finite" in broken[-1].error
    assert [e.id for e in first] == greedy(model, [1, 2], 5)
    assert [e.id for e in last] == greedy(model, [3], 5)


def test_a_reset_and_one_of_several_answers_cancelled(model):
    engine = LocalEngine(deepcopy(model), [], EngineConfig(page_size=4))
    heard: dict[int, list[Token]] = defaultdict(list)
    params = SamplingParams(temperature=1, max_tokens=10, seed=3)
    id = engine.submit([1] * 20, params, lambda e: heard[e.index].append(e), n=3)
    engine.step()
    engine.cancel(id, 1)
    engine.cancel(id, 7)  # never was
    while engine.step():
        pass
    assert [heard[i][-1].finish_reason for i in range(3)] == ["length", "cancelled", "length"]
    assert len(heard[1]) < 10 == len(heard[0]) == len(heard[2])
    again = run(engine, [([1] * 20, params)])[0]
    engine.call(engine.cache.reset)
    assert again[-1].n_cached_tokens > 0
    assert run(engine, [([1] * 20, params)])[0][-1].n_cached_tokens == 0


@pytest.mark.slow
def test_memory_is_flat_over_ten_thousand_requests(model):
    """And of ten thousand at once, those that find no room are refused, the others answered."""
    engine = LocalEngine(model, [EOS], EngineConfig(max_queued=500))
    sizes, refused, ended = [], 0, []

    def listen(event: Token) -> None:
        if event.finish_reason:
            ended.append(event.finish_reason)

    for wave in range(20):
        for i, prompt in enumerate(prompts(500)):
            params = SamplingParams(max_tokens=4, temperature=wave % 2, seed=i)
            engine.submit([wave, *prompt], params, listen)
        while engine.step():
            pass
        sizes.append(resident_memory())
    assert len(ended) == 10_000 and set(ended) <= {"stop", "length"}
    assert max(sizes[10:]) - sizes[5] < 4e6, sizes
    for i in range(10_000):
        try:
            engine.submit([i % 320, 1, 2], SamplingParams(max_tokens=2), listen)
        except Overloaded:
            refused += 1
    while engine.step():
        pass
    assert refused == 9_500 and len(ended) == 10_500
    assert engine.cache.n_used == 0
    assert resident_memory() - sizes[5] < 4e6


def resident_memory() -> int:
    """Bytes that this process has in memory now."""
    pages = int(Path("/proc/self/statm").read_text("utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
