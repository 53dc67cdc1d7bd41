"""The model card of a run: what a model is, what it was made from and how, filled in by code.

Nothing in it is written by hand and nothing is left empty: a missing fact is called missing.
Format: the Hugging Face hub's README.md with YAML in front.
"""

import platform
from pathlib import Path
from typing import Any

import torch

from opennemo import __version__
from opennemo.files import read_json
from opennemo.train.config import Recipe, to_json
from opennemo.train.metrics import read_metrics

SHOWN = (
    "loss", "valid_loss", "valid_bits_per_byte", "accuracy", "valid_accuracy", "reward",
    "valid_reward",
)  # fmt: skip


def write_card(recipe: Recipe, run: Path, folder: Path, *, stored: str = "float32") -> None:
    """Write README.md into a folder that a run made, whose weights are in the format `stored`."""
    from huggingface_hub import ModelCard, ModelCardData  # training itself does not need it

    records, data, parent = read_metrics(run), read_json(run / "data.json"), recipe.model.path
    facts = {
        "parent": parent or f"none: new weights of the shape {recipe.model.shape}",
        "objective": recipe.objective,
        **_rewards(recipe),
        "adapter": _adapter(recipe),
        "number format": _format(recipe, stored),
        "steps": f"{recipe.steps:,} of {recipe.data.rows} rows of {recipe.data.window:,} tokens",
        "seed": str(recipe.seed),
        "steps skipped": f"{sum(r['skipped'] or 0 for r in records):.0f}, for their gradient",
        "hardware": hardware(),
        "software": f"opennemo {__version__}, torch {torch.__version__}",
        "licence": recipe.licence or "not stated in the recipe",
    }
    front = ModelCardData(
        library_name="opennemo", license=recipe.licence or "unknown", base_model=parent
    )
    lines = ["---", front.to_yaml(), "---", "", f"# {run.resolve().name}", ""]
    lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items())]
    lines += ["", "## Results", "", *_results(records), "", "## Data", ""]
    for name, part in data.items():
        lines += [f"**{name}**", "", *_data(part), ""]
    lines += ["## Recipe", "", "```json", to_json(recipe).rstrip(), "```", ""]
    ModelCard("\n".join(lines)).save(folder / "README.md")


def hardware() -> str:
    """What this process runs on."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line[:10] == "model name")
    except (OSError, StopIteration):
        pass
    return f"CPU {name}, {torch.get_num_threads()} threads"


def _results(records: list[dict[str, Any]]) -> list[str]:
    rows = []
    for key in SHOWN:
        values = [(r["step"] + 1, r[key]) for r in records if r.get(key) is not None]
        if values:
            (first, began), (last, ended) = values[0], values[-1]
            rows.append(f"| {key} | {began:.4f} (step {first:,}) | {ended:.4f} (step {last:,}) |")
    return ["| | at first | at last |", "|---|---|---|", *rows] if rows else ["None were recorded."]


def _data(part: dict[str, Any]) -> list[str]:
    if not part:
        return ["None."]
    if "sources" in part:
        return [
            f"- {source['path']}: {source['tokens']:,} tokens in {source['documents']:,} "
            f"documents, {source['share']:.0%} of what was drawn; index SHA-256 "
            f"{source['index_sha256'][:16]}"
            for source in part["sources"]
        ]
    lines = [f"- {name}" for name in part["files"]]
    if "prompts" in part:
        return [
            *lines,
            f"- {part['prompts']:,} prompts of {part['tokens']:,} tokens, SHA-256 "
            f"{part['sha256'][:16]}; {len(part['left_out']):,} lines left out",
        ]
    return [
        *lines,
        f"- {part['conversations']:,} conversations, {part['tokens']:,} tokens, of which "
        f"{part['trained_tokens']:,} are learned; {len(part['left_out']):,} lines left out",
    ]


def _rewards(recipe: Recipe) -> dict[str, str]:
    if not recipe.draws:
        return {}
    drawing, parts = recipe.drawing, recipe.rl.rewards if recipe.objective == "rl" else ()
    facts = {"answers": f"{drawing.answers} to a prompt, at most {drawing.max_tokens:,} tokens"}
    return facts | (
        {"rewards": ", ".join(f"{r.weight:g} {r.name}" for r in parts)} if parts else {}
    )


def _adapter(recipe: Recipe) -> str:
    lora = recipe.lora
    if lora is None:
        return "none: all weights learn"
    return f"LoRA of rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.layers)}"


def _format(recipe: Recipe, stored: str) -> str:
    qat = recipe.qat
    if qat is None:
        return "float32, no quantisation awareness"
    kv = ", keys and values in FP8" if qat.kv else ""
    place = "float32" if stored == "float32" else f"stored in {stored}"
    return f"{place}; learned as if rounded to {qat.format}{kv} after {qat.start:.0%} of the steps"
