import pytest
import torch

from fxquant.algorithms.gptq import gptq
from fxquant.algorithms.hqq import half_quadratic
from fxquant.algorithms.refine import refine
from fxquant.algorithms.rtn import round_to_nearest
from fxquant.numerics.integers import WIDTHS
from fxquant.numerics.metrics import sqnr_db
from fxquant.numerics.weights import quantize_weight
from fxquant.observers.moments import LayerMoments

WHOLE = {"symmetric": False, "integer_zero_points": True, "group_size": 32}


def check(found):
    zeros = found.zero_points
    assert torch.equal(zeros, zeros.round())
    assert zeros.min() >= 0
    assert zeros.max() < 2**found.bits
    assert not torch.signbit(zeros).any()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0])
def test_zero_points_are_levels_of_the_width(bits, shift):
    weight = torch.randn(16, 100) + shift
    for found in (
        round_to_nearest(weight, bits=bits, **WHOLE),
        half_quadratic(weight, bits=bits, **WHOLE),
        quantize_weight(weight, bits, **WHOLE),
    ):
        check(found)
        assert sqnr_db(weight, found.dequantize()) > 2.5 * bits


def test_choosing_them_before_rounding_keeps_what_rounding_them_later_loses():
    weight = torch.randn(256, 512)
    fraction = round_to_nearest(weight, group_size=32, symmetric=False)
    whole = sqnr_db(weight, round_to_nearest(weight, **WHOLE).dequantize())
    symmetric = sqnr_db(weight, round_to_nearest(weight, group_size=32).dequantize())
    later = fraction.scales.repeat_interleave(32, 1) * (
        fraction.integers() - fraction.zero_points.round().repeat_interleave(32, 1)
    )
    assert sqnr_db(weight, later) + 2 < symmetric < whole
    assert whole > sqnr_db(weight, fraction.dequantize()) - 0.7


def test_gptq_and_refine_choose_integers_for_them():
    weight, x = torch.randn(32, 96), torch.randn(600, 96) @ torch.randn(96, 96)
    moments = LayerMoments(96, 1)
    moments.add(x)
    plain = round_to_nearest(weight, **WHOLE)
    fitted = gptq(weight, moments, **WHOLE)
    refined = refine(weight, fitted, moments, integer_zero_points=True)
    losses = []
    for found in (plain, fitted, refined):
        check(found)
        losses.append(float(((found.dequantize() - weight) @ x.T).square().mean()))
    assert losses[0] > losses[1] > losses[2]
