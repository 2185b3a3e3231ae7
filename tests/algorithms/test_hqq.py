import pytest
import torch

from fxquant.algorithms.hqq import NORM, half_quadratic
from fxquant.errors import OptionError, WeightError
from fxquant.numerics.metrics import sqnr_db
from fxquant.numerics.quantized_weight import SCALE_DTYPE, ZERO_POINT_DTYPE
from fxquant.numerics.weights import quantize_weight


def plain(weight, group_size, symmetric):
    return quantize_weight(weight, 4, group_size, symmetric)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("columns", "group_size"), [(256, 64), (100, 32), (40, 128)])
def test_its_norm_is_never_larger_than_that_of_plain_rounding(symmetric, columns, group_size):
    weight = torch.distributions.StudentT(3.0).sample((32, columns))
    found = half_quadratic(weight, group_size=group_size, symmetric=symmetric)

    def norm(quantized):
        return (quantized.dequantize() - weight).abs().pow(NORM).sum(1)

    before = norm(plain(weight, group_size, symmetric))
    assert (norm(found) <= before * (1 + 1e-5)).all()
    assert norm(found).sum() < 0.99 * before.sum()


def test_one_far_weight_costs_the_others_less():
    weight = torch.randn(16, 128)
    weight[:, 0] = 12.0
    rest = slice(1, None)
    found = half_quadratic(weight, symmetric=True).dequantize()[:, rest]
    rounded = plain(weight, 128, True).dequantize()[:, rest]
    assert sqnr_db(weight[:, rest], found) > sqnr_db(weight[:, rest], rounded)


def test_the_result_is_what_is_stored():
    found = half_quadratic(torch.randn(8, 64).bfloat16(), group_size=32, symmetric=False)
    assert torch.equal(found.scales, found.scales.to(SCALE_DTYPE).float())
    assert torch.equal(found.zero_points, found.zero_points.to(ZERO_POINT_DTYPE).float())


@pytest.mark.parametrize("weight", [torch.zeros(4, 32), torch.ones(4, 32), torch.eye(32) * 1e-20])
@pytest.mark.parametrize("symmetric", [True, False])
def test_degenerate_weights_are_exact_or_finite(weight, symmetric):
    found = half_quadratic(weight, group_size=16, symmetric=symmetric).dequantize()
    assert torch.isfinite(found).all()
    assert torch.allclose(found, weight, rtol=0.01, atol=1e-12)


def test_bad_input_is_an_error():
    with pytest.raises(WeightError, match="NaN"):
        half_quadratic(torch.full((2, 4), torch.nan))
    with pytest.raises(OptionError, match="group_size"):
        half_quadratic(torch.randn(2, 4), group_size=0)
