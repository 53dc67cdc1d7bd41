"""How tokens are chosen: the model's own distribution, and what requests change in it."""

from copy import deepcopy

import numpy as np
import pytest
import torch

from opennemo.engine import EngineConfig, LocalEngine, SamplingParams
from opennemo.engine.params import Healing
from opennemo.engine.sampler import pick_among_all, sample, token_logprobs
from opennemo.engine.sequence import Prefix, Sequence
from opennemo.model.attention import Packed
from tests.engine.stepping import answers, prompts, run

EOS = 7


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


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.3])
def test_a_prompt_that_is_spelled_again_is_as_likely_as_the_model_finds_it(model, temperature):
    """3,000 ways to spell a prompt's end against the product of the model's own probabilities."""
    prompt = [5, 17, 200]

    def probs(ids: tuple[int, ...]) -> torch.Tensor:
        tokens = torch.tensor([*prompt, *ids])
        with torch.inference_mode():
            hidden = model(tokens, Packed.of(len(tokens)))[-1]
        return (model.output(hidden) / temperature).softmax(-1)

    expected, path, ends, reach = {}, (), [], 1.0
    for _ in range(3):
        row = probs(path)
        goes_on, *ids = row.topk(4).indices.tolist()
        ends.append(frozenset(ids))
        expected |= {(*path, id): reach * float(row[id]) for id in ids}
        reach, path = reach * float(row[goes_on]), (*path, goes_on)
    healing = Healing(path[:2], tuple(ends))
    engine = LocalEngine(deepcopy(model), [], EngineConfig(max_queued=5000))
    asked = {"temperature": temperature, "max_tokens": 4, "healing": healing}
    requests = [(prompt, SamplingParams(seed=i, **asked)) for i in range(3000)]
    counts = dict.fromkeys(expected, 0)
    for events in run(engine, requests):
        ids = [event.id for event in events]
        counts[next(key for key in expected if (*ids[: len(key)],) == key)] += 1
    total = sum(expected.values())
    due = {key: 3000 * value / total for key, value in expected.items()}
    assert sum(n > 30 for n in due.values()) >= 5
    chi2 = sum((counts[key] - due[key]) ** 2 / due[key] for key in due if due[key] > 5)
    assert chi2 < 8 + 4 * 16**0.5


def test_a_prompt_is_spelled_again_in_small_steps_too(model):
    prompt, healing = (
        prompts(1)[0][:9],
        Healing((40, 60), (frozenset(), frozenset(), frozenset({7}))),
    )
    for config in (EngineConfig(max_batched_tokens=4), EngineConfig(max_batched_tokens=9)):
        engine = LocalEngine(deepcopy(model), [], config)
        events = run(engine, [(prompt, SamplingParams(max_tokens=5, healing=healing))])[0]
        assert [event.id for event in events][:3] == [40, 60, 7] and len(events) == 5


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


