"""Rewards of your own: a model learns to answer briefly. python examples/custom_reward.py [STEPS]

Needs the extra `train`. Writes runs/example-reward. `brief` is a whole reward function; a recipe in
TOML names it as "examples/custom_reward.py:brief".
"""

import json
import sys
from pathlib import Path

from opennemo.rollouts import Rollouts
from opennemo.train.config import parse_recipe
from opennemo.train.metrics import read_metrics
from opennemo.train.rewards import Attempt
from opennemo.train.run import train

QUESTIONS = ("Name a river.", "What is a cat?", "Name a colour.", "What is snow?")


def brief(attempt: Attempt) -> float:
    """1 for an empty answer, less for each word, 0 from 20 words on; 0 if it does not end."""
    return max(0.0, 1 - len(attempt.text.split()) / 20) if attempt.whole else 0.0


def main() -> None:
    n_steps = int(sys.argv[1]) if len(sys.argv) > 1 else 12
    run = Path("runs/example-reward")
    run.mkdir(parents=True, exist_ok=True)
    prompts = run / "prompts.jsonl"
    rows = ({"messages": [{"role": "user", "content": question}]} for question in QUESTIONS)
    prompts.write_text("\n".join(map(json.dumps, rows)))
    recipe = parse_recipe(
        {
            "objective": "rl",
            "steps": n_steps,
            "model": {"path": "smollm2-135m-instruct"},
            "data": {"train": [{"path": str(prompts)}], "window": 128, "rows": 4},
            "drawing": {"answers": 6, "max_tokens": 32},
            # `format` beside it: an empty answer is brief, too.
            "rl": {"rewards": [{"name": f"{__file__}:brief"}, {"name": "format", "weight": 0.5}]},
            "optim": {"lr": 1e-3, "weight_decay": 0.0},
            "lora": {"rank": 8, "alpha": 16.0},
        },
        "examples/custom_reward.py",
    )
    train(recipe, run / f"run-{n_steps}", rollout=Rollouts)
    for record in read_metrics(run / f"run-{n_steps}")[:: max(1, n_steps - 1)]:
        print(f"step {record['step']}: reward {record['reward']:.2f}, "
              f"{record['answer_tokens']:.0f} tokens an answer")  # fmt: skip


if __name__ == "__main__":
    main()
