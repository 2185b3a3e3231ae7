import pytest
import torch

from fxquant.algorithms.gptq import DAMPING, gptq
from fxquant.algorithms.refine import refine
from fxquant.algorithms.rtn import round_to_nearest
from fxquant.numerics.weights import SCALE_DTYPE, ZERO_POINT_DTYPE
from fxquant.observers.moments import LayerMoments, damped


def moments_of(x):
    moments = LayerMoments(x.shape[-1], 1)
    moments.add(x)
    return moments


def correlated(tokens, width):
    return torch.randn(tokens, width) @ torch.randn(width, width) * torch.logspace(-1, 0.5, width)


def damped_error(weight, quantized, moments):
    difference = quantized.dequantize() - weight.float()
    return ((difference @ damped(moments.hessian, DAMPING)) * difference).sum(1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", [96, 100])  # 100: the last group is short
@pytest.mark.parametrize("start", [gptq, round_to_nearest])
def test_every_row_gets_better_or_stays(columns, symmetric, start):
    weight, moments = torch.randn(24, columns), moments_of(correlated(800, columns))
    options = {"group_size": 32, "symmetric": symmetric}
    before = start(weight, moments, **options) if start is gptq else start(weight, **options)
    after = refine(weight, before, moments)
    old, new = (damped_error(weight, q, moments) for q in (before, after))
    assert (new <= old * (1 + 1e-3)).all()
    assert new.sum() < 0.97 * old.sum()


def test_the_result_is_what_is_stored():
    weight, moments = torch.randn(8, 64), moments_of(correlated(300, 64))
    found = refine(weight, gptq(weight, moments, group_size=32, symmetric=False), moments)
    assert torch.equal(found.scales, found.scales.to(SCALE_DTYPE).float())
    assert torch.equal(found.zero_points, found.zero_points.to(ZERO_POINT_DTYPE).float())
    symmetric = refine(weight, gptq(weight, moments, group_size=32), moments)
    assert (symmetric.zero_points == 8).all()


def test_coordinate_descent_ends_where_no_single_integer_is_better():
    weight, moments = torch.randn(4, 16), moments_of(correlated(200, 16))
    found = round_to_nearest(weight, group_size=16)
    for _ in range(8):
        found = refine(weight, found, moments)
    integers = found.dequantize() / found.scales + 8
    best = damped_error(weight, found, moments)
    for column in range(16):
        for change in (-1, 1):
            q = integers.clone()
            q[:, column] = (q[:, column] + change).clamp(0, 15)
            other = (q - 8) * found.scales - weight
            error = ((other @ damped(moments.hessian, DAMPING)) * other).sum(1)
            assert (error >= best * (1 - 1e-4)).all()


@pytest.mark.parametrize(
    "x",
    [torch.zeros(10, 64), torch.randn(1, 64), torch.randn(100, 64) * 1e-12],
    ids=["zero", "one token", "tiny"],
)
def test_degenerate_inputs_have_a_finite_result(x):
    weight, moments = torch.randn(16, 64), moments_of(x)
    found = refine(weight, round_to_nearest(weight, group_size=32, symmetric=False), moments)
    assert torch.isfinite(found.dequantize()).all()


def test_without_tokens_nothing_changes():
    weight = torch.randn(8, 64)
    rounded = round_to_nearest(weight, group_size=32)
    assert refine(weight, rounded, LayerMoments(64, 1)) is rounded
