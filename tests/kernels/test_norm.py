"""Norms and the functions behind linear layers in C++, against torch in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxquant.kernels import norm as kernel
from fxquant.kernels.extension import NOT_BUILT, _native
from fxquant.kernels.functions import FUNCTIONS, gate_order
from fxquant.kernels.norm import add_and_norm, norm
from fxquant.modules.linear_intn import QuantizedLinearIntN

SETS = _native.instruction_sets() if NOT_BUILT is None else []
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=SETS)
def instruction_set(request):
    _native.use(request.param)
    yield request.param
    _native.use(SETS[0])


def tolerance(dtype):
    return 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 7, 64, 100])
@pytest.mark.usefixtures("instruction_set")
def test_norms_of_sums(dtype, columns):
    torch.manual_seed(0)
    x, y = torch.randn(2, 5, columns, dtype=dtype) + 3, torch.randn(2, 5, columns, dtype=dtype)
    weight, bias = torch.randn(2, columns, dtype=dtype)
    total = x + y
    right = F.layer_norm(total.double(), (columns,), weight.double(), bias.double(), 1e-5)
    mean = total.double().pow(2).mean(-1, keepdim=True)
    rms = total.double() * torch.rsqrt(mean + 1e-6) * weight.double()
    for found, expected in (
        (norm(x, y, weight, bias, 1e-5), right),
        (norm(total, None, weight, bias, 1e-5), right),
        (norm(x, y, weight, None, 1e-6, "rms"), rms),
        (norm(total, None, weight, None, 1e-6, "rms", dtype), rms),
    ):
        assert found.dtype == dtype
        assert torch.allclose(
            found.double(), expected, rtol=tolerance(dtype), atol=tolerance(dtype)
        )
    both = add_and_norm(x, y, weight, bias, 1e-5)
    assert torch.equal(both[0], total)
    assert torch.equal(both[1], norm(x, y, weight, bias, 1e-5))


def test_what_the_kernel_does_not_take_goes_to_torch():
    weight, bias = torch.randn(2, 16)
    wide = torch.randn(2, 5, 32)
    for x, y in (
        (torch.randn(2, 5, 16), torch.randn(1, 5, 16)),
        (wide[..., ::2], wide[..., ::2]),
        (torch.randn(2, 5, 16), torch.randn(2, 5, 16, requires_grad=True)),
        (torch.randn(0, 16), torch.randn(0, 16)),
    ):
        expected = F.layer_norm(x + y, (16,), weight, bias, 1e-5)
        assert torch.equal(norm(x, y, weight, bias, 1e-5), expected)
        assert torch.equal(add_and_norm(x, y, weight, bias, 1e-5)[1], expected)
    with pytest.raises(RuntimeError):
        norm(wide, wide, weight, bias, 1e-5)


def test_nan_and_the_self_test():
    x = torch.randn(3, 16)
    x[1, 2] = torch.nan
    found = norm(x, x, torch.ones(16), None, 1e-5)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()
    assert kernel.FAULT == NOT_BUILT


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.usefixtures("instruction_set")
def test_functions_behind_a_layer(function):
    layer = QuantizedLinearIntN.rounded(nn.Linear(1, 8001), 8, -1)
    layer.bias.copy_(torch.cat([torch.linspace(-12, 12, 8000), torch.tensor([1e-30])]))
    x = torch.zeros(1, 1)
    found = layer.forward_then(x, function)
    expected = FUNCTIONS[function](layer.bias.double())
    limit = 1e-6 * expected.abs().clamp(min=1)
    assert ((found[0].double() - expected).abs() <= limit).all()


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.usefixtures("instruction_set")
def test_functions_of_what_is_not_finite(function):
    layer = QuantizedLinearIntN.rounded(nn.Linear(1, 4), 8, -1)
    layer.bias.copy_(torch.tensor([torch.nan, torch.inf, 1e30, -1e30]))
    found = layer.forward_then(torch.zeros(1, 1), function)[0]
    expected = FUNCTIONS[function](layer.bias)
    largest = expected[2]  # torch's own gelu of infinity is not a number on some CPUs
    expected[1] = torch.inf if largest > 1 else largest
    assert torch.allclose(found, expected, equal_nan=True, atol=1e-6)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.usefixtures("instruction_set")
def test_a_gate_is_a_function_of_one_half_times_the_other(function, rows):
    torch.manual_seed(0)
    gate_layer, up, both = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(64, 192)
    order = gate_order(96)
    with torch.no_grad():
        both.weight.copy_(torch.cat([gate_layer.weight, up.weight])[order])
        both.bias.copy_(torch.cat([gate_layer.bias, up.bias])[order])
    both, gate_layer, up = (
        QuantizedLinearIntN.rounded(layer, 4, 32) for layer in (both, gate_layer, up)
    )
    x = torch.randn(rows, 64)
    with torch.no_grad():
        expected = FUNCTIONS[function](gate_layer(x)) * up(x)
        found = both.forward_then(x, function, is_gated=True)
        assert found.shape == (rows, 96)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(both.forward_then(x[:1], function, is_gated=True), found[:1])
        wide = both.forward_then(x.double(), function, is_gated=True)
        torch.testing.assert_close(wide.float(), expected, rtol=1e-5, atol=1e-5)
    x.requires_grad_()
    both.forward_then(x, function, is_gated=True).sum().backward()
    gradient, x.grad = x.grad, None
    (FUNCTIONS[function](gate_layer(x)) * up(x)).sum().backward()
    torch.testing.assert_close(gradient, x.grad)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_functions_in_other_dtypes_and_with_gradients(dtype):
    torch.manual_seed(0)
    layer = QuantizedLinearIntN.rounded(nn.Linear(32, 40), 4, 32)
    x = torch.randn(3, 32).to(dtype).requires_grad_()
    for function in FUNCTIONS:
        with torch.no_grad():
            found, expected = layer.forward_then(x, function), FUNCTIONS[function](layer(x))
            assert found.dtype == dtype
            limit = max(tolerance(dtype), 1e-6)
            assert torch.allclose(found, expected, rtol=limit, atol=limit)
        layer.forward_then(x, function).sum().backward()
        gradient, x.grad = x.grad, None
        FUNCTIONS[function](layer(x)).sum().backward()
        assert torch.equal(gradient, x.grad)
        x.grad = None
