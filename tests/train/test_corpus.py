"""Windows of a mixture are arithmetic on their number, and damaged shards are refused."""

import json
import pickle
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opennemo.errors import CheckpointError, InvalidRequest, OpenNemoError
from opennemo.tokenizer.rank_files import OWN, own_tokenizer
from opennemo.tokenizer.saving import save_huggingface
from opennemo.tokenizer.tekken import SINGLE_BYTES, Tekken
from opennemo.train.corpus import Corpus, ShardWriter, tokenizer_hash, vocabulary_hash

TOKENIZER = {"name": "test", "hash": "ab" * 32, "vocab_size": 1 << 20, "bos_id": 1, "eos_id": 2}


def write(
    folder: Path, lengths: Sequence[int], *, shard_tokens: int = 64, first: int = 0, **changes: str
) -> np.ndarray:
    """Documents of these lengths whose tokens count up from `first`; returns where each ends."""
    folder.mkdir(parents=True, exist_ok=True)
    ends = np.cumsum(lengths)
    ids = np.arange(first, first + ends[-1], dtype=np.uint32)
    writer = ShardWriter(folder, TOKENIZER | changes, shard_tokens=shard_tokens)
    writer.add(ids, ends, np.full(len(ends), 7))
    writer.finish()
    return ends


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """1,000-odd tokens in documents of 1 to 40, and one that is longer than a shard."""
    folder = tmp_path_factory.mktemp("shards")
    lengths = [*np.random.default_rng(0).integers(1, 41, 50), 150, 3, 1, 1]
    return folder, write(folder, [int(n) for n in lengths])


def test_each_epoch_shows_every_window_once_cut_at_documents(documents: tuple[Path, np.ndarray]):
    folder, ends = documents
    corpus = Corpus([folder], window=16, seed=3)
    n_windows, left_over = divmod(corpus.n_tokens, 16)
    assert corpus.n_tokens == ends[-1]
    orders = []
    for epoch in range(3):
        windows = [corpus[i] for i in range(epoch * n_windows, (epoch + 1) * n_windows)]
        orders.append([int(ids[0]) for ids, _ in windows])
        assert orders[-1] != sorted(orders[-1])
        starts = sorted(orders[-1])
        assert 0 <= starts[0] <= left_over
        assert np.diff(starts).tolist() == [16] * (n_windows - 1)
        for ids, lengths in windows:
            assert ids.dtype == np.uint32 and lengths.dtype == np.int64
            assert (ids == np.arange(ids[0], ids[0] + 16)).all()
            borders = ids[0] + np.cumsum(lengths)
            inside = [int(end) for end in ends if ids[0] < end < ids[0] + 16]
            assert borders.tolist() == [*inside, int(ids[0]) + 16]
    assert len({tuple(order) for order in orders}) == 3
    assert len({min(order) for order in orders}) > 1, "the cuts never move"


