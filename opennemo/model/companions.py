"""What accompanies a model's weights: its tokenizer, and its own sampling settings.

Files are copied as they are. Other files that the new layout needs are made from the source:
tokenizer.json from tekken.json, or from the fields of a GGUF file.
"""

import shutil
import warnings
from pathlib import Path
from typing import Any

from opennemo.errors import CheckpointError
from opennemo.files import read_json, write_json
from opennemo.model.layouts import FolderLayout, short
from opennemo.tokenizer.gguf_head import read_metadata
from opennemo.tokenizer.huggingface import read_chat_template
from opennemo.tokenizer.load import difference_beside, load_tokenizer, tokenizer_file
from opennemo.tokenizer.saving import save_huggingface

TOKENIZERS = ("tekken.json", "tokenizer.json", "tokenizer.model*")
OTHERS = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.*",
    "generation_config.json", "LICENSE*",
)  # fmt: skip
# The settings of generation that are read, and the largest value of each that makes sense.
SAMPLING = {"temperature": 100.0, "top_p": 1.0, "top_k": 2**22}
# Their names in GGUF files.
GGUF_SAMPLING = {"temperature": "general.sampling.temp"}
GGUF_SAMPLING |= {name: f"general.sampling.{name}" for name in ("top_p", "top_k")}


def read_generation_config(path: Path) -> dict[str, Any]:
    """The settings of generation in a model folder or `.gguf` file, as far as it has any.

    Returns:
        Some of `temperature`, `top_p`, `top_k`, and `eos_token_ids`, a list.

    Raises:
        CheckpointError: a setting is invalid.
    """
    if path.suffix == ".gguf":
        fields = read_metadata(path)
        raw = {name: fields.get(key) for name, key in GGUF_SAMPLING.items()}
        # Stored as float32, where 0.3 is 0.30000001192.
        raw = {k: float(f"{v:.7g}") if isinstance(v, float) else v for k, v in raw.items()}
        eos = [fields.get(f"tokenizer.ggml.{which}_token_id") for which in ("eos", "eot", "eom")]
    else:
        config, raw = (
            read_json(file) if file.exists() else {}
            for file in (path / "config.json", path / "generation_config.json")
        )
        text = config.get("text_config") or {}  # of a vision model
        eos = raw.get("eos_token_id", config.get("eos_token_id", text.get("eos_token_id")))
    settings: dict[str, Any] = {}
    for key, most in SAMPLING.items():
        if (value := raw.get(key)) is not None:
            if not isinstance(value, int | float) or not 0 <= value <= most:
                raise CheckpointError(f"{path}: {key} is {short(value)}, not from 0 to {most:,}")
            settings[key] = type(most)(value)
    ids = [id for id in (eos if isinstance(eos, list) else [eos]) if type(id) is int and id >= 0]
    return settings | ({"eos_token_ids": ids} if ids else {})


def copy_companions(src: Path, dst: Path, *, layout: FolderLayout = "mistral") -> None:
    """Give the folder `dst` the tokenizer and the other companions of the model `src`.

    In the layout "hf" that includes a tokenizer which transformers can read.
    """
    is_folder, has_tokenizer = src.is_dir(), False
    for pattern in (*TOKENIZERS, *OTHERS) if is_folder else ():
        for file in src.glob(pattern):
            shutil.copyfile(file, dst / file.name)
            has_tokenizer |= pattern in TOKENIZERS
    if not is_folder:
        has_tokenizer = "tokenizer.ggml.model" in read_metadata(src)
    if not has_tokenizer:
        return
    tokenizer = load_tokenizer(src)
    if layout == "mistral" and not [*dst.glob("tekken.json"), *dst.glob("tokenizer.model*")]:
        warnings.warn(f"{src}: has no tekken.json, which Mistral's tools need", stacklevel=2)
    if not is_folder or (layout == "hf" and not (dst / "tokenizer.json").exists()):
        save_huggingface(tokenizer, dst)
    if not (dst / "generation_config.json").exists():
        eos = read_generation_config(src).get("eos_token_ids", [tokenizer.eos_id])
        config = {"bos_token_id": tokenizer.bos_id, "eos_token_id": eos}
        write_json(dst / "generation_config.json", config)


def take_over_companions(adapter: Path, dst: Path, *, layout: FolderLayout, rows: int) -> None:
    """Give a merged model the tokenizer and template that its adapter was trained with.

    A tokenizer or template that lies beside the adapter takes the place of the model's.

    Raises:
        CheckpointError: it has tokens that none of the model's `rows` stands for, or is another
            vocabulary.
    """
    own = load_tokenizer(dst) if tokenizer_file(dst) else None
    difference = own and difference_beside(adapter, own)
    if own is not None and difference is None:
        return
    if tokenizer_file(adapter) is not None:
        if (n_tokens := load_tokenizer(adapter).vocab_size) > rows:
            raise CheckpointError(
                f"{adapter}: its tokenizer has {n_tokens:,} tokens, and the model {rows:,} rows"
            )
        for pattern in (*TOKENIZERS, *OTHERS[:4]):
            for file in dst.glob(pattern):
                file.unlink()
        copy_companions(adapter, dst, layout=layout)
    elif (template := read_chat_template(adapter)) is not None:
        for file in dst.glob("chat_template.*"):
            file.unlink()
        (dst / "chat_template.jinja").write_text(template, encoding="utf-8")
