"""tekken.json: files that are what they say, and nothing else."""

import base64
import importlib.resources
import json
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from opennemo.errors import CheckpointError
from opennemo.tokenizer import tekken
from opennemo.tokenizer.load import load_tokenizer
from opennemo.tokenizer.patterns import PATTERNS
from opennemo.tokenizer.tekken import SINGLE_BYTES, Tekken

DATA = Path(str(importlib.resources.files("mistral_common"))) / "data"
NEMO = DATA / "tekken_240718.json"
WORDS = [b"th", b"the", b" the", b"\n\n", "é".encode()]
SMALL = Tekken(PATTERNS["tekken"], [*SINGLE_BYTES, *WORDS])


@pytest.fixture(scope="module")
def nemo() -> Tekken:
    return Tekken.load(NEMO)


def test_a_file_comes_back(texts: SimpleNamespace, tmp_path: Path, nemo: Tekken):
    nemo.save(tmp_path / "tekken.json")
    again = load_tokenizer(tmp_path)
    assert isinstance(again, Tekken)
    assert vars_of(again) == vars_of(nemo)
    theirs = Tekkenizer.from_file(tmp_path / "tekken.json")
    for text in texts.sentences:
        assert again.encode(text) == nemo.encode(text) == theirs.encode(text, bos=False, eos=False)


@pytest.mark.parametrize(
    ("version", "special"),
    [
        ("v3", tekken.V3_SPECIAL_TOKENS),
        ("v7", tekken.V3_SPECIAL_TOKENS),
        ("v3", ("<s>", "</s>", "<mine>")),
        ("v11", (*tekken.V3_SPECIAL_TOKENS, "[ARGS]", "[CALL_ID]")),
        ("v13", tekken.V3_SPECIAL_TOKENS),
    ],
)
def test_versions(tmp_path: Path, version: str, special: tuple[str, ...]):
    tokenizer = Tekken(
        PATTERNS["tekken"], [*SINGLE_BYTES, *WORDS], version=version, special_tokens=special
    )
    tokenizer.save(tmp_path / "tekken.json")
    again, theirs = (
        Tekken.load(tmp_path / "tekken.json"),
        Tekkenizer.from_file(tmp_path / "tekken.json"),
    )
    assert vars_of(again) == vars_of(tokenizer)
    assert again.instruct_version == f"{version}-tekken"
    assert again.vocab_size == theirs.n_words == 1000 + 256 + len(WORDS)
    for name, id in again.control.items():
        assert theirs.get_special_token(name) == id
    ids = again.encode("the  the\n\né")
    assert ids == theirs.encode("the  the\n\né", bos=False, eos=False)


def content(**config: object) -> dict:
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for rank, token in enumerate([*SINGLE_BYTES, *WORDS])
    ]
    sizes = {"default_vocab_size": 1261, "default_num_special_tokens": 1000}
    return {
        "config": {"pattern": PATTERNS["tekken"], "version": "v3", **sizes, **config},
        "vocab": vocab,
    }


def with_entry(place: int, **changes: object) -> dict:
    damaged = content()
    damaged["vocab"][place] |= changes
    return damaged


def without(*path: str | int) -> dict:
    damaged = parent = content()
    for key in path[:-1]:
        parent = parent[key]
    del parent[path[-1]]
    return damaged


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (b"", "it is not JSON"),
        (b"\0" * 10_000, "it is not JSON"),
        (b"\xff\xfe{", "it is not JSON"),
        (b"[" * 200_000, "nested too deeply"),
        (b"[1, 2]", "not laid out as one"),
        (b'{"config": 5, "vocab": 5}', "not laid out as one"),
        (without("vocab"), "key 'vocab' is missing"),
        (without("config", "pattern"), "key 'pattern' is missing"),
        (without("vocab", 257), "it says 261 tokens, but has 260"),
        (
            content(default_vocab_size=1260) | {"vocab": without("vocab", 257)["vocab"]},
            "rank 257 is",
        ),
        (without("vocab", 258, "token_bytes"), "key 'token_bytes' is missing"),
        (with_entry(258, token_bytes="dGg="), "token 256 is token 258 again"),
        (with_entry(258, token_bytes=""), "token 258 is empty"),
        (with_entry(258, token_bytes="?!"), "token 258 is not base64"),
        (with_entry(258, token_bytes=5), "not laid out as one"),
        (with_entry(3, token_bytes="dGg="), "first 256 tokens are not the single bytes"),
        (with_entry(258, rank="x"), "rank 258 is missing"),
        (content(pattern="(a"), "Parsing error"),
        (content(pattern=None), "must be strings"),
        (content(version="v11"), "v11 must list its special_tokens"),
        (content(default_num_special_tokens="many"), "not laid out as one"),
        (content(default_num_special_tokens=10**12, default_vocab_size=10**12 + 261), "20 special"),
        (
            content(default_num_special_tokens=5, default_vocab_size=266),
            "20 special tokens for 5 ids",
        ),
        (content() | {"special_tokens": [{"rank": 1, "token_str": "<s>"}]}, "not 0, 1, 2"),
        (content() | {"special_tokens": [{"rank": 0, "token_str": "<s>"}]}, "lack <s> or </s>"),
    ],
)
def test_a_damaged_file_is_one_clear_line(tmp_path: Path, damaged: dict | bytes, message: str):
    file = tmp_path / "tekken.json"
    file.write_bytes(damaged if isinstance(damaged, bytes) else json.dumps(damaged).encode())
    with pytest.raises(CheckpointError) as caught:
        Tekken.load(file)
    assert str(file) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(CheckpointError, match="No such file"):
        Tekken.load(tmp_path / "tekken.json")
    with pytest.raises(CheckpointError, match="directory"):
        Tekken.load(tmp_path)
    with (tmp_path / "tekken.json").open("wb") as file:
        file.truncate(2 << 30)  # two gigabytes of zeros, which take no room
    with pytest.raises(CheckpointError, match="2,147,483,648 bytes are too many"):
        Tekken.load(tmp_path / "tekken.json")


def test_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tekken, "MIN_CACHED_BYTES", 0)
    file = tmp_path / "tekken.json"
    SMALL.save(file)
    content = file.read_bytes()
    first = Tekken.load(file)
    (cache,) = (tmp_path / "cache/opennemo").iterdir()

    # The cache is used: the file could not be read any more.
    status = file.stat()
    with file.open("r+b") as damaged:
        damaged.write(b"?")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert vars_of(Tekken.load(file)) == vars_of(first)

    # It is not used for a file that has changed, nor if a byte of it has.
    os.utime(file)
    with pytest.raises(CheckpointError, match="not JSON"):
        Tekken.load(file)
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    whole = cache.read_bytes()
    for damaged in (b"", whole[:-1], whole[:40], whole[:999] + b"??" + whole[1001:], whole + b"?"):
        cache.write_bytes(damaged)
        assert vars_of(Tekken.load(file)) == vars_of(first)
        assert cache.read_bytes() == whole


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert Tekken.load(NEMO).encode("Hi") == [37133]


def vars_of(tokenizer: Tekken) -> tuple:
    names = ("tokens", "control", "pattern", "version", "special_tokens", "n_special", "vocab_size")
    return tuple(map(partial(getattr, tokenizer), names))
