"""Shards hold what the texts say, by any number of processes and after any interruption."""

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opennemo.cli import main
from opennemo.data.cleaning import STAGES, Cleaning
from opennemo.data.parts import Job
from opennemo.data.preparation import prepare
from opennemo.data.tally import table
from opennemo.errors import OpenNemoError
from opennemo.tokenizer.rank_files import OWN, own_tokenizer
from opennemo.train.corpus import Corpus, tokenizer_hash
from tests.servers import needs_ray

ROOT = Path(__file__).parents[2]
PARAGRAPHS = [
    p for f in sorted(ROOT.glob("docs/*.md")) for p in f.read_text("utf-8").split("\n\n") if p
]
# Small enough that the texts below fall into some twenty chunks.
SMALL: dict[str, Any] = {"tokenizer": Path(OWN), "shard_tokens": 5_000, "chunk_bytes": 6_000}


# What test_any_number_of_workers_makes_the_same does, in a process of its own.
PROGRAM = (
    "import sys; from pathlib import Path\n"
    "from opennemo.data.parts import *; from opennemo.data.preparation import *\n"
    "prepare(Job(inputs=(Path(sys.argv[1]),), out=Path(sys.argv[2]),"
    f" cleaning=Cleaning(stages={STAGES}), tokenizer=Path({OWN!r}),"
    f" shard_tokens={SMALL['shard_tokens']}, chunk_bytes={SMALL['chunk_bytes']}), workers=2)"
)


def row(text: str, **fields: str) -> str:
    return json.dumps({"text": text, **fields}) + "\n"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Paragraphs of docs/ in files of all kinds, some twice, some nearly so, some broken."""
    folder = tmp_path_factory.mktemp("texts")
    for i in range(0, 240, 12):
        rows = [
            row(p, lang="en", source=f"s{i % 3}", licence="CC0") for p in PARAGRAPHS[i : i + 12]
        ]
        (folder / f"{i:03}.jsonl").write_text("".join(rows))
    again = [row(p, lang="en", source="again") for p in PARAGRAPHS[:20]]
    nearly = [
        row(f"{p} And so on.", lang="en", source="nearly") for p in PARAGRAPHS if len(p) > 600
    ]
    odd = [row("", lang="en"), "{\n", row("\ud800 lone"), row("Ein Satz für sich.", lang="de")]
    (folder / "900.jsonl").write_text("".join([*again, *nearly, *odd]))
    (folder / "fr.txt").write_text("Une phrase, et une autre.\n", "utf-8")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def without_paths(made: dict[str, bytes]) -> dict[str, Any]:
    """The files, except that the report does not say where its inputs lie."""
    report = json.loads(made["report.json"])
    inputs = [[Path(name).name, size] for name, size in report["inputs"]]
    return made | {"report.json": report | {"inputs": inputs}}


@pytest.fixture(scope="module")
def expected(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What all stages make of the texts, undisturbed and in one process."""
    pytest.importorskip("ftfy")
    pytest.importorskip("py3langid")
    pytest.importorskip("rensa")
    out = tmp_path_factory.mktemp("expected") / "shards"
    prepare(Job(inputs=(texts,), out=out, cleaning=Cleaning(stages=STAGES), **SMALL))
    return files(out)


def test_shards_hold_each_text_between_bos_and_eos(texts: Path, tmp_path: Path):
    report = prepare(Job(inputs=(texts / "000.jsonl", texts / "fr.txt"), out=tmp_path, **SMALL))
    tokenizer = own_tokenizer()
    wanted = [*PARAGRAPHS[:12], "Une phrase, et une autre.\n"]
    documents = [[tokenizer.bos_id, *tokenizer.encode(t), tokenizer.eos_id] for t in wanted]
    ids = np.fromfile(tmp_path / "00000.ids", "<u4")
    assert ids.tolist() == [id for document in documents for id in document]
    ends = np.fromfile(tmp_path / "00000.ends", "<i8")
    assert ends.tolist() == np.cumsum([len(d) for d in documents]).tolist()
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["tokenizer"]["hash"] == tokenizer_hash(Path(OWN))
    assert index["text_bytes"] == sum(len(text.encode()) for text in wanted)
    assert (index["tokens"], index["documents"]) == (len(ids), 13)
    assert report["languages"].keys() == {"en", "fr"}
    corpus = Corpus(
        [tmp_path], window=len(ids), seed=0, tokenizer_hash=tokenizer_hash(Path(OWN)),
        verify=True,
    )  # fmt: skip
    assert corpus[0][0].tolist() == ids.tolist()
    assert corpus[0][1].tolist() == [len(d) for d in documents]


