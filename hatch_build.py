"""Puts the native kernels into a wheel when $OPENNEMO_KERNELS names a machine: x86_64 or aarch64.

Without the variable a wheel is pure, and the kernel is compiled on the machine that uses it. $CXX
names the compiler, for instance aarch64-linux-gnu-g++. With GCC 12 the kernels need no more than
manylinux_2_27; the wheel is tagged manylinux_2_28, as PyTorch's is, and `make release` checks that.
"""

import importlib.util
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import (  # pyright: ignore[reportMissingImports]
    BuildHookInterface,
)


class KernelHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        machine = os.environ.get("OPENNEMO_KERNELS")
        if not machine or version == "editable":
            return
        kernels = _kernels(Path(self.root))
        if machine not in kernels.OF_MACHINE:
            allowed = " or ".join(kernels.OF_MACHINE)
            raise SystemExit(f"OPENNEMO_KERNELS={machine}: must be {allowed}")
        shutil.rmtree(kernels.PREBUILT, ignore_errors=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compile_one = partial(kernels.compile_into, kernels.PREBUILT)
            libraries = list(pool.map(compile_one, kernels.OF_MACHINE[machine]))
        for library in libraries:
            place = f"opennemo/kernels/prebuilt/{library.name}"
            build_data["force_include"][str(library)] = place
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-manylinux_2_28_{machine}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Leave the source as it was: a kernel for another machine is useless there."""
        shutil.rmtree(_kernels(Path(self.root)).PREBUILT, ignore_errors=True)


def _kernels(root: Path) -> Any:
    """The package's own module, which is not installed while it is built."""
    place = root / "opennemo" / "kernels" / "build.py"
    spec = importlib.util.spec_from_file_location("kernels_of_wheel", place)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
