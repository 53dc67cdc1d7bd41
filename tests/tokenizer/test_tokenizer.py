"""Decoding one id at a time gives the same text, and never half a character."""

import importlib.resources
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opennemo.tokenizer.load import load_tokenizer
from opennemo.tokenizer.saving import save_huggingface
from opennemo.tokenizer.tekken import Tekken
from opennemo.tokenizer.tokenizer import Tokenizer

DATA = Path(str(importlib.resources.files("mistral_common"))) / "data"
KINDS = ("tekken", "sentencepiece", "huggingface")


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory):
    @cache
    def loaded(kind: str) -> Tokenizer:
        if kind == "sentencepiece":
            return load_tokenizer(DATA / "mistral_instruct_tokenizer_240323.model.v3")
        tekken = Tekken.load(DATA / "tekken_240718.json")
        small = Tekken(tekken.pattern, tekken.tokens[:20_000])
        if kind == "tekken":
            return small
        folder = tmp_path_factory.mktemp("huggingface")
        save_huggingface(small, folder)
        return load_tokenizer(folder)

    return loaded


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*map(stream.push, ids), stream.flush()]


@pytest.mark.parametrize("kind", KINDS)
def test_any_ids(load, kind: str):
    tokenizer = load(kind)

    @given(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    @settings(max_examples=500, deadline=None)
    def check(ids: list[int]) -> None:
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_any_text(load, kind: str, texts: SimpleNamespace):
    tokenizer = load(kind)

    def check(text: str) -> None:
        ids = tokenizer.encode(text)
        pieces = streamed(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids) == text
        assert pieces[-1] == ""  # nothing was held back for longer than needed
        # What has come so far is always a beginning of the text.
        for n in range(len(pieces)):
            assert text.startswith("".join(pieces[:n]))

    # SentencePiece writes spaces as "▁", and so cannot tell the two apart.
    given(st.text().filter(lambda text: "▁" not in text))(
        settings(max_examples=300, deadline=None)(check)
    )()
    for text in texts.sentences:
        check(text)


@pytest.mark.parametrize("kind", KINDS)
def test_a_character_that_never_becomes_whole(load, kind: str):
    tokenizer = load(kind)
    ids = tokenizer.encode("🦙")
    assert len(ids) > 1
    assert streamed(tokenizer, ids[:-1])[-1] == "\ufffd"
    assert "".join(streamed(tokenizer, [*ids[:-1], *tokenizer.encode("x")])).endswith(
        "\ufffd x"[-1]
    )
