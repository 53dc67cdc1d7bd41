"""Tekken: the ids of mistral-common and tiktoken for any text, and files that are what they say."""

import base64
import importlib.resources
import json
import os
import threading
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from opennemo.errors import CheckpointError
from opennemo.tokenizer import bpe, tekken
from opennemo.tokenizer.bpe import MANY_CHARS, MAX_BLANKS, encode_plainly
from opennemo.tokenizer.load import load_tokenizer
from opennemo.tokenizer.patterns import PATTERNS
from opennemo.tokenizer.tekken import SINGLE_BYTES, Tekken

DATA = Path(str(importlib.resources.files("mistral_common"))) / "data"
NEMO = DATA / "tekken_240718.json"
WORDS = [b"th", b"the", b" the", b"\n\n", "é".encode()]


def small() -> Tekken:
    return Tekken(PATTERNS["tekken"], [*SINGLE_BYTES, *WORDS])


SMALL = small()


@pytest.fixture(scope="module")
def oracle() -> tiktoken.Encoding:
    content = json.loads(NEMO.read_text("utf-8"))
    tokens = [base64.b64decode(entry["token_bytes"]) for entry in content["vocab"][:130_072]]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    pattern = content["config"]["pattern"]
    return tiktoken.Encoding("o", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


@pytest.fixture(scope="module")
def ready() -> Tekken:
    """NeMo's tokenizer as it is after a while, with fastokens built."""
    tokenizer = Tekken.load(NEMO)
    tokenizer.encode_batch([])
    return tokenizer


@pytest.fixture(scope="module", params=["at once", "after a while"])
def nemo(request: pytest.FixtureRequest, ready: Tekken) -> Iterator[Tekken]:
    if request.param == "after a while":
        yield ready
    else:
        # Without the second library, so that no test makes it start using it.
        tokenizer = Tekken.load(NEMO)
        tokenizer._bpe._may_build = False
        yield tokenizer


def same(nemo: Tekken, oracle: tiktoken.Encoding, texts: Iterable[str]) -> None:
    texts = list(texts)
    expected = [[rank + 1000 for rank in oracle.encode_ordinary(text)] for text in texts]
    assert [nemo.encode(text) for text in texts] == expected
    assert [ids.tolist() for ids in nemo.encode_batch(texts)] == expected
    assert nemo.encode_batch([]) == []


def test_both_libraries_are_tried(ready: Tekken):
    assert ready._bpe._fast is not None, "fastokens did not build, or its probe failed"


def test_whole_documents(texts: SimpleNamespace, nemo: Tekken, oracle: tiktoken.Encoding):
    same(nemo, oracle, texts.documents())


def test_mistral_common_agrees(texts: SimpleNamespace, nemo: Tekken):
    theirs = Tekkenizer.from_file(NEMO)
    assert (nemo.vocab_size, nemo.bos_id, nemo.eos_id) == (theirs.n_words, 1, 2)
    for text in [*texts.sentences, *texts.random(200, seed=1)]:
        ids = theirs.encode(text, bos=False, eos=False)
        assert nemo.encode(text) == ids
        assert nemo.decode(ids) == theirs.decode(ids) == text
    for name, id in nemo.control.items():
        assert theirs.get_special_token(name) == id


def test_large_batches_are_shared_out(texts: SimpleNamespace, ready: Tekken):
    many = [*texts.random(5000, seed=6), "long " * 400_000, "\ud800", ""] * 2
    expected = [ready.encode(text) for text in many]
    assert [ids.tolist() for ids in ready.encode_batch(many)] == expected
    if hasattr(os, "fork"):
        # Data loaders fork; the threads of the pool are not in the child.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            same = [ids.tolist() for ids in ready.encode_batch(many)] == expected
            os._exit(0 if same else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_random_unicode(texts: SimpleNamespace, nemo: Tekken, oracle: tiktoken.Encoding):
    same(nemo, oracle, texts.random(10_000, seed=2))


@pytest.mark.slow
def test_much_random_unicode(texts: SimpleNamespace, ready: Tekken, oracle: tiktoken.Encoding):
    for seed in range(10):
        same(ready, oracle, texts.random(20_000, seed=100 + seed))


@pytest.mark.slow
def test_every_code_point(ready: Tekken, oracle: tiktoken.Encoding):
    """In words, after blanks, before marks: where the properties of a character decide."""
    for low in range(0, 0x110000, 0x400):
        if not 0xD800 <= low < 0xE000:
            points = map(chr, range(low, low + 0x400))
            same(ready, oracle, [f"aB{c}cD {c}{c}1  {c}\n!{c}\u0301{c}'s" for c in points])


@given(st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back(text: str):
    assert SMALL.decode(SMALL.encode(text)) == text


def test_each_entry_of_the_vocabulary_by_itself(nemo: Tekken, oracle: tiktoken.Encoding):
    whole = [text for token in nemo.tokens if (text := tekken._text(token)) is not None]
    assert len(nemo.tokens) - len(whole) == 1435  # tokens that are parts of characters
    same(nemo, oracle, whole)
    for rank, token in enumerate(nemo.tokens):
        assert nemo.token_bytes(rank + 1000) == token


def test_control_tokens_cannot_be_typed(texts: SimpleNamespace, nemo: Tekken):
    for name in [*nemo.control, *texts.look_alikes]:
        for text in (name, f" {name}\n", f"a{name}b", name * 3):
            ids = nemo.encode(text)
            assert min(ids) >= 1000
            assert nemo.decode(ids) == text


def test_control_tokens_are_silent_unless_shown(nemo: Tekken):
    ids = [1, 3, *nemo.encode("Hi"), 4, 999]
    assert nemo.decode(ids) == "Hi"
    assert nemo.decode(ids, show_control=True) == "<s>[INST]Hi[/INST]<SPECIAL_999>"
    assert nemo.token_bytes(3) == b""
    for id in (-1, nemo.vocab_size):
        with pytest.raises(IndexError):
            nemo.decode([id])


def test_blanks(texts: SimpleNamespace, nemo: Tekken, oracle: tiktoken.Encoding):
    runs = [blank * n for blank in texts.blanks for n in (1, 2, 3, 15, 16, 17, 75, 76, 200)]
    same(
        nemo,
        oracle,
        [f"{a}{run}{b}" for run in runs for a in ("", "x") for b in ("", "y", "!", "1")],
    )


def test_lone_surrogates_are_repaired(nemo: Tekken, oracle: tiktoken.Encoding):
    broken = [
        "a\ud800b",
        "\udfff",
        "\ud83e\udd99 is a llama",
        "\udd99\ud83e",
        "x\ud800\ud800\udc00",
    ]
    same(nemo, oracle, broken)
    assert nemo.decode(nemo.encode(broken[0])) == "a\ufffdb"
    assert nemo.decode(nemo.encode(broken[2])) == "🦙 is a llama"


def test_the_plain_definition(texts: SimpleNamespace, ready: Tekken):
    ranks = {token: rank for rank, token in enumerate(ready.tokens)}
    for text in [*texts.sentences, *texts.random(300, seed=3)]:
        ids = [rank + 1000 for rank in encode_plainly(text, ready.pattern, ranks)]
        # `regex` may know newer characters than the two libraries.
        if ids != ready.encode(text):
            assert any(unicodedata.category(c) == "Cn" for c in text)


@pytest.mark.parametrize("text", ["a", " ", "\t", "\n", "7", "\u0301", "你", "aB", "!", "\u00a0"])
def test_a_million_of_one_character(text: str, ready: Tekken):
    run = text * (1_000_000 // len(text))
    assert ready.decode(ready.encode(run)) == run


@pytest.mark.parametrize("blank", [" ", "\t", "\n", "\u00a0", " \t\n\r"])
def test_a_million_blanks_at_once(blank: str, ready: Tekken):
    """tiktoken alone would panic, and the second library is not there for a first request."""
    first, run = small(), blank * (MAX_BLANKS // len(blank) + 1)
    later = small()
    later.encode_batch([])
    for text in (run, f"x){run}", f"\ud800 é{run}/y 1\n  \n the"):
        assert first.encode(text) == later.encode(text)
    assert Tekken.load(NEMO).encode(run) == ready.encode(run)


def test_without_the_second_library(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bpe, "fastokens", None)
    tokenizer = small()
    run = "the é" + " " * 1_000_000
    assert tokenizer.decode(tokenizer.encode(run)) == run
    assert tokenizer.encode_batch([run])[0].tolist() == tokenizer.encode(run)
    assert tokenizer.encode_batch([""])[0].tolist() == []


def test_who_encodes_a_lot_gets_the_second_library():
    tokenizer = small()
    text = "the cat and the hat\n\n" * 100
    ids = tokenizer.encode(text)
    for _ in range(MANY_CHARS // len(text) + 1):
        assert tokenizer.encode(text) == ids
    for thread in threading.enumerate():
        if thread.name == "build fastokens":
            thread.join()
    assert tokenizer._bpe._fast is not None
    assert tokenizer.encode(text) == ids


def test_a_library_that_disagrees_is_not_used(monkeypatch: pytest.MonkeyPatch):
    wrong = SimpleNamespace(encode_ordinary=lambda text: SimpleNamespace(ids=[1000] * len(text)))
    factory = SimpleNamespace(from_tiktoken=lambda *args, **kwargs: wrong)
    monkeypatch.setattr(bpe, "fastokens", SimpleNamespace(Tokenizer=factory))
    tokenizer = small()
    expected = tokenizer.encode("the cat")
    assert tokenizer.encode_batch(["the cat"])[0].tolist() == expected
    assert tokenizer._bpe._fast is None


def test_parts_that_no_merge_reaches():
    """Such a token stands for a whole piece of text and nothing else, as in tiktoken."""
    tokenizer = Tekken(PATTERNS["tekken"], [*SINGLE_BYTES, b"abcd"])
    for _ in range(2):
        assert [len(tokenizer.encode(text)) for text in ("abcd", "abcde", " abcd")] == [1, 5, 5]
        assert tokenizer.encode_batch(["abcd"])[0].tolist() == [1256]
    ranks = {token: rank for rank, token in enumerate(tokenizer.tokens)}
    assert encode_plainly("abcd abcd", PATTERNS["tekken"], ranks) == [256, 32, 97, 98, 99, 100]


def test_a_file_comes_back(texts: SimpleNamespace, tmp_path: Path, ready: Tekken):
    ready.save(tmp_path / "tekken.json")
    again = load_tokenizer(tmp_path)
    assert isinstance(again, Tekken)
    assert vars_of(again) == vars_of(ready)
    theirs = Tekkenizer.from_file(tmp_path / "tekken.json")
    for text in texts.sentences:
        assert again.encode(text) == ready.encode(text) == theirs.encode(text, bos=False, eos=False)


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
