import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.errors import OptionError, WeightError
from fxquant.numerics.integers import WIDTHS
from fxquant.numerics.metrics import sqnr_db
from fxquant.numerics.weights import quantize_weight

every_width = pytest.mark.parametrize("bits", WIDTHS)
both_grids = pytest.mark.parametrize("symmetric", [True, False])


def naive_dequantize(made):
    """From the bits of the packed rows, one weight at a time."""
    values = []
    for r, row in enumerate(made.packed.tolist()):
        stream = sum(byte << (8 * i) for i, byte in enumerate(row))
        for c in range(made.in_features):
            q = stream >> (c * made.bits) & ((1 << made.bits) - 1)
            g = c // made.group_size
            values.append(float(made.scales[r, g]) * (q - float(made.zero_points[r, g])))
    return torch.tensor(values).view(made.shape)


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 70),
    group_size=st.sampled_from([-1, 1, 3, 16, 32, 128, 2**40]),
    symmetric=st.booleans(),
    bits=st.sampled_from(WIDTHS),
)
@settings(max_examples=60, deadline=None)
def test_values_are_those_of_a_naive_loop_and_off_by_half_a_step_inside_the_range(
    rows, columns, group_size, symmetric, bits
):
    weight = torch.randn(rows, columns)
    made = quantize_weight(weight, bits, group_size, symmetric)
    found = made.dequantize()
    assert torch.allclose(found, naive_dequantize(made), rtol=1e-6)
    assert torch.equal(torch.cat(list(made.parts())), found)
    size = columns if group_size == -1 else min(group_size, columns)
    scale, zero = (
        t.repeat_interleave(size, 1)[:, :columns] for t in (made.scales, made.zero_points)
    )
    ends = torch.stack((scale * (0 - zero), scale * ((1 << bits) - 1 - zero)))
    inside = (weight >= ends.amin(0)) & (weight <= ends.amax(0))
    assert ((weight - found).abs()[inside] <= scale.abs()[inside] * 0.5005).all()
    saved = made.to_saved()
    stored = sum(t.numel() * t.element_size() for t in saved[:2])
    stored += 2 if symmetric else 2 * saved[2].numel()
    assert made.nbytes == stored


@both_grids
def test_a_bit_is_worth_about_six_db(symmetric):
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    found = {
        bits: sqnr_db(weight, quantize_weight(weight, bits, 64, symmetric).dequantize())
        for bits in WIDTHS
    }
    for bits in (3, 4, 5, 6):
        if bits - 1 in found:
            assert 4.5 < found[bits] - found[bits - 1] < 7.5
    assert 11 < found[8] - found[6] < 13


@every_width
def test_symmetric_weights_use_all_levels_and_one_zero_point(bits):
    made = quantize_weight(torch.randn(64, 512), bits, 128)
    assert made.integers().unique().tolist() == list(range(1 << bits))
    assert (made.zero_points == 1 << (bits - 1)).all()


@every_width
@both_grids
def test_minus_one_is_one_group_a_row(bits, symmetric):
    weight = torch.randn(8, 48)
    one, other = (quantize_weight(weight, bits, size, symmetric) for size in (-1, 48))
    assert one.scales.shape == (8, 1)
    assert one.group_size == 48
    assert torch.equal(one.packed, other.packed)
    assert torch.equal(one.scales, other.scales)


@every_width
@both_grids
def test_constant_zero_and_far_groups_stay_sound(bits, symmetric):
    far = 1000 + torch.rand(2, 32)
    weight = torch.cat((torch.zeros(2, 32), torch.full((2, 32), 5.0), far), dim=1)
    made = quantize_weight(weight, bits, 32, symmetric)
    found = made.dequantize()
    assert torch.equal(found[:, :32], torch.zeros(2, 32))
    assert torch.allclose(found[:, 32:64], weight[:, 32:64], rtol=8e-3)
    assert torch.isfinite(made.zero_points.half()).all()
    step = 1001 / ((1 << bits) - 1) if not symmetric else 1001 / (1 << (bits - 1))
    assert ((found - weight)[:, 64:].abs() <= step).all()


@pytest.mark.parametrize("bits", [0, 1, 7, 9, 16, -4, 4.0, True, "4", None])
def test_a_width_that_does_not_exist_is_refused(bits):
    with pytest.raises(OptionError, match="bits.*one of 2, 3, 4, 5, 6, 8"):
        quantize_weight(torch.randn(4, 32), bits)


@every_width
@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0), (8,), (2, 2, 2)])
def test_a_weight_without_elements_or_of_another_shape_is_refused(bits, shape):
    with pytest.raises(WeightError, match=r"a floating-point matrix \[out, in\] that is not empty"):
        quantize_weight(torch.zeros(shape), bits)


@every_width
def test_a_weight_with_nan_is_refused(bits):
    with pytest.raises(WeightError, match="1 of 32 elements NaN or Inf"):
        quantize_weight(torch.randn(1, 32).index_fill(1, torch.tensor(3), torch.nan), bits)
