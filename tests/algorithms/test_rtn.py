import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.algorithms.rtn import round_to_nearest
from fxquant.numerics.metrics import sqnr_db
from fxquant.numerics.weights import dequantize_weight_int4, quantize_weight_int4


@pytest.mark.parametrize(("symmetric", "floor"), [(True, 20.2), (False, 20.3)])
def test_the_clip_search_reaches_the_floor_on_gaussian_weights(symmetric, floor):
    weight = torch.randn(512, 1024)
    found = round_to_nearest(weight, group_size=128, symmetric=symmetric)
    assert sqnr_db(weight, found.dequantize()) >= floor


@given(st.integers(1, 5), st.integers(1, 80), st.sampled_from([16, 32]), st.booleans())
@settings(max_examples=50, deadline=None)
def test_no_group_is_worse_than_with_its_full_range(rows, columns, group_size, symmetric):
    weight = torch.distributions.StudentT(3.0).sample((rows, columns))
    plain = quantize_weight_int4(weight, group_size, symmetric)
    full = dequantize_weight_int4(*plain, group_size, columns) - weight
    found = round_to_nearest(weight, group_size=group_size, symmetric=symmetric)
    best = found.dequantize() - weight
    for start in range(0, columns, group_size):
        part = slice(start, start + group_size)
        limit = full[:, part].square().sum(1) * (1 + 1e-4) + 1e-12
        assert (best[:, part].square().sum(1) <= limit).all()


def test_importance_moves_the_error_to_columns_that_do_not_count():
    weight = torch.randn(256, 128)
    importance = torch.ones(128)
    importance[:32] = 100.0
    plain = round_to_nearest(weight).dequantize() - weight
    weighted = round_to_nearest(weight, importance=importance).dequantize() - weight
    assert weighted[:, :32].square().sum() < plain[:, :32].square().sum()
    assert weighted.square().sum() > plain.square().sum()


def test_dead_inputs_count_alike():
    weight = torch.randn(16, 64)
    found = round_to_nearest(weight, group_size=32, importance=torch.zeros(64))
    assert torch.equal(found.packed, round_to_nearest(weight, group_size=32).packed)
