import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.errors import OptionError, WeightError
from fxquant.numerics.metrics import sqnr_db
from fxquant.numerics.weights import (
    calculate_scale_zp_groupwise,
    dequantize_weight_int4,
    quantize_weight_int4,
    quantize_weight_int8,
)

shapes = st.tuples(st.integers(1, 9), st.integers(1, 70), st.sampled_from([1, 3, 16, 32, 128]))


def weight_of(shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * scale


def naive_dequantize(packed, scales, zero_points, group_size, columns):
    rows = []
    for r in range(packed.shape[0]):
        row = []
        for c in range(columns):
            byte = int(packed[r, c // 2])
            q = byte & 15 if c % 2 == 0 else byte >> 4
            g = c // group_size
            row.append(float(scales[r, g]) * (q - float(zero_points[r, g])))
        rows.append(row)
    return torch.tensor(rows)


@given(shapes, st.booleans(), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_values_inside_the_range_are_off_by_half_a_step_at_most(shape, symmetric, seed):
    rows, columns, group_size = shape
    weight = weight_of((rows, columns), seed)
    packed, scales, zero_points = quantize_weight_int4(weight, group_size, symmetric)
    found = dequantize_weight_int4(packed, scales, zero_points, group_size, columns)
    expand = scales.repeat_interleave(group_size, 1)[:, :columns]
    zero = zero_points.repeat_interleave(group_size, 1)[:, :columns]
    ends = torch.stack((expand * (0 - zero), expand * (15 - zero)))
    inside = (weight >= ends.amin(0)) & (weight <= ends.amax(0))
    slack = 1 + 1e-3  # of float rounding
    assert ((weight - found).abs()[inside] <= expand.abs()[inside] / 2 * slack).all()
    assert inside.any() or columns * rows < 5  # a rounded scale may fall short of the extremes


@given(shapes, st.booleans())
@settings(max_examples=30, deadline=None)
def test_dequantizing_agrees_with_a_naive_loop(shape, symmetric):
    rows, columns, group_size = shape
    tensors = quantize_weight_int4(weight_of((rows, columns)), group_size, symmetric)
    found = dequantize_weight_int4(*tensors, group_size, columns)
    assert torch.allclose(found, naive_dequantize(*tensors, group_size, columns), rtol=1e-6)


@pytest.mark.parametrize(("symmetric", "floor"), [(True, 19.6), (False, 19.9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gaussian_weights_reach_the_floor_at_group_128(symmetric, floor, dtype):
    weight = weight_of((512, 1024)).to(dtype)
    tensors = quantize_weight_int4(weight, 128, symmetric)
    assert sqnr_db(weight, dequantize_weight_int4(*tensors, 128, 1024)) >= floor


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6])
def test_the_scale_of_a_weight_does_not_change_its_accuracy(scale):
    weight = weight_of((64, 256))
    tensors = quantize_weight_int4(weight * scale, 64, True)
    found = sqnr_db(weight * scale, dequantize_weight_int4(*tensors, 64, 256))
    reference = sqnr_db(weight, dequantize_weight_int4(*quantize_weight_int4(weight, 64), 64, 256))
    assert found == pytest.approx(reference, abs=0.3)


def test_symmetric_uses_all_sixteen_levels_and_one_zero_point():
    packed, _, zero_points = quantize_weight_int4(weight_of((64, 512)), 128)
    assert set((packed & 15).unique().tolist()) == set((packed >> 4).unique().tolist())
    assert set((packed & 15).unique().tolist()) == set(range(16))
    assert (zero_points == 8).all()


def test_one_group_over_all_columns_is_per_channel():
    weight = weight_of((8, 48))
    wide = calculate_scale_zp_groupwise(weight, 48, False)
    wider = calculate_scale_zp_groupwise(weight, 4096, False)
    assert torch.equal(wide[0], wider[0])
    low, high = weight.amin(1), weight.amax(1)
    assert torch.allclose(wide[0][:, 0], (high - low) / 15, rtol=4e-3)


def test_a_short_last_group_has_its_own_scale():
    weight = torch.cat((weight_of((4, 32)), weight_of((4, 5)) * 100), dim=1)
    packed, scales, zero_points = quantize_weight_int4(weight, 32)
    assert scales.shape == zero_points.shape == (4, 2)
    assert packed.shape == (4, 19)
    found = dequantize_weight_int4(packed, scales, zero_points, 32, 37)
    assert sqnr_db(weight[:, :32], found[:, :32]) > 18


@pytest.mark.parametrize("symmetric", [True, False])
def test_constant_and_zero_groups_are_kept(symmetric):
    weight = torch.cat((torch.zeros(2, 32), torch.full((2, 32), 5.0)), dim=1)
    tensors = quantize_weight_int4(weight, 32, symmetric)
    found = dequantize_weight_int4(*tensors, 32, 64)
    assert torch.equal(found[:, :32], torch.zeros(2, 32))
    assert torch.allclose(found[:, 32:], weight[:, 32:], rtol=4e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_with_its_count(bad):
    weight = weight_of((4, 32))
    weight[1, 3] = bad
    with pytest.raises(WeightError, match="1 of 128 elements NaN or Inf.*modules_to_not_convert"):
        quantize_weight_int4(weight)


@pytest.mark.parametrize("group_size", [0, -2, -1.0, 2.5, True])
def test_a_group_size_that_is_not_positive_is_refused(group_size):
    with pytest.raises(OptionError, match="group_size.*at least 1"):
        quantize_weight_int4(weight_of((4, 32)), group_size)


def test_dequantizing_with_another_group_size_is_refused():
    tensors = quantize_weight_int4(weight_of((4, 64)), 32)
    with pytest.raises(OptionError, match="group_size and in_features the weight was quantized"):
        dequantize_weight_int4(*tensors, 16, 64)


def test_int8_rows_are_off_by_half_a_step_at_most():
    weight = weight_of((32, 100)) * torch.logspace(-3, 3, 32)[:, None]
    quantized = quantize_weight_int8(weight)
    assert sqnr_db(weight, quantized.dequantize()) > 40
    error = (quantized.dequantize() - weight).abs().amax(1)
    assert (error <= quantized.scales[:, 0] * (0.5 + 127 * 2**-8)).all()
    assert torch.equal(quantize_weight_int8(torch.zeros(2, 4)).dequantize(), torch.zeros(2, 4))
