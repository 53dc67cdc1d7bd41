"""Ask a model something: python examples/chat.py ["a question" [MODEL]]"""

import sys

from opennemo import LLM

question = sys.argv[1] if len(sys.argv) > 1 else "What is the capital of Germany?"
model = sys.argv[2] if len(sys.argv) > 2 else "smollm2-135m-instruct"

with LLM.load(model) as llm:
    messages = [
        {"role": "system", "content": "You answer in one sentence."},
        {"role": "user", "content": question},
    ]
    reply = llm.chat(messages, max_tokens=60)
    print(reply.text)
    print(f"{reply.n_prompt_tokens} tokens of prompt, {len(reply.ids)} of answer,")
    print(f"ended by {reply.finish_reason}")

    # The conversation continues: what was computed for its beginning is in the cache.
    messages += [reply.message, {"role": "user", "content": "And of Italy?"}]
    again = llm.chat(messages, max_tokens=60)
    print(again.text)
    print(f"{again.n_cached_tokens} of {again.n_prompt_tokens} prompt tokens were in the cache")
