import copy

import pytest
import torch
from torch import nn

from fxquant import QuantizedLinearInt4, QuantizedLinearInt8, sqnr_db
from fxquant.errors import OptionError, WeightError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("leading", [(), (3,), (2, 5), (0,), (2, 1, 3)])
def test_any_leading_shape_and_dtype_comes_back(dtype, leading):
    linear = nn.Linear(77, 33)
    quantized = QuantizedLinearInt4.from_float(linear, group_size=32)
    x = torch.randn(*leading, 77).to(dtype)
    y = quantized(x)
    assert y.shape == (*leading, 33)
    assert y.dtype == dtype
    reference = x.double() @ quantized.weight.double().T + linear.bias.double()
    if x.numel():
        assert sqnr_db(reference.float(), y.float()) > 40


def test_the_buffers_have_the_promised_names_and_shapes():
    quantized = QuantizedLinearInt4.from_float(nn.Linear(100, 8), group_size=32)
    assert quantized._packed_weight.shape == (8, 50)
    assert quantized._packed_weight.dtype == torch.uint8
    assert quantized._scales.shape == quantized._zero_points.shape == (8, 4)
    assert quantized.weight.shape == (8, 100)


def test_changing_the_dtype_of_a_model_leaves_the_grid_alone():
    quantized = QuantizedLinearInt4.from_float(nn.Linear(64, 8), 32, symmetric=False)
    before = quantized.weight
    assert torch.equal(quantized.half().weight, before)
    assert quantized.bias.dtype == torch.float16
    assert torch.equal(copy.deepcopy(quantized).weight, before)


def test_a_state_dict_moves_the_weights_to_another_layer():
    one = QuantizedLinearInt4.from_float(nn.Linear(64, 8), 32)
    two = QuantizedLinearInt4.from_float(nn.Linear(64, 8), 32)
    two.load_state_dict(one.state_dict())
    x = torch.randn(3, 64)
    assert torch.equal(one(x), two(x))


def test_int8_activations_are_an_option_that_costs_little():
    linear = nn.Linear(256, 64)
    quantized = QuantizedLinearInt4.from_float(linear)
    x = torch.randn(16, 256)
    exact = x @ quantized.weight.T + linear.bias
    quantized.activation = "int8"
    assert 35 < sqnr_db(exact, quantized(x)) < 55
    with pytest.raises(OptionError, match="'float', 'int8'"):
        quantized.activation = "int4"


def test_int8_layers_are_accurate():
    linear = nn.Linear(300, 40)
    quantized = QuantizedLinearInt8.from_float(linear)
    x = torch.randn(2, 7, 300)
    assert sqnr_db(linear(x), quantized(x)) > 38
    assert quantized(x.bfloat16()).dtype == torch.bfloat16


def test_a_dequantized_layer_computes_the_same():
    quantized = QuantizedLinearInt4.from_float(nn.Linear(64, 32), 32)
    x = torch.randn(5, 64)
    assert sqnr_db(quantized.to_linear()(x), quantized(x)) > 45


def test_anything_but_a_linear_is_refused():
    with pytest.raises(WeightError, match="Conv1d.*torch.nn.Linear"):
        QuantizedLinearInt4.from_float(nn.Conv1d(4, 4, 1))


def test_compiles_as_one_graph():
    quantized = QuantizedLinearInt4.from_float(nn.Linear(64, 32), 32)
    x = torch.randn(5, 64)
    with torch.no_grad():
        compiled = torch.compile(quantized, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(x), quantized(x), atol=1e-6)
