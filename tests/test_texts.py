"""Texts are read from any common kind of file, and unreadable lines are counted."""

import gzip
from pathlib import Path

import pytest

from opennemo.errors import InvalidRequest
from opennemo.texts import Text, Texts, excerpts


def test_files_of_every_kind_and_their_languages(tmp_path: Path):
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "el.txt").write_text("γεια", encoding="utf-8")
    (tmp_path / "is.jsonl.gz").write_bytes(gzip.compress('{"text": "þetta"}\n'.encode()))
    rows = b'{"text": "uno", "lang": "es"}\n\n{"text": "dos", "iso": "ca"}\n{"text": "drei"}\n'
    (tmp_path / "mixed.part.jsonl.zst").write_bytes(zstandard.compress(rows))
    (tmp_path / "MANIFEST.json").write_text("{}")
    texts = Texts([tmp_path])
    expected = [("el", "γεια"), ("is", "þetta"), ("es", "uno"), ("ca", "dos"), ("mixed", "drei")]
    assert list(texts) == expected
    assert list(texts) == expected  # again from the beginning


def test_tables_and_what_their_rows_say(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = {
        "text": ["uno", None, "two", ""],
        "lang": ["es", "es", None, "en"],
        "license": ["CC0", None, None, None],
        "source": ["a", "b", "c", "d"],
        "score": [1.0, 2.0, 3.0, 4.0],
    }
    file = tmp_path / "en.part.parquet"
    parquet.write_table(pyarrow.table(rows), file, row_group_size=3)
    texts = Texts([tmp_path])
    assert list(texts) == [("es", "uno"), ("en", "two")]
    assert texts.n_broken == 1
    found = [(len(list(excerpt.texts())), n_read) for excerpt, n_read in excerpts(file)]
    assert [n for n, _ in found] == [3, 1]
    assert 0 < found[0][1] < found[1][1] <= texts.n_bytes
    assert list(next(excerpts(file))[0].texts()) == [
        Text("uno", "es", "a", "CC0"), None, Text("two", "", "c", "")
    ]  # fmt: skip
    parquet.write_table(pyarrow.table({"body": ["x"]}), file)
    with pytest.raises(InvalidRequest, match='no column "text" \\(there are body\\)'):
        list(texts)


def test_files_at_urls():
    fsspec = pytest.importorskip("fsspec")
    pytest.importorskip("pyarrow")
    memory = fsspec.filesystem("memory")
    memory.pipe("/corpus/is.jsonl.gz", gzip.compress(b'{"text": "x"}\n'))
    memory.pipe("/corpus/deep/fo.txt", b"y")
    memory.pipe("/corpus/README.rst", b"z")
    texts = Texts(["memory://corpus"])
    assert list(texts) == [("fo", "y"), ("is", "x")]
    assert list(Texts(["memory://corpus/is.jsonl.gz"])) == [("is", "x")]
    assert texts.n_bytes == memory.size("/corpus/is.jsonl.gz") + 1
    for url in ("memory://corpus/none.txt", "nonsense://a/b.txt"):
        with pytest.raises(InvalidRequest, match=url) as error:
            Texts([url])
        assert "\n" not in str(error.value)


def test_broken_lines_are_left_out_and_counted(tmp_path: Path):
    rows = [b'{"text": "a"}', b'{"text": "\xff"}', b"{", b"[]", b'{"text": 1}', b'{"text": "b"}']
    (tmp_path / "xx.jsonl").write_bytes(b"\n".join(rows))
    (tmp_path / "yy.txt").write_bytes(b"one\n\xc3\ntwo\n")
    texts = Texts([tmp_path])
    assert list(texts) == [("xx", "a"), ("xx", "b"), ("yy", "one\ntwo\n")]
    assert texts.n_broken == 5


def test_progress_reaches_the_size_of_the_files(tmp_path: Path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("word " * 1000)
    heard: list[int] = []
    texts = Texts([tmp_path])
    list(texts.read(heard.append))
    assert heard == sorted(heard)
    assert heard[-1] == texts.n_bytes == 10_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "no such file or folder"),
        ("text.docx", b"PK", "not a known type of text \\(.jsonl"),
        ("table.parquet", b"not parquet", "damaged"),
        ("text.txt.gz", b"not gzip", "damaged"),
        ("cut.txt.gz", gzip.compress(b"text" * 999, mtime=0)[:-9], "damaged"),
        ("text.txt.zst", b"not zstandard", "damaged"),
    ],
)
def test_files_that_cannot_be_read_get_one_clear_line(
    tmp_path: Path, name: str, content: bytes | None, message: str
):
    if name.endswith("zst"):
        pytest.importorskip("zstandard")
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidRequest, match=message) as error:
        list(Texts([tmp_path / name]))
    assert "\n" not in str(error.value)


def test_a_folder_without_texts_is_an_error(tmp_path: Path):
    with pytest.raises(InvalidRequest, match="in this folder"):
        Texts([tmp_path])
