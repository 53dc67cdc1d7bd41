"""Answer many prompts as fast as they fit: python examples/batch.py

For files of requests in OpenAI's format, use `opennemo batch IN.jsonl -o OUT.jsonl MODEL`.
"""

import time

from opennemo import LLM, SamplingParams

CITIES = ["Paris", "Rome", "Madrid", "Berlin", "Vienna", "Lisbon", "Oslo", "Athens"]

with LLM.load("smollm2-135m-instruct") as llm:
    params = SamplingParams(max_tokens=12, temperature=0)
    prompts = [f"{city} is the capital of" for city in CITIES]
    start = time.perf_counter()
    replies = llm.complete(prompts, params, stop="\n")
    for city, reply in zip(CITIES, replies, strict=True):
        print(f"{city}: {reply.text.strip()}")
    seconds = time.perf_counter() - start
    n_tokens = sum(len(reply.ids) for reply in replies)
    print(f"{n_tokens} tokens in {seconds:.1f} s, {n_tokens / seconds:.0f} a second")

    # How likely is each answer? Log-probabilities come with a reply that asks for them.
    (reply,) = llm.complete(["The capital of Norway is"], params, logprobs=3, max_tokens=3)
    for token, logprobs in zip(reply.ids, reply.logprobs, strict=True):
        text = llm.tokenizer.decode([token])
        print(f"{text!r}: {logprobs.logprob:.2f} nats, rank {logprobs.rank}")
