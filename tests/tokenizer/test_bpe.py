"""Byte pairs: the ids of mistral-common, tiktoken and the plain definition, for any text."""

import base64
import copy
import importlib.resources
import json
import os
import subprocess
import sys
import unicodedata
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from opennemo.tokenizer.bpe import MAX_BLANKS, encode_plainly
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
def fast() -> Tekken:
    """NeMo's tokenizer once a corpus is expected."""
    tokenizer = Tekken.load(NEMO)
    tokenizer.expect_corpus()
    return tokenizer


@pytest.fixture(scope="module", params=["prompts", "corpora"])
def nemo(request: pytest.FixtureRequest, fast: Tekken) -> Tekken:
    return fast if request.param == "corpora" else Tekken.load(NEMO)


def same(nemo: Tekken, oracle: tiktoken.Encoding, texts: Iterable[str]) -> None:
    texts = list(texts)
    expected = [[rank + 1000 for rank in oracle.encode_ordinary(text)] for text in texts]
    assert [nemo.encode(text) for text in texts] == expected
    if nemo.fastokens is None:
        return  # `encode_batch` would build it
    assert [ids.tolist() for ids in nemo.encode_batch(texts)] == expected
    assert nemo.encode_batch([]) == []


def test_both_libraries_are_tried(fast: Tekken):
    assert fast.fastokens is not None, "fastokens did not build, or its probe failed"


def test_no_prompt_pays_for_the_corpus_encoder():
    """It takes a second to build: only callers that expect a corpus wait for it."""
    tokenizer = Tekken.load(NEMO)
    tokenizer.encode("the cat and the hat\n" * 100_000)
    assert tokenizer.fastokens is None


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


