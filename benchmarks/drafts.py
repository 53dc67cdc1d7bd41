"""Tokens a second with guesses at the next tokens and without, on prompts that answers quote.

    python benchmarks/drafts.py [MODEL] [--draft MODEL] [--rounds 5] [--threads N] [--json FILE]

The same model answers with guesses and without them in turns, at temperature 0.3, with one seed a
round, so that both write the same tokens; that is checked. The time is from the first token of an
answer to its last. `write` quotes nothing: it shows what guessing costs where it does not help.
"""

import argparse
import os
import time
from pathlib import Path
from statistics import median

import torch
from measure import Row, write_rows
from rich.console import Console
from rich.table import Table

from opennemo.engine import EngineConfig
from opennemo.llm import LLM

TEMPERATURE, MAX_TOKENS = 0.3, 128
TEXT = (Path(__file__).parent.parent / "docs" / "security.md").read_text("utf-8")[:1600]
TASKS = {
    "edit": f"Repeat this text word for word, and mend its spelling:\n\n{TEXT}",
    "summarise": f"Summarise this text, quoting its most important sentences:\n\n{TEXT}",
    "write": "Write a story about a lighthouse keeper and her brother, who is at sea.",
}


def answer(llm: LLM, task: str, seed: int) -> tuple[list[int], float]:
    """Ids of an answer, and its tokens a second after the first."""
    times: list[float] = []
    question = [{"role": "user", "content": TASKS[task]}]
    reply = llm.chat(question, temperature=TEMPERATURE, max_tokens=MAX_TOKENS, seed=seed)
    for _ in reply:
        times.append(time.perf_counter())
    return reply.ids, (len(reply.ids) - 1) / (times[-1] - times[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--draft", help="a small model of the same vocabulary")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    without = EngineConfig(max_context=2048, n_draft_tokens=0)
    guessing = EngineConfig(max_context=2048, draft=options.draft)
    rows = []
    table = Table("task", "without", "with", "ratio", "guesses", "kept", title="tokens/s, medians")
    with (
        LLM.load(options.model, config=without) as off,
        LLM.load(options.model, config=guessing) as on,
    ):
        for task in TASKS:
            slow, fast, ratios = [], [], []
            before = on.engine.stats()
            for llm in (off, on):  # the prompt is computed once, and pages come into memory
                answer(llm, task, 1000)
            for seed in range(options.rounds):
                (want, rate), (ids, quick) = answer(off, task, seed), answer(on, task, seed)
                assert ids == want, f"{task}, seed {seed}: another answer with guesses"
                slow.append(rate)
                fast.append(quick)
                ratios.append(quick / rate)
            after = on.engine.stats()
            n, kept = (after[k] - before[k] for k in ("draft_tokens", "draft_tokens_kept"))
            table.add_row(
                task, f"{median(slow):.1f}", f"{median(fast):.1f}", f"{median(ratios):.2f}",
                f"{n:,.0f}", f"{kept / max(n, 1):.0%}",
            )  # fmt: skip
            rows.append(
                Row(
                    name=f"drafts, {task}", ours=median(fast), peer=median(slow),
                    peer_name="without", ratio=median(ratios),
                )
            )  # fmt: skip
    Console().print(table)
    write_rows(rows, options.json)


if __name__ == "__main__":
    main()
