"""Files are written whole or not at all, and JSON is read with errors that name the file."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from opennemo.errors import CheckpointError
from opennemo.files import new_folder, open_whole, read_json, write_json, write_whole

# Writes half of a file, reports it, and waits to be killed.
HALF = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    from opennemo.files import open_whole
    with open_whole(Path(sys.argv[1])) as file:
        file.write(b"half")
        file.flush()
        print("half", flush=True)
        time.sleep(60)
""")


def test_json_is_read_as_it_was_written(tmp_path: Path):
    content = {"name": "Mistral NeMo", "tokens": [1, 2], "é": None}
    write_json(tmp_path / "file.json", content)
    assert read_json(tmp_path / "file.json") == content
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"{", "not JSON"), (b"[1]", "not a JSON object"), (b"\xff", "not JSON"),
     (b"[" * 100_000, "not JSON"), (None, "cannot be read")],
)  # fmt: skip
def test_what_is_no_json_object_is_refused_by_name(tmp_path: Path, data: bytes | None, reason: str):
    path = tmp_path / "file.json"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"file.json: {reason}"):
        read_json(path)


def test_an_error_leaves_the_file_as_it_was(tmp_path: Path):
    path = tmp_path / "file"
    write_whole(path, b"one ", memoryview(b"whole"))
    with pytest.raises(ZeroDivisionError), open_whole(path) as file:
        file.write(b"half")
        _ = 1 / 0
    assert path.read_bytes() == b"one whole"
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_process_leaves_no_half_of_a_file(tmp_path: Path):
    path = tmp_path / "file"
    command = [sys.executable, "-c", HALF, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"half\n"
        process.kill()
    assert not path.exists()


def test_a_folder_takes_its_name_when_it_is_complete(tmp_path: Path):
    folder = tmp_path / "model"
    with pytest.raises(ZeroDivisionError), new_folder(folder) as partial:
        (partial / "weights").write_bytes(b"half")
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []
    with new_folder(folder) as partial:
        (partial / "weights").write_bytes(b"whole")
        assert not folder.exists()
    assert (folder / "weights").read_bytes() == b"whole"
    with pytest.raises(CheckpointError, match="not an empty folder"), new_folder(folder):
        pass
