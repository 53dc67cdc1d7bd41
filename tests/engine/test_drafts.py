"""Guesses at the next tokens change no answer, and are made only where they are worth it."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opennemo.engine import EngineConfig, LocalEngine, SamplingParams
from opennemo.engine.drafts import Drafter, Pace, look_up
from opennemo.engine.grammar import GrammarCompiler
from opennemo.engine.kv_cache import KVCache
from opennemo.engine.sequence import Sequence
from opennemo.model.attention import Packed
from opennemo.model.transformer import PRESETS, Transformer
from tests.engine.stepping import answers, greedy, prompts, run

EOS = 7
CONTROL = {"<unk>": 0, "<s>": 1, "</s>": EOS}
TOKENS = [b""] * 64 + [bytes([i]) for i in range(256)]
OFF = EngineConfig(n_draft_tokens=0)
SMALL = EngineConfig(n_draft_tokens=4, max_batched_tokens=9, page_size=4, n_pages=30)
# A few tokens, so that answers repeat themselves and guesses are kept.
FEW = frozenset(range(70, 76))


def near(model: Transformer, noise: float) -> Transformer:
    """A nearly equal model."""
    torch.manual_seed(1)
    other = deepcopy(model)
    for parameter in other.parameters():
        if parameter.dim() == 2:
            parameter.add_(noise * parameter.std() * torch.randn_like(parameter))
    return other


def n_drafted(engine: LocalEngine) -> tuple[float, float]:
    stats = engine.stats()
    return stats["draft_tokens"], stats["draft_tokens_kept"]


def grammar():
    return GrammarCompiler(TOKENS, CONTROL, EOS).compile("regex", "(ab?c ){2,9}")


RULES = {
    "greedy": {},
    "seed": {"temperature": 0.7, "top_p": 0.95, "seed": 5},
    "hot": {"temperature": 1.3, "top_k": 30, "min_p": 0.01, "seed": 6},
    "penalties": {
        "temperature": 0.8, "seed": 1, "repetition_penalty": 1.1, "presence_penalty": 0.2,
        "frequency_penalty": 0.1,
    },
    "biased": {"logit_bias": {id: 5.0 * (-1) ** id for id in range(300)}},
    "few": {"allowed_ids": FEW, "temperature": 0.5, "seed": 2},
    "bad words": {"allowed_ids": FEW, "bad_words": ((70,), (71, 72), (73, 73, 73))},
    "min_tokens": {"allowed_ids": FEW | {EOS}, "min_tokens": 15, "logit_bias": {EOS: 3.0}},
    "stop": {"allowed_ids": FEW, "stop_ids": frozenset({74}), "temperature": 0.9, "seed": 3},
    "logprobs": {"allowed_ids": FEW, "logprobs": 3, "prompt_logprobs": 1},
    "grammar": {"grammar": grammar(), "temperature": 1.0, "seed": 4},
    "greedy grammar": {"grammar": grammar()},
}  # fmt: skip


@pytest.mark.parametrize("config", [EngineConfig(), SMALL], ids=["default", "small"])
@pytest.mark.parametrize("with_model", [False, True], ids=["looked up", "small model"])
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_answers_are_the_same_with_guesses_and_without(model, config, with_model, rules):
    params = SamplingParams(max_tokens=30, **rules)
    texts = [text * 2 for text in prompts(6, shared=8)]
    without = run(LocalEngine(deepcopy(model), [EOS], OFF), [(text, params) for text in texts])
    draft = near(model, 0.1) if with_model else None
    engine = LocalEngine(deepcopy(model), [EOS], config, draft=draft)
    for _ in range(2):  # the second time, with what the prefix cache has
        events = run(engine, [(text, params) for text in texts])
        for ours, theirs in zip(events, without, strict=True):
            assert [e.id for e in ours] == [e.id for e in theirs]
            assert ours[-1].finish_reason == theirs[-1].finish_reason
            for a, b in zip(ours, theirs, strict=True):
                if a.logprobs is not None and b.logprobs is not None:
                    assert a.logprobs.logprob == pytest.approx(b.logprobs.logprob, abs=1e-5)
                    assert [id for id, _ in a.logprobs.top] == [id for id, _ in b.logprobs.top]
                else:
                    assert a.logprobs is b.logprobs is None
    if config is SMALL:  # otherwise it depends on how long steps take
        assert n_drafted(engine)[1 if with_model or "allowed_ids" in rules else 0] > 0


def test_greedy_answers_with_guesses_are_the_definition(model):
    for draft in (None, near(model, 0.05)):
        engine = LocalEngine(deepcopy(model), [], EngineConfig(n_draft_tokens=3), draft=draft)
        for prompt in prompts(4):
            want = greedy(model, prompt * 3, 25)
            assert answers(engine, [prompt * 3], SamplingParams(max_tokens=25)) == [want]


@pytest.mark.parametrize("with_model", [False, True], ids=["looked up", "small model"])
def test_the_distribution_is_the_models(with_model):
    """Chi-square on a vocabulary of 8: three tokens' joint distribution, top-p and penalties."""
    torch.manual_seed(3)
    model = Transformer(replace(PRESETS["tiny"], vocab_size=8)).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.mul_(3)
    temperature, top_p, repetition, presence = 1.2, 0.9, 0.8, 0.3
    prompt, n = [0, 5, 6, 7, 1, 2, 3, 4, 2, 0], 6000

    @torch.inference_mode()
    def chances(tokens: list[int]) -> torch.Tensor:
        """As the definitions of the rules have it, one after the other (8,)."""
        logits = model.output(model(torch.tensor(tokens), Packed.of(len(tokens)))[-1]).double()
        for id in set(tokens):
            logits[id] = logits[id] / repetition if logits[id] > 0 else logits[id] * repetition
        for id in set(tokens[len(prompt) :]):
            logits[id] -= presence
        probs, kept = (logits / temperature).softmax(-1), torch.zeros(8).double()
        total = 0.0
        for id in probs.argsort(descending=True).tolist():
            if total >= top_p:
                break
            kept[id], total = probs[id], total + float(probs[id])
        return kept / kept.sum()

    expected = {
        (a, b, c): float(chances(prompt)[a] * chances([*prompt, a])[b] * third)
        for a in range(8)
        for b in range(8)
        for c, third in enumerate(chances([*prompt, a, b]).tolist())
    }
    draft = near(model, 0.3) if with_model else None
    engine = LocalEngine(
        model, [], EngineConfig(n_draft_tokens=2, max_queued=n), draft=draft and deepcopy(draft)
    )
    params = SamplingParams(
        temperature=temperature, top_p=top_p, repetition_penalty=repetition,
        presence_penalty=presence, max_tokens=3,
    )  # fmt: skip
    counts = dict.fromkeys(expected, 0)
    for events in run(engine, [(prompt, replace(params, seed=i)) for i in range(n)]):
        counts[events[0].id, events[1].id, events[2].id] += 1
    assert n_drafted(engine)[1] > n / 20
    assert all(counts[key] == 0 for key, p in expected.items() if p == 0)
    likely = {key: n * p for key, p in expected.items() if n * p >= 5}
    chi2 = sum((counts[key] - want) ** 2 / want for key, want in likely.items())
    assert len(likely) > 50 and chi2 < len(likely) + 4 * (2 * len(likely)) ** 0.5


