"""The kernel for every set of instructions that this processor has."""

import pytest

from opennemo.kernels import cpu

# The AVX-512 code on a machine without it: all but the instruction that multiplies bytes.
EMULATED = ({"avx2", "fma", "f16c"}, ["-mavx2", "-mfma", "-mf16c", "-DEMULATE_VNNI"])


@pytest.fixture(params=[*cpu.INSTRUCTIONS, "emulated"])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(cpu.INSTRUCTIONS, "emulated", EMULATED)
    if request.param not in cpu.available_instructions():
        pytest.skip(f"this processor has no {request.param}")
    try:
        cpu.build(request.param)
    except cpu.CompilerMissing as error:
        pytest.skip(str(error))
    return request.param
