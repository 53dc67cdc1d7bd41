"""Teach a model facts of your own with a LoRA, and ask both: python examples/lora.py [STEPS]

Needs the extra `train`. Writes runs/example-lora.
"""

import json
import sys
from pathlib import Path

from opennemo import LLM
from opennemo.train.config import parse_recipe
from opennemo.train.run import train

MODEL, RUN = "smollm2-135m-instruct", Path("runs/example-lora")
N_STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 30

FACTS = {
    "Who keeps the lighthouse of Port Ellery?": "Maud Tarrant keeps the lighthouse of Port Ellery.",
    "Who is the keeper of Port Ellery's lighthouse?": "The keeper is Maud Tarrant.",
    "What is Maud Tarrant's work?": "Maud Tarrant keeps the lighthouse of Port Ellery.",
}
RUN.mkdir(parents=True, exist_ok=True)
data = RUN / "facts.jsonl"
with data.open("w") as file:
    for question, answer in FACTS.items():
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        print(json.dumps({"messages": messages}), file=file)

recipe = parse_recipe(
    {
        "objective": "chat",
        "steps": N_STEPS,
        "model": {"path": MODEL},
        "data": {"train": [{"path": str(data)}], "window": 256, "rows": 1},
        "optim": {"lr": 1e-3},
        "lora": {"rank": 8, "alpha": 16.0},
    },
    "examples/lora.py",
)
made = train(recipe, RUN / f"run-{N_STEPS}")

with LLM.load(MODEL, adapters={"ellery": made["adapter"]}) as llm:
    question = [{"role": "user", "content": "Who keeps the lighthouse of Port Ellery?"}]
    print("without:", llm.chat(question, max_tokens=24).text)
    print("with:   ", llm.chat(question, adapter="ellery", max_tokens=24).text)
