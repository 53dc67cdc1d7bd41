"""A byte vocabulary, shards of Python's own documentation, and runs that take seconds."""

import json
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest

from opennemo.tokenizer.tekken import SINGLE_BYTES, Tekken
from opennemo.train.config import Recipe, parse_recipe
from opennemo.train.corpus import ShardWriter, describe_tokenizer

BYTES = Tekken(r"(?s:.)", SINGLE_BYTES, n_special=64)  # one token a byte: 320 ids


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    BYTES.save(folder / "tekken.json")
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Paragraphs about Python, every tenth one held out."""
    paragraphs = "\n\n".join(topics.values()).split("\n\n")
    texts = [text for text in paragraphs if len(text) > 200][:400]
    found = {}
    for name, part in (
        ("valid", texts[::10]),
        ("train", [t for i, t in enumerate(texts) if i % 10]),
    ):
        folder = tmp_path_factory.mktemp(name)
        writer = ShardWriter(folder, describe_tokenizer(BYTES, "bytes"))
        documents = [[BYTES.bos_id, *BYTES.encode(text), BYTES.eos_id] for text in part]
        ids = np.concatenate([np.array(d, np.uint32) for d in documents])
        ends = np.cumsum([len(d) for d in documents])
        writer.add(ids, ends, np.array([len(t.encode()) for t in part]))
        writer.finish()
        found[name] = folder
    return found


QUESTIONS = ["red", "green", "blue", "warm", "cold", "loud", "quiet", "near", "far", "old", "new"]


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations that a tiny model can learn: it is asked for a word, and says it twice."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"Say {word} {n}"},
                {"role": "assistant", "content": f"{word} {word} {n}"},
            ]
        }
        for word in QUESTIONS
        for n in range(4)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    lines = [
        {
            "messages": [{"role": "user", "content": f"Is it {word}?"}],
            "chosen": {"role": "assistant", "content": f"yes, {word}"},
            "rejected": {"role": "assistant", "content": f"no, not {word}"},
        }
        for word in QUESTIONS
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def make_recipe(
    tokenizer_folder: Path, shards: dict[str, Path], chats: Path, pairs: Path
) -> MakeRecipe:
    """A recipe for a tiny model: `make_recipe("chat", steps=4, optim={"lr": 0.1})`."""

    def make(objective: str = "text", **changes: Any) -> Recipe:
        texts = objective in ("text", "distil")
        source = {"chat": chats, "preference": pairs}.get(objective)
        train, valid = (shards["train"], shards["valid"]) if texts else (source, source)
        tree: dict[str, Any] = {
            "objective": objective,
            "steps": 6,
            "device": "cpu",
            "model": {"shape": "tiny", "tokenizer": str(tokenizer_folder)},
            "data": {
                "train": [{"path": str(train)}], "valid": [{"path": str(valid)}],
                "window": 128, "rows": 2, "micro_rows": 1, "valid_rows": 8,
            },
            "optim": {"lr": 3e-3, "warmup": 0.1},
            "saving": {"every": 2},
            "evaluation": {"every": 3},
        }  # fmt: skip
        for key, value in changes.items():
            if isinstance(value, dict) and isinstance(tree.get(key), dict):
                tree[key] = {**tree[key], **value}
            else:
                tree[key] = value
        return parse_recipe(tree, "test")

    return make


@pytest.fixture
def recipe_file(tmp_path, shards, tokenizer_folder) -> Path:
    """A recipe of 30 short steps, for runs in processes of their own."""
    path = tmp_path / "recipe.toml"
    path.write_text(
        f"""
        steps = 30
        device = "cpu"
        model = {{ shape = "tiny", tokenizer = "{tokenizer_folder}" }}
        saving = {{ every = 5 }}
        [data]
        train = [{{ path = "{shards["train"]}" }}]
        window = 256
        rows = 8
        micro_rows = 1
        """
    )
    return path