def test_logprobs_of_a_prompt_that_is_preempted_come_once(model):
    params = SamplingParams(max_tokens=12, prompt_logprobs=0)
    texts = prompts(8, shared=20)
    alone = LocalEngine(deepcopy(model), [])
    expected = [run(alone, [(text, params)])[0][0].prompt_logprobs for text in texts]
    crowd = LocalEngine(
        deepcopy(model), [], EngineConfig(page_size=4, n_pages=24, max_batched_tokens=7)
    )
    for events, text, ours in zip(
        run(crowd, [(t, params) for t in texts]), texts, expected, strict=True
    ):
        got = events[0].prompt_logprobs
        assert len(got) == len(text) == len(ours)
        for a, b in zip(got[1:], ours[1:], strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
    assert crowd.scheduler.n_preemptions > 0


@pytest.mark.parametrize(
    "fields",
    [
        {"top_p": 0.9}, {"top_p": 0.5}, {"top_k": 3000}, {"top_p": 0.7, "top_k": 2000},
        {"min_p": 0.3}, {"min_p": 0.2, "top_p": 0.8}, {},
    ],
)  # fmt: skip
def test_filters_of_flat_distributions_keep_what_their_definition_keeps(fields):
    """More than the head is wanted then, and nothing is sorted."""
    size, temperature = 5000, 4.0
    logits = torch.randn(1, size, generator=torch.Generator().manual_seed(1))
    params = SamplingParams(temperature=temperature, **fields)
    probs, order = (logits[0].double() / temperature).softmax(-1).sort(descending=True)
    before = probs.cumsum(-1) - probs
    kept = (torch.arange(size) < (params.top_k or size)) & (before < params.top_p)
    kept &= probs >= params.min_p * probs[0]
    allowed, drawn = set(order[kept].tolist()), set()
    sequence = Sequence(1, [0], params, print, 9, 0)
    for place in range(4000):
        prefix = Prefix(sequence, (0,) * place)  # as if so many were guessed
        drawn |= set(sample(logits.clone(), [prefix], frozenset()).tolist())
    assert drawn <= allowed and len(drawn) > min(1000, len(allowed) // 2)


@pytest.mark.parametrize("n_tokens", [5, 512, 1300])
def test_a_sum_searched_in_two_steps_finds_the_definitions_token(n_tokens):
    generator = torch.Generator().manual_seed(n_tokens)
    weights = torch.rand(64, n_tokens, generator=generator)
    weights[torch.rand(64, n_tokens, generator=generator) < 0.5] = 0
    weights[:, 2] += 1e-3
    uniform = torch.rand(64, dtype=torch.float64, generator=generator)
    uniform[:3] = torch.tensor([0.0, 1.0, 0.5])
    found = pick_among_all(weights.clone(), uniform, [SamplingParams(temperature=1.0)] * 64)
    for row, share, token in zip(weights.double(), uniform, found, strict=True):
        assert row[token] > 0
        low, high = row[:token].sum(), row[: token + 1].sum()
        assert low - 1e-9 <= share * row.sum() <= high + 1e-9


def test_nothing_waits_for_a_gpu_between_a_step_and_its_tokens():
    """On the meta device there are no numbers: code that reads one raises an error."""
    cases = [
        SamplingParams(temperature=0), SamplingParams(temperature=0.7, seed=1),
        SamplingParams(temperature=1, top_k=50, top_p=0.9, min_p=0.01),
        SamplingParams(temperature=1, min_p=0.1, repetition_penalty=1.1, presence_penalty=0.5),
        SamplingParams(temperature=0, frequency_penalty=1, logit_bias={5: 2.0}, min_tokens=9),
        SamplingParams(temperature=0, bad_words=((9,),), allowed_ids=frozenset((3, 4, 9))),
    ]  # fmt: skip
    prefixes = [
        Prefix(Sequence(i, [1, 2, 3], params, print, 9), (4,) * (i % 2))
        for i, params in enumerate(cases)
    ]
    logits = torch.empty(len(cases), 2000, device="meta")
    masks = {1: np.ones(63, np.int32), 4: np.ones(63, np.int32)}
    tokens = sample(logits, prefixes, frozenset([EOS]), masks)
    assert tokens.is_meta and tokens.shape == (len(cases),)
    with pytest.raises(Exception, match=r"(?i)meta"):  # such a question is noticed
        params = SamplingParams(temperature=1, top_p=0.9)
        sample(logits[:1], [Prefix(Sequence(0, [1], params, print, 9))], frozenset())


@pytest.mark.parametrize("n_tokens", [40_000, 40_003])
def test_a_row_of_a_large_vocabulary_is_chosen_alike_alone_and_in_company(n_tokens):
    """One row after the other on a CPU, whatever else is asked for in the batch."""
    cases: list[dict] = [
        {}, {"allowed_ids": frozenset(range(n_tokens))}, {"top_p": 0.99}, {"top_k": 50},
        {"top_k": 2000, "top_p": 0.9}, {"min_p": 0.05}, {"typical_p": 0.9}, {"top_n_sigma": 1.0},
        {"xtc_probability": 1.0, "xtc_threshold": 1e-4}, {"dry_multiplier": 0.8},
        {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2},
        {"logit_bias": {7: 3.0}, "bad_words": ((9,), (1, 8))},
    ]  # fmt: skip
    logits = torch.randn(2 * len(cases), n_tokens, generator=torch.Generator().manual_seed(5))
    prefixes = [
        Prefix(
            Sequence(i, [1, 2, 1, 2, 1], SamplingParams(temperature=t, seed=i, **case), print, 9)
        )
        for i, (t, case) in enumerate((t, case) for t in (0, 5) for case in cases)
    ]
    mask = np.random.default_rng(0).integers(-(2**31), 2**31, -(-n_tokens // 32)).astype(np.int32)
    masks = {i: mask for i in range(0, len(prefixes), 5)}  # noqa: C420, its type is lost there
    together = sample(logits.clone(), prefixes, frozenset(), masks).tolist()
    for i, prefix in enumerate(prefixes):
        alone = sample(
            logits[i : i + 1].clone(), [prefix], frozenset(), {0: mask} if i in masks else {}
        )
        assert alone.tolist() == [together[i]]
    for i in masks:
        assert mask[together[i] // 32] >> (together[i] % 32) & 1


@pytest.mark.parametrize("n_tokens", [320, 40_003])
def test_the_likeliest_of_a_large_vocabulary_are_those_of_a_sort(n_tokens):
    logits = torch.randn(n_tokens, generator=torch.Generator().manual_seed(3))
    logprobs, order = logits.log_softmax(-1).sort(descending=True)
    for n_top in (0, 1, 20, 100):
        found = token_logprobs(logits, int(order[70]), n_top)
        assert found.rank == 71 and found.logprob == logprobs[70]
        assert found.top == tuple(
            zip(order[:n_top].tolist(), logprobs[:n_top].tolist(), strict=True)
        )
