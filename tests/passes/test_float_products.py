"""Quantized layers that multiply in float32 while others are fitted."""

import pytest
import torch
from torch import nn

import fxquant
from fxquant.modules.linear_int4 import QuantizedLinearInt4
from fxquant.numerics import quantized_weight
from fxquant.passes.float_products import multiply_as_made, multiply_in_float

QUIET = {"group_size": 32, "skip_param_threshold": 0, "accuracy_warning": "ignore"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [True, False])
@torch.no_grad()
def test_the_product_is_that_of_the_dequantized_weight(dtype, has_bias, monkeypatch):
    torch.manual_seed(0)
    layer = QuantizedLinearInt4.from_float(nn.Linear(64, 48, bias=has_bias))
    bias = layer.bias.double() if has_bias else torch.zeros(48).double()
    x = torch.randn(3, 5, 64).to(dtype)
    expected = (x.double() @ layer.dequantize().double().T + bias).to(dtype)
    before = layer(x)
    multiply_in_float(layer)
    whole = layer(x)
    monkeypatch.setattr(quantized_weight, "rows_of_block", lambda *_: 20)
    assert len(list(layer.weight_parts())) > 1
    for found in (whole, layer(x)):
        assert found.dtype == dtype
        near = 1e-2 if dtype is torch.bfloat16 else 1e-5
        assert torch.allclose(found, expected, rtol=near, atol=near)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), found)
    multiply_as_made(nn.Sequential(layer))
    assert torch.equal(layer(x), before)
    assert "forward" not in vars(layer)


def test_layers_with_int8_activations_and_others_stay_as_they_are():
    rounded = QuantizedLinearInt4.from_float(nn.Linear(64, 48))
    rounded.activation = "int8"
    for layer in (rounded, nn.Linear(4, 4)):
        multiply_in_float(layer)
        assert "forward" not in vars(layer)


class Two(nn.Module):
    """A tied pair, and two layers one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(300, 32)
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 32)
        self.head = nn.Linear(32, 300, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids):
        x = self.words(ids)
        return self.head(x + self.second(self.first(x).tanh()))


def test_while_layers_are_fitted_no_kernel_runs_and_afterwards_all_do(monkeypatch):
    torch.manual_seed(0)
    ran = []
    forward = QuantizedLinearInt4.forward
    monkeypatch.setattr(
        QuantizedLinearInt4, "forward", lambda self, x: (ran.append(len(x)), forward(self, x))[1]
    )
    batches = list(torch.randint(0, 300, (6, 4, 8)))
    gm, _ = fxquant.quantize(Two().eval(), batches, method="gptq", embeddings=4, **QUIET)
    measured = len(ran)
    assert measured <= 2 * 3 * 2  # each layer on the rows of two measurements
    gm(batches[0])
    assert len(ran) == measured + 3
    assert not [m for m in gm.modules() if "forward" in vars(m)]
