"""Products with weights in codes equal their formats: on a GPU, or else in Triton's interpreter."""

import importlib.util

import pytest
import torch
from torch import Tensor

from opennemo.model.formats import BLOCKS, by_name

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton: pip install triton", allow_module_level=True)

from opennemo.kernels import packed_weights
from opennemo.kernels.packed_weights import PACKINGS, PackedMatrix, multiply, serves, unpack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter knows no products in bf16.
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def matrix(type: str, n_rows: int, width: int) -> tuple[PackedMatrix, Tensor, dict[str, Tensor]]:
    """Random weights in a format, what stands for them, and what these mean."""
    torch.manual_seed(0)
    format = by_name(type)
    tensors = format.quantize(torch.randn(n_rows, width) * torch.rand(n_rows, 1))
    tensors = {name: tensor.to(DEVICE) for name, tensor in tensors.items()}
    packed = PackedMatrix(type, tensors["weight"], tensors.get("scale"), width)
    return packed, format.dequantize(tensors, width, torch.float32), tensors


@pytest.mark.parametrize("type", PACKINGS)
def test_weights_are_those_that_the_format_means(type: str):
    width = 512 if type.endswith("k") else 352
    packed, expected, _ = matrix(type, 19, width)
    assert serves(type, width)
    torch.testing.assert_close(unpack(packed, torch.float32), expected, rtol=1e-6, atol=1e-6)
    some = torch.tensor([18, 0, 3], device=DEVICE)
    found = unpack(packed, torch.float32, some)
    torch.testing.assert_close(found, expected[some], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("type", PACKINGS)
def test_products_are_those_that_the_format_means(type: str, monkeypatch: pytest.MonkeyPatch):
    width = 512 if type.endswith("k") else 352
    packed, _, tensors = matrix(type, 37, width)
    format = by_name(type)
    x = torch.randn(20, width, device=DEVICE).to(DTYPE)
    x[1] = 0
    rounds = format.inputs is not None
    for n in (1, 20):
        found = multiply(x[:n], packed, rounds_inputs=rounds)
        expected = format.linear(x[:n], tensors)
        assert found.dtype == DTYPE
        tolerance = 1e-5 if torch.float32 == DTYPE else 2e-2
        assert (found - expected).abs().max() < tolerance * expected.abs().max()
        with monkeypatch.context() as patch:  # many rows: by parts of the matrix
            patch.setattr(packed_weights, "FEW", 0)
            patch.setattr(packed_weights, "PART", 10 * width)
            many = multiply(x[:n], packed, rounds_inputs=rounds)
        assert (found - many).abs().max() < tolerance * expected.abs().max()


def test_what_is_served_is_what_the_table_says():
    assert {n for n in BLOCKS if BLOCKS[n].unpacked_on_gpu} == set(PACKINGS) & set(BLOCKS)
    assert by_name("int4").unpacked_on_gpu and by_name("int8").unpacked_on_gpu
    assert not serves("q2_k", 256) and not serves("q8_0", 40) and not serves("q4_k", 352)
