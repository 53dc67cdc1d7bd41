"""What is installed: one version, and wheels that bring their kernels."""

import re
import stat
import zipfile
from pathlib import Path

import pytest

import opennemo
from opennemo.kernels.build import OF_MACHINE, library_name

ROOT = Path(__file__).parent.parent


def test_the_changelog_begins_with_this_version():
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert headings[0] == opennemo.__version__
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text("utf-8")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """What a wheel is built of, without most of the code."""
    pytest.importorskip("hatchling")
    for name in (
        "pyproject.toml",
        "hatch_build.py",
        "README.md",
        "LICENSE",
        "opennemo/__init__.py",
    ):
        place = tmp_path / name
        place.parent.mkdir(exist_ok=True)
        place.write_bytes((ROOT / name).read_bytes())
    kernels = tmp_path / "opennemo/kernels"
    kernels.mkdir()
    for path in (ROOT / "opennemo/kernels").glob("*.*"):
        (kernels / path.name).write_bytes(path.read_bytes())
    return tmp_path


def build_wheel(source: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from hatchling.build import build_wheel  # pyright: ignore[reportMissingImports]

    monkeypatch.chdir(source)
    return source / "dist" / build_wheel(str(source / "dist"))


def compiler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that writes its arguments instead of code, at once."""
    script = folder / "compiler"
    script.write_text('#!/bin/sh\nfor last; do :; done\necho "$@" > "$last"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(script))


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_a_wheel_for_a_machine_has_all_of_its_kernels(
    source: Path, monkeypatch: pytest.MonkeyPatch, machine: str
):
    compiler(source, monkeypatch)
    monkeypatch.setenv("OPENNEMO_KERNELS", machine)
    wheel = build_wheel(source, monkeypatch)
    version = opennemo.__version__
    assert wheel.name == f"opennemo-{version}-py3-none-manylinux_2_28_{machine}.whl"
    names = zipfile.ZipFile(wheel).namelist()
    kernels = {name for name in names if name.endswith(".so")}
    assert kernels == {
        f"opennemo/kernels/prebuilt/{library_name(name)}" for name in OF_MACHINE[machine]
    }
    assert not (source / "opennemo/kernels/prebuilt").exists()


def test_without_being_asked_a_wheel_is_pure(source: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OPENNEMO_KERNELS", raising=False)
    wheel = build_wheel(source, monkeypatch)
    assert wheel.name == f"opennemo-{opennemo.__version__}-py3-none-any.whl"
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]


def test_an_unknown_machine_is_refused(source: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENNEMO_KERNELS", "vax")
    with pytest.raises(SystemExit, match="OPENNEMO_KERNELS=vax: must be x86_64 or aarch64"):
        build_wheel(source, monkeypatch)