def test_the_report_accounts_for_every_text(expected: dict[str, bytes]):
    report = json.loads(expected["report.json"])
    read, kept, dropped = report["read"], report["kept"], report["dropped"]
    assert set(expected) >= {"index.json", "report.json", "00001.ids"}
    assert read["unreadable_lines"] == 1
    assert read["documents"] == kept["documents"] + sum(r["documents"] for r in dropped.values())
    assert {"exact copy", "near copy", "empty"} <= dropped.keys()
    assert dropped["exact copy"]["documents"] >= 20
    assert dropped["near copy"]["languages"] == {"en": dropped["near copy"]["documents"]}
    for section in ("languages", "sources"):
        assert sum(row["tokens"] for row in report[section].values()) <= kept["tokens"]
    assert "again" not in report["sources"], "a copy was kept, and what it is of left out"
    assert report["licences"]["CC0"]["documents"] > 100
    assert report["languages"]["de"]["documents"] == 1
    index = json.loads(expected["index.json"])
    assert {name: index[name] for name in kept} == kept
    assert report["libraries"].keys() == {"ftfy", "py3langid", "rensa"}
    assert table(report)


def test_any_number_of_workers_makes_the_same(
    texts: Path, expected: dict[str, bytes], tmp_path: Path
):
    heard: list[tuple[str, int, int]] = []
    job = Job(inputs=(texts,), out=tmp_path / "2", cleaning=Cleaning(stages=STAGES), **SMALL)
    prepare(job, workers=2, progress=lambda *at: heard.append(at))
    assert files(tmp_path / "2") == expected
    for stage in ("Tokenizing", "Writing shards"):
        done = [done for name, done, _ in heard if name == stage]
        assert done == sorted(done)
        assert done[-1] == next(total for name, _, total in heard if name == stage)
    before = (tmp_path / "2" / "00000.ids").stat().st_mtime_ns
    assert prepare(job) == json.loads(expected["report.json"]), "again, it says the same"
    assert (tmp_path / "2" / "00000.ids").stat().st_mtime_ns == before


def children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in listed]


def alive(pids: Iterable[int]) -> list[int]:
    def state(pid: int) -> str:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return "X"

    return [pid for pid in pids if state(pid) not in "XZ"]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_killed_it_goes_on_to_the_same_bytes(
    texts: Path, expected: dict[str, bytes], tmp_path: Path
):
    out = tmp_path / "shards"
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, texts, out])
    parts = out / "parts"
    deadline = time.monotonic() + 100
    while len(list(parts.glob("*.npz"))) < 3 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    started = children(process.pid)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it was over before it could be killed"
    while alive(started):
        assert time.monotonic() < deadline, "workers live on without the process they work for"
        time.sleep(0.05)
    left = {path: path.stat().st_mtime_ns for path in parts.glob("*.npz")}
    assert left and not (out / "index.json").exists()
    (parts / ".half-written").write_bytes(b"PK")  # as a kill at another moment leaves

    def compare(stage: str, done: int, total: int) -> None:
        if stage == "Writing shards" and parts.exists():
            assert len(list(parts.glob("*.npz"))) > len(left)
            assert {path: path.stat().st_mtime_ns for path in left} == left, "made again"

    job = Job(inputs=(texts,), out=out, cleaning=Cleaning(stages=STAGES), **SMALL)
    prepare(job, progress=compare)
    assert files(out) == expected


def run(*arguments: str | Path, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """Python, where no file may grow beyond `limit` bytes: a disk that is full."""

    def set_limit() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True, text=True, timeout=100, preexec_fn=set_limit,
    )  # fmt: skip


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(texts: Path, tmp_path: Path):
    out, undisturbed = tmp_path / "full", tmp_path / "undisturbed"
    command = ("-m", "opennemo.cli", "tokenize", texts, "--out", out, "--tokenizer", OWN)
    for workers in ("1", "2"):
        failed = run(*command, "--workers", workers, limit=20_000)
        assert failed.returncode == 2, failed.stderr
        said = failed.stderr.strip().splitlines()[-1]
        assert said.startswith("opennemo: ") and "no room to write (File too large)" in said
        assert "Traceback" not in failed.stderr
        assert [path.name for path in out.rglob("*") if path.is_file()] == ["plan.json"]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert "tokens of" in done.stdout and "left out: empty" in done.stdout
    assert "Left out: 1 line not" in done.stderr
    prepare(Job(inputs=(texts,), out=undisturbed, tokenizer=Path(OWN)))
    assert files(out) == files(undisturbed)