def test_large_batches_are_shared_out(texts: SimpleNamespace, fast: Tekken):
    many = [*texts.random(5000, seed=6), "long " * 400_000, "\ud800", ""] * 2
    expected = [fast.encode(text) for text in many]
    assert [ids.tolist() for ids in fast.encode_batch(many)] == expected
    if hasattr(os, "fork"):
        # Data loaders fork; the threads of the pool are not in the child.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            same = [ids.tolist() for ids in fast.encode_batch(many)] == expected
            os._exit(0 if same else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_random_unicode(texts: SimpleNamespace, nemo: Tekken, oracle: tiktoken.Encoding):
    same(nemo, oracle, texts.random(10_000, seed=2))


@pytest.mark.slow
def test_much_random_unicode(texts: SimpleNamespace, fast: Tekken, oracle: tiktoken.Encoding):
    for seed in range(10):
        same(fast, oracle, texts.random(20_000, seed=100 + seed))


@pytest.mark.slow
def test_every_code_point(fast: Tekken, oracle: tiktoken.Encoding):
    """In words, after blanks, before marks: where the properties of a character decide."""
    for low in range(0, 0x110000, 0x400):
        if not 0xD800 <= low < 0xE000:
            points = map(chr, range(low, low + 0x400))
            same(fast, oracle, [f"aB{c}cD {c}{c}1  {c}\n!{c}\u0301{c}'s" for c in points])


@given(st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back(text: str):
    assert SMALL.decode(SMALL.encode(text)) == text


def test_each_entry_of_the_vocabulary_by_itself(nemo: Tekken, oracle: tiktoken.Encoding):
    whole = [text for token in nemo.tokens if (text := _text(token)) is not None]
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


def test_the_plain_definition(texts: SimpleNamespace, fast: Tekken):
    ranks = {token: rank for rank, token in enumerate(fast.tokens)}
    for text in [*texts.sentences, *texts.random(300, seed=3)]:
        ids = [rank + 1000 for rank in encode_plainly(text, fast.pattern, ranks)]
        # `regex` may know newer characters than the two libraries.
        if ids != fast.encode(text):
            assert any(unicodedata.category(c) == "Cn" for c in text)


@pytest.mark.parametrize("text", ["a", " ", "\t", "\n", "7", "\u0301", "你", "aB", "!", "\u00a0"])
def test_a_million_of_one_character(text: str, fast: Tekken):
    run = text * (1_000_000 // len(text))
    assert fast.decode(fast.encode(run)) == run


@pytest.mark.parametrize("blank", [" ", "\t", "\n", "\u00a0", " \t\n\r"])
def test_a_million_blanks_at_once(blank: str, fast: Tekken):
    """tiktoken alone would panic."""
    first, run = small(), blank * (MAX_BLANKS // len(blank) + 1)
    later = small()
    later.expect_corpus()
    for text in (run, f"x){run}", f"\ud800 é{run}/y 1\n  \n the"):
        assert first.encode(text) == later.encode(text)
    assert Tekken.load(NEMO).encode(run) == fast.encode(run)


LONG_RUN = """
import os, threading
threading.Timer(60, lambda: os._exit(3)).start()
from opennemo.tokenizer.rank_files import own_tokenizer
tokenizer = own_tokenizer()
tokenizer.expect_corpus()
assert "FASTOKENS_BPE_THREADS" not in os.environ
text = "\ufffd é" + "\\n" * 100_000 + "/y 1\\n  \\n the"
assert tokenizer.encode(text) == tokenizer.encode_prompt(text)
os._exit(0)
"""


def test_fastokens_starts_no_threads_of_its_own():
    """They would never come back from so many newlines (0.3.5)."""
    pytest.importorskip("fastokens", reason="there is no fastokens for this platform")
    environ = {k: v for k, v in os.environ.items() if k != "FASTOKENS_BPE_THREADS"}
    assert subprocess.run([sys.executable, "-c", LONG_RUN], env=environ).returncode == 0


def test_without_fastokens(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "fastokens", None)
    tokenizer = small()
    run = "the é" + " " * 1_000_000
    assert tokenizer.decode(tokenizer.encode(run)) == run
    assert tokenizer.encode_batch([run])[0].tolist() == tokenizer.encode(run)
    assert tokenizer.encode_batch([""])[0].tolist() == []
    assert tokenizer.fastokens is None


def test_a_library_that_disagrees_is_not_used(monkeypatch: pytest.MonkeyPatch):
    flat = (b"\1\0\0\0", b"\0" * 8 + b"\1" + b"\0" * 7)  # token 1, for any text
    wrong = SimpleNamespace(encode_batch_flat=lambda texts: flat)
    factory = SimpleNamespace(from_tiktoken=lambda *args, **kwargs: wrong)
    monkeypatch.setitem(sys.modules, "fastokens", SimpleNamespace(Tokenizer=factory))
    tokenizer = small()
    expected = tokenizer.encode("the cat")
    assert tokenizer.encode_batch(["the cat"])[0].tolist() == expected
    assert tokenizer.fastokens is None


def test_a_copy_builds_its_own(fast: Tekken):
    """What another process gets: the vocabulary, without threads or tables of a library."""
    twin = copy.deepcopy(fast)
    assert twin.fastokens is None
    text = "the cat and the hat é 🦙"
    assert twin.encode(text) == fast.encode(text) == twin.encode_batch([text])[0].tolist()


def test_parts_that_no_merge_reaches():
    """Such a token stands for a whole piece of text and nothing else, as in tiktoken."""
    tokenizer = Tekken(PATTERNS["tekken"], [*SINGLE_BYTES, b"abcd"])
    for _ in range(2):
        assert [len(tokenizer.encode(text)) for text in ("abcd", "abcde", " abcd")] == [1, 5, 5]
        assert tokenizer.encode_batch(["abcd"])[0].tolist() == [1256]
    ranks = {token: rank for rank, token in enumerate(tokenizer.tokens)}
    assert encode_plainly("abcd abcd", PATTERNS["tekken"], ranks) == [256, 32, 97, 98, 99, 100]


def _text(token: bytes) -> str | None:
    try:
        return token.decode()
    except UnicodeDecodeError:
        return None
