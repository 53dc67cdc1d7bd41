"""A model that is divided over two ranks, processes over gloo, answers as the whole one does."""

import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from opennemo.engine import EngineConfig, LocalEngine, SamplingParams, Token
from opennemo.errors import InvalidRequest, OpenNemoError
from opennemo.llm import LLM
from opennemo.model.checkpoint import save
from opennemo.model.tensor_parallel import check_divides
from opennemo.model.transformer import PRESETS, Transformer
from opennemo.tokenizer.tekken import SINGLE_BYTES, Tekken

GREEDY = {"temperature": 0.0, "max_tokens": 20, "min_tokens": 20}
CONFIG = EngineConfig(max_batched_tokens=48, n_pages=60)
SHARED = "Of the beginning that all of them share, more than two pages: "
PROMPTS = [SHARED + text for text in ("one", "two, and some more words", "three")] + ["alone", "x"]


@pytest.fixture(scope="module", params=[False, True], ids=["head", "tied"])
def folder(request, tmp_path_factory) -> Path:
    """A tiny random model, as sharp as those of the engine's other tests."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(0)
    model = Transformer(replace(PRESETS["tiny"], tied_embeddings=request.param))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(3)
    save(model, folder, layout="mistral")
    Tekken(r"(?s:.)", SINGLE_BYTES, n_special=64).save(folder / "tekken.json")
    return folder


def heard_of(llm: LLM) -> dict:
    """A model's answers in some ways that exercise the ranks differently."""
    side_by_side = [llm.complete(p, **GREEDY) for p in PROMPTS]
    ids = [reply.finish().ids for reply in side_by_side]
    again = [llm.complete(p, **GREEDY).finish() for p in PROMPTS]
    sampled = llm.complete("say", temperature=1.0, seed=3, n=2, max_tokens=20).finish()
    context = llm.encode(SHARED)
    scores = llm.score([(context, [5, 6]), (context, [7]), (context[:3], [8, 9, 10])])
    return {
        "greedy": ids,
        "from the cache": ([r.ids for r in again], [r.n_cached_tokens for r in again]),
        "sampled": [answer.ids for answer in sampled.answers],
        "scores": [(score.greedy, round(score.logprob, 3)) for score in scores],
    }


def test_two_ranks_say_what_one_says(folder: Path):
    with LLM.load(str(folder), device="cpu", config=CONFIG) as llm:
        expected = heard_of(llm)
    config = replace(CONFIG, tensor_parallel_size=2)
    with LLM.load(str(folder), device="cpu", config=config) as llm:
        assert isinstance(llm.engine, LocalEngine)
        share, whole = llm.engine.runner.model.config, PRESETS["tiny"]
        assert (share.n_heads, share.n_kv_heads) == (whole.n_heads // 2, whole.n_kv_heads // 2)
        assert llm.engine.runner.pages.codes.shape[4] == whole.n_kv_heads // 2
        assert heard_of(llm) == expected
        llm.engine.sleep()
        llm.engine.wake()
        assert heard_of(llm)["greedy"] == expected["greedy"]
        processes = multiprocessing.active_children()
    assert [process.exitcode for process in processes] == [0]  # they end with the engine
    assert max(expected["from the cache"][1]) > 30


def test_a_rank_that_dies_is_an_error_and_nobody_waits(folder: Path):
    config = replace(CONFIG, tensor_parallel_size=2)
    with LLM.load(str(folder), device="cpu", config=config) as llm:
        events: list[Token] = []
        llm.engine.submit([5], SamplingParams(max_tokens=250, ignore_eos=True), events.append)
        while len(events) < 3:
            time.sleep(0.01)
        (other,) = multiprocessing.active_children()
        os.kill(other.pid or 0, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while not events[-1].finish_reason and time.monotonic() < deadline:
            time.sleep(0.01)
        assert events[-1].finish_reason == "error"
        assert "rank 1 of 2 has ended (exit code -9)" in str(events[-1].error)
        assert llm.engine.failed
        with pytest.raises(OpenNemoError, match="rank 1 of 2 has ended"):
            llm.complete("more").finish()


def test_what_does_not_divide_is_refused_with_what_does(folder: Path):
    with pytest.raises(InvalidRequest, match=r"is 3, allowed for this model are 1, 2 \(n_heads 4"):
        LLM.load(str(folder), device="cpu", config=EngineConfig(tensor_parallel_size=3))
    with pytest.raises(InvalidRequest, match="allowed for this model are 1, 2, 4, 8 "):
        check_divides(PRESETS["mistral-nemo-12b"], 5)
    with pytest.raises(InvalidRequest, match="no adapters"):
        config = EngineConfig(tensor_parallel_size=2, adapters=True)
        LLM.load(str(folder), device="cpu", config=config)
