"""Kernels between products equal the definition: on a GPU, or else in Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from opennemo.model.formats import FORMATS
from opennemo.model.pages import Pages
from opennemo.model.transformer import ModelConfig, rotary, rotate

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton: pip install triton", allow_module_level=True)

from opennemo.kernels import gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cuts bf16 off where a card rounds.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]


def rows(dtype: torch.dtype = torch.float32) -> Tensor:
    """Of all magnitudes, zero and both sides of a power of two's border among them."""
    torch.manual_seed(0)
    x = torch.randn(32, 76) * torch.logspace(-6, 4, 32)[:, None]
    x[3] = 0
    x[4] = 448
    x[5] *= 447.99997 / x[5].abs().max()
    x[6] = 1e-14
    x[7, 1:] /= 1e7
    return x.to(DEVICE, dtype)


def same(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Up to the order of additions, which in 16 bits may fall on the neighbouring number."""
    assert found.dtype == dtype
    rtol = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.float(), expected.float(), rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("name", ["fp8", "fp8-dynamic", "fp8-static"])
def test_rows_are_rounded_as_the_format_says(name: str):
    inputs, x = FORMATS[name].inputs, rows()
    assert inputs is not None
    given = torch.tensor([[0.37]], device=DEVICE) if FORMATS[name].static else None
    codes, scale = inputs.quantize(x, given)
    found = gpu.round_rows(x, gpu.ToFP8(given, inputs.power_of_two))
    assert found.scale is not None
    assert torch.equal(found.scale, scale.expand(len(x), 1))
    assert torch.equal(found.values.float(), codes.float())


def test_numbers_that_are_not_finite_stay_so():
    x = rows()
    x[0, 5] = float("inf")
    found = gpu.round_rows(x, gpu.ToFP8())
    assert found.scale is not None
    assert (~(found.values.float() * found.scale).isfinite()).any(-1).tolist() == [True] + [
        False
    ] * (len(x) - 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rounds", [False, True])
def test_norm_and_swiglu_equal_the_definition(dtype: torch.dtype, rounds: bool):
    rounding = gpu.ToFP8() if rounds else None
    torch.manual_seed(1)
    x, update, gate, up = torch.randn(4, 5, 76, device=DEVICE).mul(3).to(dtype)
    gains = torch.rand(76, device=DEVICE).to(dtype)
    total = x + update
    normed = F.rms_norm(total, (76,), gains, 1e-5)
    cases = {
        "norm": (gpu.norm(x, update, gains, 1e-5, rounding), normed),
        "first norm": (gpu.norm(total.clone(), None, gains, 1e-5, rounding), normed),
        "swiglu": (gpu.swiglu(torch.cat((gate, up), -1), rounding), F.silu(gate) * up),
    }
    assert torch.equal(x, total)
    for found, expected in cases.values():
        if found.scale is None:
            same(found.values, expected, dtype)
        else:  # where additions decided, the next code, an eighth away
            back = found.values.float() * found.scale
            same_codes, scale = FORMATS["fp8"].inputs.quantize(expected)  # pyright: ignore[reportOptionalMemberAccess]
            exact = same_codes.float() * scale
            assert ((back - exact).abs() <= exact.abs() / 7 + 1e-6).all()
            assert (back == exact).float().mean() > 0.98


@pytest.mark.parametrize("kv", ["fp32", "fp16", "fp8", "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotated_keys_are_written_as_the_cache_would(dtype: torch.dtype, kv: str):
    torch.manual_seed(2)
    config = ModelConfig(n_layers=2, n_heads=6, n_kv_heads=2, head_dim=48)
    scale = torch.rand(2, 2) / 30 + 0.005
    ours, theirs = (Pages.empty(config, 5, 7, kv, DEVICE, scale) for _ in range(2))
    slots = torch.randperm(35)[:9].to(DEVICE)
    qkv = torch.randn(9, 10 * 48, device=DEVICE).to(dtype)
    rope = rotary(torch.arange(9, device=DEVICE) * 1000, config)
    q, k, v = qkv.view(9, 10, 48).split([6, 2, 2], 1)
    theirs.write(1, slots, rotate(k, rope), v)
    ours_scale = None if ours.scale is None else ours.scale[1]
    found = gpu.rotate_and_write(qkv, rope, 6, ours.codes[1], ours_scale, slots)
    same(found, rotate(q, rope), dtype)
    assert (ours.codes.float() == theirs.codes.float()).float().mean() > 0.99
    torch.testing.assert_close(ours.codes.float(), theirs.codes.float(), rtol=0.13, atol=1.0)
    if kv == "int8":
        torch.testing.assert_close(ours.scale, theirs.scale, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
def test_every_kernel_compiles_for_a_card(capability: int, tmp_path: Path):
    """The interpreter overlooks what a compiler refuses; compiling needs no card."""
    script = Path(__file__).with_name("compile_kernels.py")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(script), str(capability)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "compiled" in done.stdout
