"""The text model in a folder of a vision model.

Such a folder nests the settings of the text model in its own, and prefixes the names of the text
model's tensors. This module extracts both as an ordinary model; vision tensors are not read.

Sources: `Mistral3Config`, `LlavaConfig` and the configs of text models in transformers; vLLM's
reader of params.json.
"""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opennemo.model.field_values import FolderLayout, read_table, refuse
from opennemo.model.tensor_files import SafetensorFiles

ARCHITECTURES = (
    "Mistral3ForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "PixtralForConditionalGeneration",
)
# Prefixes of the names of vision tensors, in either layout.
SEEING = re.compile(
    r"(model\.)?(vision_tower|multi_modal_projector|vision_encoder|vision_language_adapter"
    r"|patch_merger|pre_mm_projector_norm)\."
)
# Entries that a `text_config` may leave out.
_MISTRAL = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 32000,
    "max_position_embeddings": 131_072,
}  # fmt: skip
DEFAULTS: dict[Any, dict[str, Any]] = {
    "mistral": _MISTRAL,
    "ministral": _MISTRAL,
    "ministral3": _MISTRAL | {
        "num_hidden_layers": 34, "head_dim": 128, "vocab_size": 131_072,
        "max_position_embeddings": 262_144,
    },
    "llama": _MISTRAL | {
        "num_key_value_heads": None, "intermediate_size": 11008, "max_position_embeddings": 2048,
    },
}  # fmt: skip


def text_part(
    settings: Mapping[str, Any], layout: FolderLayout, files: SafetensorFiles, where: Path
) -> Mapping[str, Any]:
    """The settings of the text model; `files` are left with its tensors, by their usual names.

    The settings of a folder with only a text model stay as they are.

    Raises:
        CheckpointError: the folder is of an audio model, or uses other names.
    """
    found = _params(settings, where) if layout == "mistral" else _config(settings, where)
    if found is None:
        return settings
    kept = {name: _own(name) for name in files.shapes if not SEEING.match(name)}
    unread = len(files.shapes) - len(kept)
    files.choose(kept)
    message = f"{where.parent}: its {unread:,} vision tensors are not read; the text model is"
    warnings.warn(message, stacklevel=4)
    return found


def _params(settings: Mapping[str, Any], where: Path) -> dict[str, Any] | None:
    parts = settings.get("multimodal")
    if not parts and not settings.get("vision_encoder"):
        return None
    if parts:
        read_table(parts, "multimodal", ("vision_encoder_args",), where)
    return {k: v for k, v in settings.items() if k not in ("multimodal", "vision_encoder")}


def _config(settings: Mapping[str, Any], where: Path) -> dict[str, Any] | None:
    if settings.get("architectures") not in [[name] for name in ARCHITECTURES]:
        return None
    text = settings.get("text_config")
    if settings.get("audio_config"):
        refuse(where, "audio_config", settings["audio_config"], [])
    if not isinstance(text, dict) or text.get("model_type") not in DEFAULTS:
        kind = text.get("model_type") if isinstance(text, dict) else text
        refuse(where, "text_config.model_type", kind, [*DEFAULTS])
    whole = ("quantization_config", "compression_config", "tie_word_embeddings", "torch_dtype")
    text = DEFAULTS[text["model_type"]] | text
    text |= {name: _plain(settings[name], where) for name in whole if name in settings}
    return text


def _plain(value: Any, where: Path) -> Any:
    """A value of the whole model's settings with modules by their names in the text model."""
    if isinstance(value, dict):
        return {name: _plain(entry, where) for name, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry, where) for entry in value]
    if not isinstance(value, str):
        return value
    if "language_model" in (own := _own(value)):
        refuse(where, "quantization_config", value, ["names that begin with language_model.model"])
    return own


def _own(name: str) -> str:
    """A tensor's or a module's name, or a pattern of them, as in a folder of the text alone."""
    name = re.sub(r"model\\?\.language_model\\?\.", "model.", name)
    return re.sub(r"language_model\\?\.(?=model\b|lm_head\b)", "", name)
