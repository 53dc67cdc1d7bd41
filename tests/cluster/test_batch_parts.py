"""A batch in parts: whatever ended the run before, each line is answered once, in order."""

import contextlib
import json
from pathlib import Path

import pytest

from opennemo.cluster import batch_parts as parts
from opennemo.errors import InvalidRequest
from opennemo.serve.settings import Settings
from tests.servers import needs_ray

N = 150


def here(source, folder, todo, settings):
    """One engine, in this process: what Ray's must equal."""
    with contextlib.closing(parts.Maker(source, folder, settings)) as maker:
        for row in parts.rows(todo):
            yield parts.n_lines_of(maker(row))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "temperature": 0}
    lines = [json.dumps({"custom_id": f"{i}", "body": body}) for i in range(N)]
    lines[7] = "no JSON"
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(lines), "utf-8")
    return path


def test_parts_that_were_made_stay_as_they_are(source: Path, folder: Path, tmp_path: Path):
    settings = Settings(model=str(folder), device="cpu")  # pyright: ignore
    target, made = tmp_path / "out.jsonl", tmp_path / "out.jsonl.parts"

    def break_off(*work):
        for n in here(*work):
            yield n
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        parts.run_in_parts(source, target, settings, break_off)
    (first,) = made.glob("*.jsonl")
    before = first.read_bytes()
    (made / f"{first.name}.1.tmp").write_bytes(b"half a part")
    assert not target.exists()
    assert parts.run_in_parts(source, target, settings, here) is False  # line 8 has an error
    answers = [json.loads(line) for line in target.read_bytes().splitlines()]
    assert target.read_bytes().startswith(before)
    assert [a["custom_id"] for a in answers] == [None if i == 7 else f"{i}" for i in range(N)]
    assert [i for i, a in enumerate(answers) if a["error"]] == [7]
    assert not made.exists()
    with pytest.raises(InvalidRequest, match="exists already"):
        parts.run_in_parts(source, target, settings, here)


@pytest.mark.slow
@needs_ray
def test_ray_makes_the_same(source: Path, folder: Path, tmp_path: Path):
    said = {}
    for name, make in (("here", here), ("ray", parts.on_ray)):
        settings = Settings(model=str(folder), device="cpu", replicas=2)  # pyright: ignore
        target = tmp_path / f"{name}.jsonl"
        parts.run_in_parts(source, target, settings, make)
        lines = [json.loads(line) for line in target.read_bytes().splitlines()]
        said[name] = [
            (a["id"], a["custom_id"], a["response"] and a["response"]["body"]["choices"])
            for a in lines
        ]
    assert said["here"] == said["ray"]
