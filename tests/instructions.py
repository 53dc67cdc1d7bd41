"""The kernel for every set of instructions that this processor has."""

import pytest

from opennemo.kernels import build

# The AVX-512 code on a machine without it: all but the instruction that multiplies bytes.
EMULATED = ({"avx2", "fma", "f16c"}, ["-mavx2", "-mfma", "-mf16c", "-DEMULATE_VNNI"])


@pytest.fixture(params=[*build.INSTRUCTIONS, "emulated"])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(build.INSTRUCTIONS, "emulated", EMULATED)
    if request.param not in build.available_instructions():
        pytest.skip(f"this processor has no {request.param}")
    try:
        build.build(request.param)
    except build.CompilerMissing as error:
        pytest.skip(str(error))
    return request.param