def test_a_window_depends_on_its_number_and_the_seed_alone(documents: tuple[Path, np.ndarray]):
    sources = [documents[0]]
    first = [Corpus(sources, window=16, seed=3)[i][0].tolist() for i in range(200)]
    corpus = Corpus(sources, window=16, seed=3)
    assert [corpus[i][0].tolist() for i in reversed(range(200))] == first[::-1]
    packed = pickle.dumps(corpus)
    assert len(packed) < 2000, "data travel to another process"
    elsewhere: Corpus = pickle.loads(packed)  # noqa: S301  our own bytes
    assert [elsewhere[i][0].tolist() for i in (5, 150)] == [first[5], first[150]]
    other = Corpus(sources, window=16, seed=4)
    assert [other[i][0].tolist() for i in range(200)] != first


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four sources of one window each, whose first token says which it is."""
    folder = tmp_path_factory.mktemp("mixture")
    for i in range(4):
        write(folder / str(i), [1], first=i)
    return [folder / str(i) for i in range(4)]


@given(
    weights=st.lists(st.floats(0.001, 1000), min_size=1, max_size=4),
    begin=st.integers(0, 10**12),
    n=st.integers(1, 300),
)
def test_every_stretch_of_a_mixture_keeps_its_shares(
    folders: list[Path], weights: list[float], begin: int, n: int
):
    corpus = Corpus(folders[: len(weights)], window=1, seed=0, weights=weights)
    counts = Counter(int(corpus[i][0][0]) for i in range(begin, begin + n))
    for source, weight in enumerate(weights):
        assert abs(counts[source] - n * weight / sum(weights)) <= source + 1


def test_orders_are_as_good_as_random(tmp_path: Path):
    """Over 3,000 epochs each of 5 windows stands about equally often at each place."""
    write(tmp_path, [5])
    corpus = Corpus([tmp_path], window=1, seed=0)
    places = Counter((i % 5, int(corpus[i][0][0])) for i in range(15_000))
    assert len(places) == 25
    assert all(480 < n < 720 for n in places.values()), places  # 600, and five deviations


def test_describe_says_how_long_an_epoch_is(tmp_path: Path):
    write(tmp_path / "a", [10, 20, 70])
    write(tmp_path / "b", [50])
    folders = [tmp_path / "a", tmp_path / "b"]
    described = Corpus(folders, window=10, seed=5, weights=[3, 1]).describe()
    a, b = described["sources"]
    assert (a["share"], a["tokens"], a["documents"]) == (0.75, 100, 3)
    assert a["windows_an_epoch"] == pytest.approx(10 / 0.75)
    assert b["windows_an_epoch"] == pytest.approx(5 / 0.25)
    assert json.loads(json.dumps(described)) == described


def test_shards_do_not_depend_on_how_documents_come(tmp_path: Path):
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 30, 40)
    write(tmp_path / "whole", [int(n) for n in lengths])
    (tmp_path / "parts").mkdir()
    writer = ShardWriter(tmp_path / "parts", TOKENIZER, shard_tokens=64)
    for begin, end in ((0, 1), (1, 1), (1, 17), (17, 40)):
        before, ends = lengths[:begin].sum(), np.cumsum(lengths[begin:end])
        ids = np.arange(before, before + lengths[begin:end].sum(), dtype=np.uint32)
        writer.add(ids, ends, np.full(len(ends), 7))
    index = writer.finish()
    assert len(index["shards"]) > 5 and index["text_bytes"] == 280
    assert all(shard["tokens"] <= 64 for shard in index["shards"])
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "parts").iterdir())
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_a_vocabulary_has_one_hash_in_any_layout(tmp_path: Path):
    tokenizer = own_tokenizer()
    tokenizer.save(tmp_path / "tekken.json")
    (tmp_path / "hf").mkdir()
    save_huggingface(tokenizer, tmp_path / "hf")
    expected = vocabulary_hash(tokenizer)
    assert tokenizer_hash(Path(OWN)) == expected
    assert tokenizer_hash(tmp_path) == expected
    assert tokenizer_hash(tmp_path / "hf") == expected
    others = [
        Tekken(tokenizer.pattern, tokens, special_tokens=special)
        for tokens, special in (
            ([*SINGLE_BYTES, b"ab", b"abc"], ["<s>", "</s>"]),
            ([*SINGLE_BYTES, b"aba", b"bc"], ["<s>", "</s>"]),
            ([*SINGLE_BYTES, b"ab", b"abc"], ["</s>", "<s>"]),
        )
    ]
    assert len({expected, *map(vocabulary_hash, others)}) == 4


def test_what_is_wrong_with_a_folder_is_said_in_one_line(tmp_path: Path):
    good = tmp_path / "good"
    write(good, [100, 30], shard_tokens=100)
    file = good / "00001.ids"
    assert file.exists()

    def refusal(error: type[OpenNemoError], *folders: Path, **options: object) -> str:
        with pytest.raises(error) as caught:
            Corpus(folders or [good], **({"window": 8, "seed": 0} | options))  # pyright: ignore[reportArgumentType]
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "index.json is missing" in refusal(CheckpointError, tmp_path / "none")
    said = refusal(CheckpointError, tokenizer_hash="cd" * 32)
    assert "abababababab" in said and "cdcdcdcdcdcd" in said
    write(tmp_path / "other", [9], hash="ef" * 32)
    said = refusal(CheckpointError, good, tmp_path / "other")
    assert "abababababab" in said and "efefefefefef" in said and "other" in said
    assert "130 tokens" in refusal(InvalidRequest, window=131)
    assert "window is 0" in refusal(InvalidRequest, window=0)
    for weight in (0, -1, float("nan"), float("inf")):
        assert "weight" in refusal(InvalidRequest, weights=[weight])
    with pytest.raises(InvalidRequest, match="at least one source"):
        Corpus([], window=8, seed=0)
    with pytest.raises(IndexError):
        Corpus([good], window=8, seed=0)[-1]

    content = file.read_bytes()
    Corpus([good], window=8, seed=0, verify=True)
    file.write_bytes(content[:-1] + b"\x01")
    Corpus([good], window=8, seed=0)  # looks at sizes alone
    assert "00001.ids: damaged, its SHA-256" in refusal(CheckpointError, verify=True)
    file.write_bytes(content[:-4])
    assert "00001.ids: 116 bytes, but the index says 120" in refusal(CheckpointError)
    file.unlink()
    assert "00001.ids is missing" in refusal(CheckpointError)
    file.write_bytes(content)
    index = (good / "index.json").read_text()
    for old, new, said in (
        ('"tokens": 130', '"tokens": 131', "do not end where"),
        ('"documents"', '"papers"', "damaged"),
        ("shards 1", "shards 2", "format"),
        ("{", "", "damaged"),
    ):
        (good / "index.json").write_text(index.replace(old, new))
        assert said in refusal(CheckpointError)
