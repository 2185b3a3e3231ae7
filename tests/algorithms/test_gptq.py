import pytest
import torch

from fxquant.algorithms.gptq import DAMPING, corrected_bias, gptq, quantization_loss
from fxquant.algorithms.rtn import round_to_nearest
from fxquant.numerics.grouping import expand_groups
from fxquant.observers.moments import LayerMoments


def correlated(tokens, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) / width**0.5
    scales = torch.logspace(-1, 1, width)
    return torch.randn(tokens, width, generator=generator) @ mixing * scales + 0.3


def moments_of(x, out_features=1, shift=None):
    moments = LayerMoments(x.shape[-1], out_features)
    moments.add(x, shift)
    return moments


def naive_gptq(weight, hessian, scales, zeros):
    """Column by column with an explicit inverse, as in Optimal Brain Quantization."""
    columns = weight.shape[1]
    order = hessian.diagonal().argsort(descending=True)
    hessian = hessian[order][:, order].double()
    hessian = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(
        columns, dtype=torch.float64
    )
    weight, scales, zeros = (t[:, order].double() for t in (weight, scales, zeros))
    inverse = torch.linalg.inv(hessian)
    result = torch.empty_like(weight)
    for i in range(columns):
        q = (weight[:, i] / scales[:, i] + zeros[:, i]).round().clamp(0, 15)
        value = scales[:, i] * (q - zeros[:, i])
        result[:, i] = value
        error = (weight[:, i] - value) / inverse[i, i]
        weight = weight - error[:, None] * inverse[i]
        inverse = inverse - inverse[:, i : i + 1] @ inverse[i : i + 1] / inverse[i, i]
    back = torch.empty_like(result)
    back[:, order] = result
    return back.float()


@pytest.mark.parametrize(("columns", "group_size"), [(96, 32), (150, 64), (40, 128)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_blocks_give_what_the_naive_column_loop_gives(columns, group_size, symmetric):
    weight, moments = torch.randn(24, columns), moments_of(correlated(500, columns))
    options = {"group_size": group_size, "symmetric": symmetric}
    found = gptq(weight, moments, **options)
    scales = expand_groups(found.scales, group_size, columns)
    zeros = expand_groups(found.zero_points, group_size, columns)
    naive = naive_gptq(weight, moments.hessian, scales, zeros)
    same = (found.dequantize() - naive).abs() < 1e-4
    assert same.float().mean() > 0.97  # a value between two levels may fall to either side
    loss, naive_loss = (quantization_loss(weight, w, moments) for w in (found.dequantize(), naive))
    assert loss == pytest.approx(naive_loss, rel=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_loses_much_less_than_rounding(dtype):
    weight, moments = torch.randn(64, 256).to(dtype), moments_of(correlated(2000, 256))
    rounded = round_to_nearest(weight).dequantize()
    fitted = gptq(weight, moments).dequantize()
    assert quantization_loss(weight, fitted, moments) < 0.5 * quantization_loss(
        weight, rounded, moments
    )


def test_the_corrected_bias_makes_the_mean_output_the_float_one():
    x, weight = correlated(1000, 64), torch.randn(16, 64)
    x_float, bias = x + 0.1, torch.randn(16)
    moments = moments_of(x, 16, (x_float - x) @ weight.T)
    quantized = round_to_nearest(weight, group_size=32).dequantize()
    fixed = corrected_bias(weight, quantized, bias, moments)
    expected = (x_float @ weight.T + bias).mean(0)
    assert torch.allclose((x @ quantized.T + fixed).mean(0), expected, atol=1e-4)
    assert corrected_bias(weight, quantized, bias, LayerMoments(64, 16)) is bias


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(10, 64),
        torch.randn(1, 64),
        torch.ones(50, 1) @ torch.randn(1, 64),
        torch.cat((torch.randn(100, 32), torch.zeros(100, 32)), dim=1),
        torch.randn(100, 64) * 1e-12,
        torch.randn(100, 64) * 1e8,
    ],
    ids=["zero", "one token", "rank one", "dead half", "tiny", "huge"],
)
def test_degenerate_inputs_have_a_finite_result_no_worse_than_rounding(x):
    weight, moments = torch.randn(16, 64), moments_of(x)
    found = gptq(weight, moments, group_size=32).dequantize()
    assert torch.isfinite(found).all()
    rounded = round_to_nearest(weight, group_size=32, importance=moments.importance).dequantize()
    limit = quantization_loss(weight, rounded, moments) * 1.01 + 1e-30
    assert quantization_loss(weight, found, moments) <= limit


def test_without_tokens_it_rounds_to_nearest():
    weight = torch.randn(16, 64)
    found = gptq(weight, LayerMoments(64, 16), group_size=32)
    assert torch.equal(found.packed, round_to_nearest(weight, group_size=32).packed)
