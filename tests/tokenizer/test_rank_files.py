"""Vocabularies as files of ranks, and the one that the package brings."""

import base64
from importlib.resources import files
from pathlib import Path

import pytest
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from opennemo.errors import CheckpointError
from opennemo.tokenizer.load import open_tokenizer
from opennemo.tokenizer.patterns import PATTERN_OF_RANKS
from opennemo.tokenizer.rank_files import OWN, RankFile, pack
from opennemo.tokenizer.tekken import SINGLE_BYTES, Tekken


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of as many ranks as GPT-2 has, though not its own."""
    n = next(iter(PATTERN_OF_RANKS))
    tokens = [*SINGLE_BYTES, b" lo", b" low", *(b"%06d" % i for i in range(n - 258))]
    lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    file = tmp_path_factory.mktemp("ranks") / "tokenizer.model"
    file.write_bytes(b"".join(lines))
    return file


def test_a_file_of_ranks_is_known_by_its_content(ranks: Path):
    tokenizer = open_tokenizer(ranks)
    assert isinstance(tokenizer, RankFile)
    ids = tokenizer.encode(" low é")
    assert ids == [257, 32, *"é".encode()]
    assert tokenizer.decode(ids) == " low é"


def test_an_unknown_number_of_ranks_is_an_error(tmp_path: Path):
    file = tmp_path / "small.tiktoken"
    file.write_bytes(b"YQ== 0\nYg== 1\n")
    with pytest.raises(CheckpointError, match="2 ranks, so its split pattern is unknown"):
        open_tokenizer(file)
    file.write_bytes(b"YQ== 0\n*** *** ***\n")
    with pytest.raises(CheckpointError, match="not a tiktoken file"):
        open_tokenizer(file)


def test_the_vocabulary_that_comes_with_the_package(tmp_path: Path):
    own = open_tokenizer(Path(OWN))
    assert isinstance(own, Tekken)
    assert own.vocab_size == 32_768
    text = "Всі люди народжуються вільними — 人人生而自由,在尊严和权利上一律平等。 def f(x): return 42 🦙"  # noqa: E501, RUF001
    assert own.decode(own.encode(text)) == text
    assert pack(own.tokens) == files("opennemo.tokenizer").joinpath(
        "data", f"{OWN}.tiktoken.gz"
    ).read_bytes()  # fmt: skip
    own.save(tmp_path / "tekken.json")
    mistral = Tekkenizer.from_file(str(tmp_path / "tekken.json"))
    assert mistral.encode(text, bos=False, eos=False) == own.encode(text)
