"""What a model's own code may ask of a quantized layer: its weight, its dtype, its gradient."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import FxquantError
from fxquant.modules.lazy_weight import LazyWeight
from fxquant.modules.linear_int4 import QuantizedLinearInt4
from fxquant.modules.linear_int8 import QuantizedLinearInt8

KINDS = {"int4": lambda m: QuantizedLinearInt4.from_float(m, group_size=32),
         "int8": QuantizedLinearInt8.from_float}  # fmt: skip


@pytest.fixture(params=KINDS)
def layer(request):
    torch.manual_seed(0)
    return KINDS[request.param](nn.Linear(64, 48)).eval()


def test_looking_at_the_weight_does_not_dequantize_it(layer, monkeypatch):
    monkeypatch.setattr(type(layer), "dequantize", lambda self: pytest.fail("it was dequantized"))
    weight = layer.weight
    assert isinstance(weight, LazyWeight)
    assert (weight.shape, weight.dtype, weight.device.type) == ((48, 64), torch.float32, "cpu")
    assert "dequantized when it is used" in repr(weight)


def test_any_op_gets_the_values_of_the_weight(layer):
    wanted = layer.dequantize()
    assert torch.equal(layer.weight + 0, wanted)
    assert torch.equal(torch.cat([layer.weight, wanted]), torch.cat([wanted, wanted]))
    x = torch.randn(3, 64)
    torch.testing.assert_close(
        nn.functional.linear(x, layer.weight, layer.bias), layer(x), rtol=2e-2, atol=2e-2
    )
    assert torch.equal(copy.deepcopy(layer.weight), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(layer.weight)), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_weight_has_the_dtype_of_the_model(layer, dtype):
    layer = layer.to(dtype)
    assert layer.weight.dtype == dtype
    assert (layer.weight * 1).dtype == dtype
    assert layer.dequantize().dtype == torch.float32
    assert layer(torch.randn(2, 64, dtype=dtype)).dtype == dtype


def test_a_wrong_input_is_refused_in_words(layer):
    for x in (torch.randn(2, 63), torch.randint(0, 9, (2, 64)), torch.randn(())):
        with pytest.raises((FxquantError, RuntimeError), match="64|shape|float"):
            layer(x)


def test_the_input_has_a_gradient(layer):
    x = torch.randn(3, 64, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(
        x.grad, layer.dequantize().sum(0).expand(3, 64), rtol=2e-2, atol=2e-2
    )


def test_a_layer_is_copied_and_pickled_with_its_bits(layer):
    x = torch.randn(3, 64)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
        assert {id(b) for b in other.buffers()}.isdisjoint({id(b) for b in layer.buffers()})


@pytest.mark.filterwarnings("ignore::fxquant.swap.LeftFloatWarning")
def test_a_closure_of_a_copy_calls_the_copy():
    """A patched forward holds the original's method; the copy's must hold its own."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    old = model[0].forward
    model[0].forward = lambda x: old(x) * 2
    x = torch.randn(4, 64)
    swapped = fxquant.swap_modules(
        model,
        fxquant.static_quantize(
            model, [x], group_size=32, skip_param_threshold=0, accuracy_warning="ignore"
        )[0],
    )
    before = swapped(x)
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
    assert torch.equal(swapped(x), before)
