"""The kernels for aarch64, cross-compiled and run by qemu, equal the definition of blocks."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from opennemo.kernels import build, cpu
from opennemo.model.blocks import TYPES, dequantize
from opennemo.model.formats import FORMATS
from tests.blocks import random_blocks

CROSS, QEMU, LIBRARIES = "aarch64-linux-gnu-g++", "qemu-aarch64", "/usr/aarch64-linux-gnu"
INPUTS = FORMATS["int8"].inputs
# Reads codes and inputs, writes rows as numbers and products.
DRIVER = r"""
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <dlfcn.h>
#include <vector>
int main(int, char** arg) {
  int format = atoi(arg[2]), O = atoi(arg[3]), D = atoi(arg[4]), bytes = atoi(arg[5]);
  int T = atoi(arg[6]);
  void* library = dlopen(arg[1], RTLD_NOW);
  if (!library) return fprintf(stderr, "%s\n", dlerror()), 1;
  auto rows = (void (*)(int, int, int, void*, int64_t, float*, int))dlsym(library, "blocks_rows");
  auto multiply = (void (*)(int, int, int, void*, int64_t, float*, int, float*, int))dlsym(
      library, "blocks_multiply");
  std::vector<uint8_t> codes(size_t(O) * bytes);
  std::vector<float> x(T * D), w(O * D), y(T * O);
  if (fread(codes.data(), 1, codes.size(), stdin) != codes.size()) return 2;
  if (fread(x.data(), 4, x.size(), stdin) != x.size()) return 3;
  rows(format, O, D, codes.data(), bytes, w.data(), 2);
  multiply(format, O, D, codes.data(), bytes, x.data(), T, y.data(), 2);
  fwrite(w.data(), 4, w.size(), stdout);
  fwrite(y.data(), 4, y.size(), stdout);
}
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which(CROSS) or not shutil.which(QEMU):
        pytest.skip(f"needs {CROSS} and {QEMU}")
    folder = tmp_path_factory.mktemp("aarch64")
    (folder / "driver.cpp").write_text(DRIVER)
    command = [CROSS, "-O1", "-std=c++17", "driver.cpp", "-o", "driver", "-ldl"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "driver"


@pytest.mark.slow
@pytest.mark.parametrize("name", build.OF_MACHINE["aarch64"])
def test_blocks_are_multiplied_on_aarch64(name: str, driver: Path, monkeypatch: pytest.MonkeyPatch):
    assert INPUTS is not None
    monkeypatch.setenv("CXX", CROSS)
    library = build.compile_into(driver.parent, name)
    O, D = 70, 1024
    for type in TYPES:
        codes = random_blocks(type, O, D)
        weights = dequantize(type, codes)
        for T in (1, 3, 9, 40):  # all orders of work
            x = torch.randn(T, D, generator=torch.Generator().manual_seed(T))
            format = str(int(cpu.CpuFormat[type.upper()]))
            numbers = [format, str(O), str(D), str(codes.shape[1]), str(T)]
            done = subprocess.run(
                [QEMU, "-L", LIBRARIES, driver, library, *numbers],
                input=codes.numpy().tobytes() + x.numpy().tobytes(), stdout=subprocess.PIPE,
                check=True,
            )  # fmt: skip
            out = torch.from_numpy(np.frombuffer(done.stdout, np.float32).copy())
            assert torch.allclose(out[: O * D].view(O, D), weights, rtol=1e-6, atol=1e-6), type
            rounded = INPUTS.dequantize(*INPUTS.quantize(x), torch.float64)
            bound = 3e-7 * (rounded.abs() @ weights.double().abs().T)  # of what was added up
            error = (out[O * D :].view(T, O) - rounded @ weights.double().T).abs()
            assert (error <= bound).all(), (type, T)
