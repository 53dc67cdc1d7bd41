"""Measure a model in two number formats on a text: python examples/evaluation.py [TEXT_FILE]

`opennemo eval` runs the usual benchmarks; this shows what they use: log-likelihoods.
"""

import math
import sys
from pathlib import Path

from opennemo import LLM

text = Path(sys.argv[1] if len(sys.argv) > 1 else "README.md").read_text("utf-8")[:8000]
for format in ("stored", "int8"):
    with LLM.load("smollm2-135m-instruct", format=format) as llm:
        ids = llm.encode(text)[:1024]
        (score,) = llm.score([(ids[:1], ids[1:])])
        nats = -score.logprob
        n_bytes = len(llm.tokenizer.decode(ids[1:]).encode())
        print(
            f"{format}: perplexity {math.exp(nats / len(ids[1:])):.2f}, "
            f"{nats / math.log(2) / n_bytes:.3f} bits a byte"
        )

        # The answer that a model thinks likeliest, without generating any.
        context = llm.encode("Question: Which planet is the largest?\nAnswer:")
        choices = [" Mars", " Jupiter", " Venus"]
        scores = llm.score([(context, llm.tokenizer.encode(choice)) for choice in choices])
        likeliest = max(zip(scores, choices, strict=True), key=lambda pair: pair[0].logprob)
        print(f"{format}: the largest planet is{likeliest[1]}")