def test_the_disk_may_fill_while_shards_are_written(
    texts: Path, expected: dict[str, bytes], tmp_path: Path
):
    largest = max(len(data) for name, data in expected.items() if name.endswith("ids"))
    failed = run("-c", PROGRAM, texts, tmp_path / "out", limit=largest - 1)
    assert failed.returncode == 1 and "no room to write" in failed.stderr.splitlines()[-1]
    left = files(tmp_path / "out")
    assert "index.json" not in left and len([name for name in left if ".npz" in name]) > 10
    assert run("-c", PROGRAM, texts, tmp_path / "out").returncode == 0
    assert files(tmp_path / "out") == expected


def test_tables_and_urls(texts: Path, tmp_path: Path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    fsspec = pytest.importorskip("fsspec")
    rows = [json.loads(line) for line in (texts / "000.jsonl").read_text().splitlines()]
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=5)
    fsspec.filesystem("memory").pipe("/texts/rows.jsonl", (texts / "000.jsonl").read_bytes())
    made = []
    for name, source in (
        ("lines", texts / "000.jsonl"),
        ("table", tmp_path / "rows.parquet"),
        ("url", "memory://texts/rows.jsonl"),
    ):
        prepare(Job(inputs=(source,), out=tmp_path / name, **SMALL))
        made.append(files(tmp_path / name))
        report = json.loads(made[-1].pop("report.json"))
        assert [Path(file).name for file, _ in report["inputs"]] == [Path(source).name]
    assert made[0] == made[1] == made[2]


def test_what_is_wrong_with_a_request_is_said_in_one_line(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def refusal(out: Path, *changes: str, inputs: Path = texts / "fr.txt") -> str:
        arguments = ["opennemo", "tokenize", str(inputs), "--out", str(out), "--workers", "1"]
        monkeypatch.setattr(sys, "argv", [*arguments, "--tokenizer", OWN, *changes])
        with pytest.raises(SystemExit) as exit:
            main()
        lines = capsys.readouterr().err.splitlines()
        said = [line for line in lines if not line.startswith(("Tokenizing: ", "Writing shards: "))]
        assert exit.value.code == 2 and len(said) == 1, lines
        assert said[0].startswith("opennemo: ")
        return said[0]

    prepare(Job(inputs=(texts / "fr.txt",), out=tmp_path / "a", tokenizer=Path(OWN)))
    assert "begun with other cleaning" in refusal(tmp_path / "a", "--min-chars", "2")
    assert "begun with other inputs" in refusal(tmp_path / "a", inputs=texts / "000.jsonl")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("")
    assert "holds other files" in refusal(tmp_path / "b")
    assert "no stage 'polish'" in refusal(tmp_path / "c", "--clean", "nfc,polish")
    assert "allowed are processes, ray" in refusal(tmp_path / "c", "--engine", "spark")
    assert "no such file" in refusal(tmp_path / "c", inputs=tmp_path / "none.txt")
    assert "no text is left of 1" in refusal(tmp_path / "c", "--language", "en")
    assert "no tokenizer there" in refusal(tmp_path / "d", "--tokenizer", str(tmp_path / "a"))
    broken = tmp_path / "broken.txt.gz"
    broken.write_bytes(b"nothing packed")
    assert "damaged" in refusal(tmp_path / "e", inputs=broken)
    assert "damaged" in refusal(tmp_path / "e", "--workers", "2", inputs=broken)


def test_a_worker_that_is_killed_is_said_so(texts: Path, tmp_path: Path):
    job = Job(inputs=(texts,), out=tmp_path, **SMALL)

    def kill(stage: str, done: int, total: int) -> None:
        if done and stage == "Tokenizing":
            os.kill(children(os.getpid())[-1], signal.SIGKILL)

    with pytest.raises(OpenNemoError, match="a worker was killed"):
        prepare(job, workers=2, progress=kill)
    report = prepare(job)
    assert report["read"]["documents"] > 150


@pytest.mark.slow
@needs_ray
def test_ray_makes_the_same(texts: Path, expected: dict[str, bytes], tmp_path: Path):
    job = Job(inputs=(texts,), out=tmp_path / "ray", cleaning=Cleaning(stages=STAGES), **SMALL)
    heard: list[int] = []
    try:
        prepare(job, engine="ray", progress=lambda stage, done, total: heard.append(done))
        assert len(heard) > 10
        assert without_paths(files(tmp_path / "ray")) == without_paths(expected)
        broken = tmp_path / "broken.txt.gz"
        broken.write_bytes(b"nothing packed")
        with pytest.raises(OpenNemoError, match="damaged") as error:
            prepare(Job(inputs=(broken,), out=tmp_path / "b", **SMALL), engine="ray")
        assert "\n" not in str(error.value)
    finally:
        importlib.import_module("ray").shutdown()  # not before: Ray reads the environment then
