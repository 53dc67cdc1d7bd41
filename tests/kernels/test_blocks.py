"""Products with blocks of GGUF files equal their definition, in every order of work."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from opennemo.kernels import cpu
from opennemo.model.blocks import TYPES, decode, dequantize
from opennemo.model.formats import BLOCKS, FORMATS
from tests.blocks import random_blocks

INPUTS = FORMATS["int8"].inputs


def widths(type: str) -> list[int]:
    """Whole chunks of the kernel, more, and less than a span of 256."""
    return [2048, 5120, 256] + ([576, 1536, 32] if TYPES[type].n_weights == 32 else [])


def multiply(type: str, x: Tensor, rows: Tensor, instructions: str, n_threads: int = 1) -> Tensor:
    weights = cpu.Weights(
        format=cpu.CpuFormat[type.upper()], columns=x.shape[1], codes=rows, scale=torch.ones(1, 1)
    )
    return cpu.multiply(x, weights, n_threads, instructions)


@pytest.mark.parametrize("type", TYPES)
def test_a_type_means_what_its_makers_say(type: str):
    kind = GGMLQuantizationType[type.upper()]
    assert gguf.GGML_QUANT_SIZES[kind] == (TYPES[type].n_weights, TYPES[type].n_bytes)
    rows = random_blocks(type, 5, 768)
    assert np.array_equal(dequantize(type, rows).numpy(), gguf.dequantize(rows.numpy(), kind))
    codes, scale, min = decode(type, rows)
    assert codes.shape == (5, 768) and codes.dtype == torch.int8
    assert 768 // scale.shape[1] in (16, 32) and (min is None or min.shape == scale.shape)


@pytest.mark.parametrize("type", TYPES)
def test_rows_as_numbers_equal_the_definition(type: str, instructions: str):
    for width in widths(type):
        rows = random_blocks(type, 70, width)
        found = cpu.dequantize(cpu.CpuFormat[type.upper()], rows, width, instructions)
        # The kernel subtracts the minimum without rounding before.
        assert torch.allclose(found, dequantize(type, rows), rtol=1e-6, atol=1e-6)
        assert (
            cpu.dequantize(cpu.CpuFormat[type.upper()], rows[:0], width, instructions).numel() == 0
        )


@pytest.mark.parametrize("type", TYPES)
def test_a_panel_takes_what_memory_is_planned_with(type: str):
    library = cpu.load_library(cpu.available_instructions()[0])
    planned = BLOCKS[type].packed_bytes(32, 2048)
    assert library.blocks_panel(cpu.CpuFormat[type.upper()], 2048) == planned


@pytest.mark.parametrize("type", TYPES)
def test_a_product_equals_the_definition(type: str, instructions: str):
    assert INPUTS is not None
    for width in widths(type):
        x = torch.randn(29, width, generator=torch.Generator().manual_seed(width))
        rows = random_blocks(type, 70, width)
        rounded = INPUTS.dequantize(*INPUTS.quantize(x), torch.float64)
        weights = dequantize(type, rows).double()
        bound = 3e-7 * (rounded.abs() @ weights.abs().T)  # what was added up, in magnitude
        for some in (x, x[:2], x[:1]):  # many rows go another way than one or two
            found = multiply(type, some, rows, instructions, 2)
            assert ((found - rounded[: len(some)] @ weights.T).abs() <= bound[: len(some)]).all()


@pytest.mark.parametrize("type", TYPES)
def test_sums_are_exact_where_no_float_is_rounded(type: str, instructions: str):
    """With scales that are powers of two nothing may differ from the definition, not in one bit."""
    width = widths(type)[-1] if TYPES[type].n_weights == 32 else 256
    random = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (17, width), generator=random).float()
    x[:, ::32] = 127  # so that the scale of every group is 1
    rows = random_blocks(type, 40, width, exact=True)
    expected = (x.double() @ dequantize(type, rows).double().T).float()
    assert torch.equal(multiply(type, x, rows, instructions), expected)
    assert torch.equal(multiply(type, x[:1], rows, instructions), expected[:1])


@pytest.mark.parametrize("type", TYPES)
def test_extreme_codes_do_not_saturate(type: str, instructions: str):
    for code in (0, 255):
        rows = random_blocks(type, 3, 256, exact=True)
        start = {"q4_k": 16, "q5_k": 16, "iq4_xs": 8, "q4_1": 4, "q5_1": 4}.get(type, 2)
        at = {"q2_k": slice(16, 80), "q3_k": slice(96), "q6_k": slice(192)}.get(
            type, slice(start, None)
        )
        rows.unflatten(1, (-1, TYPES[type].n_bytes))[..., at] = code
        for sign in (-127.0, 127.0):
            x = torch.full((5, 256), sign)
            expected = (x.double() @ dequantize(type, rows).double().T).float()
            for some in (x, x[:1]):
                assert torch.allclose(
                    multiply(type, some, rows, instructions), expected[: len(some)], rtol=1e-6
                )


@pytest.mark.parametrize("type", TYPES)
def test_a_row_has_the_same_bits_in_any_company(type: str, instructions: str):
    for width in widths(type)[1:4]:
        x = torch.randn(61, width, generator=torch.Generator().manual_seed(1))
        rows = random_blocks(type, 45, width)
        whole = multiply(type, x, rows, instructions)
        for size in (1, 2, 3, 5, 8, 13, 32):
            parts = [multiply(type, part, rows, instructions, 2) for part in x.split(size)]
            assert torch.equal(torch.cat(parts), whole), size
