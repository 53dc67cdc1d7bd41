"""The native kernels come from the wheel, or are compiled once for each set of instructions."""

import multiprocessing
from pathlib import Path

import pytest

from opennemo.kernels import build, cpu


@pytest.fixture(autouse=True)
def no_prebuilt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "PREBUILT", tmp_path / "prebuilt")


def test_a_variant_is_compiled_once_whatever_the_processor_has_and_whoever_asks(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    if not build.available_instructions():
        pytest.skip("unknown processor")
    if "avx2" not in build.available_instructions():
        pytest.skip("the flags are those of x86")
    monkeypatch.setattr(build, "FLAGS", [*build.FLAGS, "-O0"])  # a second instead of a minute
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=build.build, args=["avx512"]) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(300)
    library = build.build("avx512")  # compiling needs no such processor
    assert capfd.readouterr().err.count("Compiling") == 1
    assert build.build("avx512") == library and library.parent == tmp_path / "cache/opennemo"
    assert "Compiling" not in capfd.readouterr().err
    assert [path.name for path in library.parent.iterdir()] == [library.name]


def test_a_prebuilt_kernel_needs_no_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("PATH", str(tmp_path))
    prebuilt = tmp_path / "prebuilt" / build.library_name("portable")
    prebuilt.parent.mkdir()
    prebuilt.touch()
    assert build.build("portable") == prebuilt
    assert not capfd.readouterr().err and not (tmp_path / "cache").exists()


def test_a_kernel_of_another_source_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    prebuilt = tmp_path / "prebuilt" / build.library_name("portable")
    prebuilt.parent.mkdir()
    prebuilt.touch()
    monkeypatch.setattr(build, "FLAGS", [*build.FLAGS, "-DNEWER"])
    with pytest.raises(build.CompilerMissing, match="no C\\+\\+ compiler found"):
        build.build("portable")


def test_where_the_cache_cannot_be_written_a_private_temporary_folder_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    (tmp_path / "home").write_text("no folder")
    (temporary := tmp_path / "tmp").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(build.tempfile, "tempdir", str(temporary))
    place = build.cached_path("a.so")
    assert place.parent.parent == temporary and place == build.cached_path("a.so")
    assert place.parent.stat().st_mode & 0o777 == 0o700
    place.parent.chmod(0o777)  # others may have put something there
    assert build.cached_path("a.so") != place


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "full").write_text("no folder")
    with pytest.raises(build.CompilerMissing, match=r"cannot be compiled into .*full: .*exists"):
        build.compile_into(tmp_path / "full", "portable")


def test_why_a_compiler_failed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    compiler = tmp_path / "cxx"
    compiler.write_text(
        "#!/bin/sh\necho cpu.cpp: warning: x >&2\necho ld: failed: no space >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(build.CompilerMissing, match=f"^{compiler} failed: ld: failed: no space$"):
        build.compile_into(tmp_path / "cache", "portable")


def test_a_kernel_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch):
    """As on a file system that is mounted noexec, or after a crash of the machine."""
    monkeypatch.setitem(build.INSTRUCTIONS, "damaged", build.INSTRUCTIONS["portable"])
    library = build.cached_path(build.library_name("damaged"))
    library.write_bytes(b"")
    with pytest.raises(build.CompilerMissing, match=f"cannot be loaded: {library}: .*; remove it"):
        cpu.load_library("damaged")
