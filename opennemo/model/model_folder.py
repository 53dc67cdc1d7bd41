"""Which files of a model's folder are read: its layout, its settings and its safetensors.

An index decides, where there is one. Pickles are refused by name, since opening one runs code.
"""

import warnings
from collections.abc import Iterable
from pathlib import Path

from opennemo.errors import CheckpointError
from opennemo.files import read_json
from opennemo.model import layouts
from opennemo.model.layouts import FolderLayout

# The file of settings, and the name of the weights up to its suffix.
FILES = {"mistral": ("params.json", "consolidated"), "hf": ("config.json", "model")}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def layout_of(path: Path) -> FolderLayout:
    """The layout of a folder; Mistral's own where, as on the hub, it has both."""
    if not path.is_dir():
        _refuse_pickles([path])
        what = "is neither a folder nor a .gguf file" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {what}")
    has_params, has_config = (path / "params.json").exists(), (path / "config.json").exists()
    has_weights = any(path.glob("consolidated*.safetensors"))
    adapter = any((path / name).exists() for name in ("adapter_config.json", "lora.safetensors"))
    if adapter and not has_config and not has_weights:
        raise CheckpointError(f"{path}: an adapter; `opennemo merge` folds it into its model")
    if has_params and (has_weights or not has_config):
        return "mistral"
    if not has_config:
        _refuse_pickles(path.iterdir())
        raise CheckpointError(f"{path}: no model: it has neither params.json nor config.json")
    return "hf"


def weight_files(folder: Path, layout: FolderLayout) -> dict[Path, set[str] | None]:
    """The safetensors files of a folder, and what is read from each: an index decides, if any."""
    single = folder / f"{FILES[layout][1]}.safetensors"
    index = folder / f"{single.name}.index.json"
    if not index.exists():
        if single.exists():
            return {single: None}
        _refuse_pickles(folder.iterdir())
        raise CheckpointError(f"{folder}: {single.name} is missing, or {index.name} and its files")
    weight_map = read_json(index).get("weight_map")
    names = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise CheckpointError(f"{index}: its weight_map does not name files of this folder")
    there = {path.name for path in folder.iterdir()}  # no name is tried that could be too long
    stray = single.name in there and single.name not in names
    if missing := [layouts.short(name).strip("'") for name in names if name not in there]:
        hint = f", or remove {index.name} to read {single.name}" if stray else ""
        raise CheckpointError(f"{folder}: files missing: {first_five(missing)}; fetch it again"
            f"{hint}")  # fmt: skip
    if stray:
        message = f"{folder}: {single.name} is not read, since {index.name} does not name it"
        warnings.warn(message, stacklevel=4)
    assert isinstance(weight_map, dict)  # or there would be no names
    return {folder / n: {key for key, file in weight_map.items() if file == n} for n in names}


def _refuse_pickles(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.suffix in PICKLES and path.is_file():
            raise CheckpointError(
                f"{path}: pickle files are never read, since opening one runs whatever its maker "
                "wrote; convert it where that can do no harm, and use the result: "
                "https://huggingface.co/docs/safetensors/convert-weights"
            )


def first_five(names: list[str]) -> str:
    """A list of names for a message, cut short."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
