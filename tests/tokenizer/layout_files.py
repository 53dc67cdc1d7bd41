"""A tokenizer file of every chat layout, for tests that compare layouts with mistral-common.

mistral-common brings no Tekken file later than v3. Those of v7 to v15 are the first tokens of its
v3 file, with the version and the names of control tokens that mistral-common knows for it.
"""

import importlib.resources
import json
import tempfile
from functools import lru_cache
from pathlib import Path

from mistral_common.tokens.tokenizers.base import SpecialTokens

from opennemo.tokenizer.tekken import V3_SPECIAL_TOKENS

DATA = Path(str(importlib.resources.files("mistral_common"))) / "data"
FILES = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v3-tekken": "tekken_240718.json",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
}
LATER = ("v7-tekken", "v11-tekken", "v13-tekken", "v15-tekken")
VERSIONS = (*FILES, *LATER)
N_TOKENS = 20_000  # enough for runs of bytes that cross the edges of texts; quick to load
SETTINGS = {
    "reasoning_effort": {
        "type": "enum", "accepts_none": True, "default": "none", "values": ["none", "high"],
    },
    "json_schema": {"type": "json_schema", "accepts_none": False, "default": None},
}  # fmt: skip


def content_of(version: str) -> dict:
    """The content of a `tekken.json` of a later version."""
    content = json.loads((DATA / "tekken_240911.json").read_bytes())
    names = [*V3_SPECIAL_TOKENS]
    names += [token.value for token in SpecialTokens if token.value not in names]
    del content["image"]
    content["vocab"] = content["vocab"][:N_TOKENS]
    content["config"] |= {"version": version.removesuffix("-tekken")}
    content["config"] |= {"default_vocab_size": 1000 + N_TOKENS, "num_vocab_tokens": N_TOKENS}
    content["special_tokens"] = [
        {"rank": id, "token_str": name, "is_control": True} for id, name in enumerate(names)
    ]
    if version == "v15-tekken":
        content["model_settings_builder"] = SETTINGS
    return content


@lru_cache
def tokenizer_file(version: str) -> Path:
    if version in FILES:
        return DATA / FILES[version]
    path = Path(_folder().name, version, "tekken.json")
    path.parent.mkdir()
    path.write_text(json.dumps(content_of(version)))
    return path


@lru_cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="opennemo-layouts-")
