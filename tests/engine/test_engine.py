"""The engine over a tiny random model: however work is cut and shared, answers stay the same."""

import os
import random
import threading
from collections import defaultdict
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from queue import Queue

import pytest
import torch

from opennemo.engine import EngineConfig, LocalEngine, SamplingParams, Token
from opennemo.errors import ContextTooLong, InvalidRequest, Overloaded
from opennemo.model.attention import Packed
from opennemo.model.formats import FORMATS
from opennemo.model.quantization import quantize_
from opennemo.model.transformer import Transformer

EOS, NAN = 7, float("nan")
BIAS = {id: 5.0 * (-1) ** id for id in range(300)}
SAMPLED = SamplingParams(temperature=1.0, top_p=0.9, top_k=40, seed=11, max_tokens=20)


def prompts(n: int, shared: int = 0) -> list[list[int]]:
    rng = random.Random(1)
    start = [rng.randrange(320) for _ in range(shared)]
    return [start + [rng.randrange(320) for _ in range(rng.randint(1, 30))] for _ in range(n)]


def run(engine: LocalEngine, requests: list[tuple[list[int], SamplingParams]], **kwargs) -> list:
    """Everything each request heard, with the engine stepped by hand."""
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
    """The definition: the whole text anew for every token, no cache."""
    tokens = list(prompt)
    for _ in range(n):
        hidden = model(torch.tensor(tokens), Packed.of(len(tokens)))
        tokens.append(int(model.output(hidden[-1]).argmax()))
    return tokens[len(prompt) :]


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
        formats = EngineConfig(kv_format=kv, kv_scale=2**-7, **config)
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


def test_a_cache_in_fp8_asks_for_scales(model):
    with pytest.raises(InvalidRequest, match="needs the scales of keys and values"):
        LocalEngine(model, [], EngineConfig(kv_format="fp8"))
    with pytest.raises(InvalidRequest, match="'int5'; allowed: fp32"):
        LocalEngine(model, [], EngineConfig(kv_format="int5"))
    own = LocalEngine(deepcopy(model), [], kv_scale=torch.full((2, 2), 2.0**-7))
    given = LocalEngine(deepcopy(model), [], EngineConfig(kv_format="fp8", kv_scale=2**-7))
    params, texts = SamplingParams(max_tokens=12), prompts(6)
    assert own.runner.pages.format == "fp8"
    assert answers(own, texts, params) == answers(given, texts, params)


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


def test_sampling_follows_the_softmax(model):
    """4,000 first tokens against the model's own distribution: chi-square over likely tokens."""
    prompt = [5, 17, 200]
    with torch.inference_mode():
        logits = model.output(model(torch.tensor(prompt), Packed.of(3))[-1])
    probs = (logits / 2).softmax(-1)
    engine = LocalEngine(deepcopy(model), [], EngineConfig(max_queued=5000))
    counts = torch.zeros(320)
    requests = [
        (prompt, SamplingParams(temperature=2.0, max_tokens=1, seed=i)) for i in range(4000)
    ]
    for events in run(engine, requests):
        counts[events[0].id] += 1
    likely = probs > 0.004
    chi2 = ((counts - 4000 * probs) ** 2 / (4000 * probs))[likely].sum()
    n = int(likely.sum())
    assert n > 20 and chi2 < n + 4 * (2 * n) ** 0.5


def test_logprobs_and_prompt_logprobs_are_the_models(model):
    prompt = prompts(1)[0][:9]
    params = SamplingParams(max_tokens=3, logprobs=4, prompt_logprobs=2, temperature=0.7, seed=1)
    for config in (EngineConfig(), EngineConfig(max_batched_tokens=4)):
        engine = LocalEngine(deepcopy(model), [], config)
        for _ in range(2):  # the second time, the prefix cache could be tempted
            events = run(engine, [(prompt, params)])[0]
            tokens = prompt + [e.id for e in events]
            with torch.inference_mode():
                hidden = model(torch.tensor(tokens), Packed.of(len(tokens)))
                expected = model.output(hidden).log_softmax(-1)
            reported = [*events[0].prompt_logprobs, *[e.logprobs for e in events]]
            assert reported[0] is None and len(reported) == len(tokens)
            for i, item in enumerate(reported[1:], start=1):
                row = expected[i - 1]
                assert item.logprob == pytest.approx(row[tokens[i]].item(), abs=1e-4)
                assert item.rank == int((row > row[tokens[i]]).sum()) + 1
                assert [id for id, _ in item.top] == row.topk(len(item.top)).indices.tolist()


