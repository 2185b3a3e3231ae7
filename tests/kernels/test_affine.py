"""Rounding to uint8 with known scales in C++ gives the bits of torch's operations."""

import pytest
import torch

from fxquant.kernels import affine
from fxquant.kernels.extension import FLOAT_TYPES, NOT_BUILT
from fxquant.kernels.native import NATIVE
from fxquant.modules.linear_of import linear_of
from fxquant.numerics.integers import WIDTHS
from fxquant.numerics.weights import quantize_weight

pytestmark = pytest.mark.skipif(NOT_BUILT is not None, reason="the extension is not built here")


def grids(columns):
    channels = torch.rand(columns) + 0.01, (torch.rand(columns) * 255).round()
    return {"channels": channels, "one": (channels[0][0], channels[1][0])}


@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 3, 1024, 2500])
@pytest.mark.parametrize("kind", ["channels", "one"])
def test_integers_and_floats_have_torchs_bits(kind, columns, dtype):
    torch.manual_seed(0)
    grid, x = grids(columns)[kind], (torch.randn(5, 2, columns) * 60).to(dtype)
    x.view(-1)[:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0])[: x.numel()]
    halves = torch.arange(columns) + 0.5  # go to even integers
    x[1, 1] = (halves * grid[0]).to(dtype)
    q = affine._quantize_in_torch(x, *grid)
    assert torch.equal(affine.quantize_uint8(x, *grid), q)
    expected = affine._dequantize_in_torch(q, *grid, dtype)
    assert torch.equal(affine.dequantize_uint8(q, *grid, dtype), expected)


def test_samples_have_grids_of_their_own():
    x = torch.randn(3, 4, 5)
    scale, zero_point = torch.rand(3, 1, 1) + 0.01, torch.tensor([3.0, 0.0, 255.0]).view(3, 1, 1)
    q = affine._quantize_in_torch(x, scale, zero_point)
    for given in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
        assert torch.equal(affine.quantize_samples(given, scale, zero_point), q)
    one = affine.quantize_samples(x[0], scale[0][None], zero_point[0][None])
    assert torch.equal(one, q[0])
    expected = affine._dequantize_in_torch(q, scale, zero_point, torch.bfloat16)
    found = affine.dequantize_samples(q, scale, zero_point, torch.bfloat16)
    assert torch.equal(found, expected)
    assert affine.quantize_samples(x[:0], scale[:0], zero_point[:0]).shape == (0, 4, 5)


@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
def test_integers_lie_as_the_floats_do(dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 4).to(dtype).contiguous(memory_format=torch.channels_last)
    one, each = torch.tensor([0.01]), torch.tensor([0.01, 0.02]).view(2, 1, 1, 1)
    for found, scale in (
        (affine.quantize_uint8(x, one, one * 700), one),
        (affine.quantize_samples(x, each, each * 0 + 7), each),
    ):
        zero_point = one * 700 if scale is one else each * 0 + 7
        assert torch.equal(found, affine._quantize_in_torch(x, scale, zero_point))
        assert found.is_contiguous(memory_format=torch.channels_last)
        floats = affine.dequantize_samples(found[:1], one, zero_point.flatten()[:1], dtype)
        assert floats.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_are_read_with_torchs_bits(bits, symmetric):
    for out, columns, group_size in ((70, 72, 32), (64, 576, -1), (130, 147, -1), (1, 5, -1)):
        weight = quantize_weight(torch.randn(out, columns), bits, group_size, symmetric)
        layer = linear_of(weight, None, torch.float32)
        assert layer.backend == NATIVE.name
        assert torch.equal(layer.dequantize(), layer.quantized_weight.dequantize())
