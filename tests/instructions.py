"""The kernel for every set of instructions that this processor has.

`python -m tests.instructions` compiles all of them, for tests that begin meanwhile.
"""

from contextlib import suppress

import pytest

from opennemo.kernels import build

# The AVX-512 code on a machine without it: all but the instruction that multiplies bytes.
EMULATED = ({"avx2", "fma", "f16c"}, ["-mavx2", "-mfma", "-mf16c", "-DEMULATE_VNNI"])


@pytest.fixture(params=[*build.INSTRUCTIONS, "emulated"])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(build.INSTRUCTIONS, "emulated", EMULATED)
    if request.param not in build.available_instructions.__wrapped__():  # the cache may be older
        pytest.skip(f"this processor has no {request.param}")
    try:
        build.build(request.param)
    except build.CompilerMissing as error:
        pytest.skip(str(error))
    return request.param


if __name__ == "__main__":
    build.INSTRUCTIONS["emulated"] = EMULATED
    with suppress(build.CompilerMissing):
        for name in build.available_instructions():
            build.build(name)