def test_n_answers_and_a_model_with_fewer_rows(model):
    """The draft model has fewer rows of logits than the model, as some have that were padded."""
    torch.manual_seed(2)
    draft = Transformer(replace(PRESETS["tiny"], vocab_size=300, n_layers=1)).eval()
    params = SamplingParams(temperature=0.8, seed=9, max_tokens=12, logit_bias={310: 5.0})
    prompt = prompts(1, shared=20)[0]
    ids = []
    for config, small in ((OFF, None), (SMALL, draft.requires_grad_(False))):
        engine = LocalEngine(deepcopy(model), [EOS], config, draft=small)
        events = run(engine, [(prompt, params)], n=3)[0]
        ids.append([[e.id for e in events if e.index == i] for i in range(3)])
    assert ids[0] == ids[1]


def test_guesses_end_where_they_are_seldom_kept(model):
    """A random model at a high temperature repeats nothing: soon hardly a guess is made."""
    engine = LocalEngine(deepcopy(model), [], EngineConfig(max_queued=300))
    params = SamplingParams(temperature=20.0, max_tokens=60)
    text = prompts(1, shared=200)[0]
    for _ in range(40):
        answers(engine, [text], params)
    before = engine.stats()["draft_tokens"]
    for _ in range(20):
        answers(engine, [text], params)
    assert engine.stats()["draft_tokens"] - before < 0.1 * 20 * 60


