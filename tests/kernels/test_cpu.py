"""The native kernels are compiled once for each set of instructions."""

from pathlib import Path

import pytest

from opennemo.kernels import cpu


def test_every_variant_compiles_and_is_compiled_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    if not cpu.available_instructions():
        pytest.skip("unknown processor")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if "avx2" not in cpu.available_instructions():
        pytest.skip("the flags are those of x86")
    library = cpu.build("avx512")  # compiling needs no such processor
    assert "Compiling" in capfd.readouterr().err
    assert cpu.build("avx512") == library and library.parent == tmp_path / "opennemo"
    assert "Compiling" not in capfd.readouterr().err
    assert [path.name for path in library.parent.iterdir()] == [library.name]