def test_penalties_biases_and_stops(model):
    engine = LocalEngine(deepcopy(model), [EOS])
    prompt = prompts(1)[0]

    def answer(**params) -> list[int]:
        return answers(engine, [prompt], SamplingParams(max_tokens=15, **params))[0]

    assert answer(logit_bias={33: 100.0}) == [33] * 15
    assert answer(logit_bias={33: 100.0}, stop_ids=frozenset({33})) == [33]
    fixed = answer(logit_bias={33: 100.0}, stop_ids=frozenset({33}), min_tokens=4)
    assert len(fixed) >= 5 and 33 not in fixed[:4] and fixed[4] == 33
    assert answer(logit_bias={EOS: 100.0}) == [EOS]
    assert answer(logit_bias={EOS: 100.0}, ignore_eos=True) == [EOS] * 15
    assert len(set(answer(presence_penalty=100.0))) == 15
    assert len(set(answer(repetition_penalty=100.0)) & set(prompt)) == 0
    seldom = answer(logit_bias={33: 30.0, 34: 29.0}, frequency_penalty=0.8)
    assert {33, 34} <= set(seldom)
    assert answer(temperature=1.5, top_k=1) == answer() == answer(temperature=5.0, top_p=1e-6)
    assert answer(temperature=5.0, min_p=1.0) == answer()


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


def test_bad_requests_are_refused_with_a_reason(model):
    engine = LocalEngine(deepcopy(model), [])
    for prompt, message in (([], "empty"), ([320], "vocabulary"), ([-1], "vocabulary")):
        with pytest.raises(InvalidRequest, match=message):
            engine.submit(prompt, SamplingParams(), print)
    with pytest.raises(InvalidRequest, match="stop_ids"):
        engine.submit([1], SamplingParams(stop_ids=frozenset({320})), print)
    with pytest.raises(InvalidRequest, match="logit_bias"):
        engine.submit([1], SamplingParams(logit_bias={320: 1.0}), print)
    for name, value in (("temperature", -1), ("top_p", 0), ("max_tokens", 0), ("min_p", NAN)):
        with pytest.raises(InvalidRequest, match=name):
            replace(SamplingParams(), **{name: value})


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


def test_threads_submit_and_cancel_at_any_time(model):
    engine = LocalEngine(
        deepcopy(model), [], EngineConfig(page_size=4, n_pages=40, max_queued=10_000)
    )
    engine.start()
    ends: dict[int, list[Token]] = defaultdict(list)
    done = threading.Semaphore(0)

    def listen(event: Token) -> None:
        if event.finish_reason:
            ends[event.request_id].append(event)
            done.release()

    def client(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(25):
            prompt = [rng.randrange(320) for _ in range(rng.randint(1, 40))]
            id = engine.submit(prompt, SamplingParams(max_tokens=rng.randint(1, 30)), listen)
            if rng.random() < 0.5:
                engine.cancel(id)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _ in range(100):
        assert done.acquire(timeout=60)
    engine.stop()
    assert len(ends) == 100 and all(len(events) == 1 for events in ends.values())
    assert engine.cache.n_used == 0


def test_stopping_cancels_what_is_left(model):
    engine = LocalEngine(deepcopy(model), [])
    heard: list[Token] = []
    engine.start()
    engine.submit([1], SamplingParams(max_tokens=250), heard.append)
    engine.stop()
    assert heard[-1].finish_reason == "cancelled"


def test_a_defect_in_a_step_leaves_nobody_waiting(model, monkeypatch):
    engine = LocalEngine(deepcopy(model), [])
    heard: Queue[Token] = Queue()
    run, failures = engine.runner.run, iter([KeyError("a defect")])

    def sometimes(chunks):
        for failure in failures:
            raise failure
        return run(chunks)

    monkeypatch.setattr(engine.runner, "run", sometimes)
    engine.start()
    engine.submit([1], SamplingParams(max_tokens=1), heard.put)
    assert "engine failed" in str(heard.get(timeout=60).error)
    engine.submit([1], SamplingParams(max_tokens=1), heard.put)
    assert heard.get(timeout=60).finish_reason == "length"
    engine.stop()
    assert engine.cache.n_used == 0


def test_a_context_that_does_not_fit_into_memory_is_shortened(model, monkeypatch):
    page = 2 * 2 * 16 * 2 * 16 * 4  # bytes: k and v, layers, tokens, heads, channels, float32
    weights = sum(p.nbytes for p in model.parameters())
    memory = {"cpu": int((weights + 5.5 * page) / 0.9)}
    monkeypatch.setattr("opennemo.engine.sizes.machine_memory", lambda: memory)
    engine = LocalEngine(deepcopy(model), [])
    assert (engine.cache.n_pages, engine.max_context) == (5, 80)


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
