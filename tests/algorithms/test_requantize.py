"""A changed weight in the form of the quantized one that it was."""

import pytest
import torch

import fxquant
from fxquant.algorithms.requantize import requantize
from fxquant.algorithms.rtn import round_to_nearest
from fxquant.numerics.weights import quantize_weight_int8

FORMS = [
    {"bits": 4, "group_size": 32}, {"bits": 4, "group_size": 32, "symmetric": False},
    {"bits": 3, "group_size": 48, "symmetric": False, "integer_zero_points": True},
    {"bits": 8, "group_size": 32}, {"bits": 2, "group_size": -1}, None,
]  # fmt: skip


def quantized(form):
    torch.manual_seed(0)
    weight = torch.randn(24, 80)
    return quantize_weight_int8(weight) if form is None else round_to_nearest(weight, **form)


@pytest.mark.parametrize("form", FORMS)
def test_an_unchanged_weight_keeps_its_integers(form):
    old = quantized(form)
    new = requantize(old.dequantize(), old)
    for name in ("packed", "scales", "zero_points"):
        assert torch.equal(getattr(new, name), getattr(old, name))


@pytest.mark.parametrize("size", [1e-4, 0.03, 3.0])
@pytest.mark.parametrize("form", FORMS)
def test_no_change_makes_a_weight_worse_than_before_or_than_rounding_it_anew(form, size):
    old = quantized(form)
    changed = old.dequantize() + size * torch.randn(24, 80)
    new = requantize(changed, old)
    fresh = quantize_weight_int8(changed) if form is None else round_to_nearest(changed, **form)
    error = (new.dequantize() - changed).square().sum()
    for other in (old, fresh):
        assert error <= (other.dequantize() - changed).square().sum() * (1 + 1e-6)
    assert (new.bits, new.group_size, new.symmetric) == (old.bits, old.group_size, old.symmetric)


def test_whole_zero_points_stay_whole():
    old = quantized(FORMS[2])
    zeros = requantize(old.dequantize() + torch.randn(24, 80), old).zero_points
    assert torch.equal(zeros, zeros.round())


def test_eight_bits_a_row_never_get_the_lowest_integer():
    old = quantized(None)
    assert requantize(old.dequantize() * 1.004, old).integers().min() >= 1


def test_a_weight_that_is_not_finite_is_refused():
    with pytest.raises(fxquant.WeightError, match="NaN or Inf"):
        requantize(torch.full((24, 80), torch.nan), quantized(FORMS[0]))
