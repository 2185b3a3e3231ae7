import copy

import pytest
import torch

from fxquant import sqnr_db
from fxquant.modules.grouped_linear import GroupedLinear, QuantizedGroupedLinear
from fxquant.modules.weight_forms import form_of
from fxquant.numerics.integers import WIDTHS
from fxquant.numerics.weights import quantize_weight

E, I, O = 4, 64, 24  # noqa: E741


def pair(bits=4, bias=True):
    layer = GroupedLinear.on(torch.randn(E, O, I) / 8, torch.randn(E, O) if bias else None)
    form = form_of(layer)
    weight = quantize_weight(form.matrix(layer), bits, 32)
    return layer, form.quantized(layer, weight, form.bias(layer), None)


def naive(layer, x, numbers):
    """Row by row."""
    bias = torch.zeros(E, O) if layer.bias is None else layer.bias
    return torch.stack([layer.weight[e] @ row + bias[e] for row, e in zip(x, numbers, strict=True)])


@pytest.mark.parametrize("bias", [True, False])
def test_rows_meet_their_expert_in_each_of_the_three_ways(bias):
    layer, quantized = pair(bias=bias)
    floats = quantized.to_float()
    x, numbers = torch.randn(9, I), torch.tensor([0, 0, 0, 1, 3, 3, 3, 3, 3])  # nothing for 2
    offsets = torch.tensor([3, 4, 4, 9])
    expected = naive(layer, x, numbers)
    assert torch.allclose(layer(x, offsets), expected, atol=1e-5)
    order = torch.randperm(9)
    assert torch.allclose(layer(x[order], None, numbers[order]), expected[order], atol=1e-5)
    aligned = torch.randn(2, E, 5, I)
    each = torch.stack([naive(layer, aligned[0, e], [e] * 5) for e in range(E)])
    assert torch.allclose(layer(aligned)[0], each, atol=1e-5)
    assert layer(aligned[0, 0]).shape == (E, 5, O)
    for arguments in ((x, offsets), (x[order], None, numbers[order]), (aligned,)):
        assert sqnr_db(floats(*arguments), quantized(*arguments)) > 35
        assert sqnr_db(layer(*arguments), quantized(*arguments)) > 15


def test_rows_behind_the_last_offset_are_zero():
    for layer in pair(bias=False):
        y = layer(torch.randn(6, I), torch.tensor([1, 2, 2, 4]))
        assert y[4:].abs().max() == 0


def test_only_experts_that_are_met_run(monkeypatch):
    _, quantized = pair()
    met = []
    for i, part in enumerate(quantized.layers):
        part.register_forward_hook(lambda *_, i=i: met.append(i))
    quantized(torch.randn(3, I), torch.tensor([0, 2, 2, 3]))
    assert met == [1, 3]
    assert quantized(torch.randn(0, I), torch.zeros(E, dtype=torch.int32)).shape == (0, O)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_width_keeps_rows_bias_and_shape(bits):
    layer, quantized = pair(bits)
    assert quantized.bits == bits
    assert quantized.weight.shape == layer.weight.shape
    rows = torch.cat(list(quantized.weight_parts()))
    assert torch.equal(rows, quantized.dequantize().flatten(0, 1))
    assert torch.equal(quantized.bias, layer.bias)
    x = torch.randn(4, I)
    numbers = torch.arange(4)
    assert torch.equal(copy.deepcopy(quantized)(x, None, numbers), quantized(x, None, numbers))


def test_experts_share_no_memory():
    _, quantized = pair(3)
    one, two = (layer.packed_memory for layer in quantized.layers[:2])
    assert one.untyped_storage().data_ptr() != two.untyped_storage().data_ptr()
    assert isinstance(quantized, QuantizedGroupedLinear)