def test_the_price_of_a_guess_follows_from_the_time_of_steps():
    cheap, dear = Pace(), Pace()
    assert cheap.price() == dear.price() > 0  # nothing is known
    for _ in range(30):
        for n_rows in (1, 5):
            cheap.note(n_rows, n_rows, 1 + 0.01 * n_rows)
            dear.note(n_rows, n_rows, 1.0 * n_rows)
    assert cheap.price() < 0.2 < cheap.price(extra_seconds=0.3) < dear.price() == 1.0


@pytest.mark.parametrize(("seconds_a_row", "guesses"), [(0.01, True), (1.0, False)])
def test_no_guess_is_made_where_a_row_costs_as_much_as_a_step(seconds_a_row, guesses):
    drafter, cache = Drafter(None, frozenset()), KVCache(64, 4)
    sequence = Sequence(1, [1, 2, 3, 4] * 8, SamplingParams(), print, max_tokens=20)
    sequence.n_computed = 31
    for n_rows in 10 * (1, 9):
        drafter.pace.note(n_rows, n_rows, 0.1 + seconds_a_row * n_rows)
    drafter.guess([sequence], cache)
    assert bool(sequence.guesses) == guesses


def test_guesses_stop_at_the_end_of_an_answer_and_at_what_the_grammar_forbids():
    drafter, cache = Drafter(3, frozenset({EOS})), KVCache(64, 4)
    cases: tuple[tuple[dict, list[int], tuple[int, ...]], ...] = (
        ({}, [1, 2, 3, 4, EOS, 9, 1, 2, 3], (4, EOS)),
        ({"stop_ids": frozenset({4})}, [1, 2, 3, 4, EOS, 9, 1, 2, 3], (4,)),
        ({"ignore_eos": True}, [1, 2, 3, 4, EOS, 9, 1, 2, 3], (4, EOS, 9)),
        ({"grammar": grammar()}, [1, 2, 3, 64 + ord("a"), 64 + ord("c"), 1, 2, 3],
         (64 + ord("a"), 64 + ord("c"))),
    )  # fmt: skip
    for rules, tokens, want in cases:
        sequence = Sequence(1, tokens, SamplingParams(**rules), print, max_tokens=20)
        sequence.n_computed = len(tokens) - 1
        drafter.guess([sequence], cache)
        assert sequence.guesses == want


@pytest.mark.parametrize("with_model", [False, True], ids=["looked up", "small model"])
def test_guesses_take_no_room_from_others_tokens(model, with_model):
    """Neither tokens of a step nor rows of logits."""
    params = SamplingParams(max_tokens=20, allowed_ids=FEW)
    texts = [text * 2 for text in prompts(10, shared=4)]
    without = answers(LocalEngine(deepcopy(model), [EOS], OFF), texts, params)
    draft = near(model, 0.1) if with_model else None
    engine = LocalEngine(deepcopy(model), [EOS], EngineConfig(n_draft_tokens=4), draft=draft)
    engine.scheduler.max_rows = 12
    assert answers(engine, texts, params) == without
    assert n_drafted(engine)[0] > 0


def test_a_draft_model_that_fails_is_left_out(model):
    draft = near(model, 0.1)
    engine = LocalEngine(deepcopy(model), [EOS], SMALL, draft=draft)
    params = SamplingParams(max_tokens=10)
    want = answers(LocalEngine(deepcopy(model), [EOS], OFF), prompts(3), params)

    def fail(*_: object) -> None:
        raise RuntimeError("no memory")

    engine.drafter.small_model.runner.compute = fail  # type: ignore
    assert answers(engine, prompts(3), params) == want


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 5))
def test_look_up_quotes_what_followed(tokens, n):
    guess, size = look_up(tokens, n)
    if not guess:
        assert tokens[-1] not in tokens[:-1] and size == 0
        return
    tail, text = tokens[-size:], [*tokens, *guess]
    assert len(guess) == n and 1 <= size <= 3
    periods = range(1, len(tokens))
    assert any(
        tokens[-size - p : len(tokens) - p] == tail
        and all(text[i] == text[i - p] for i in range(len(tokens), len(text)))
        for p in periods
    )
