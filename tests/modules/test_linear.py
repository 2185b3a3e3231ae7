import copy

import pytest
import torch
from torch import nn

from fxquant import QuantizedLinearInt4, QuantizedLinearInt8, sqnr_db
from fxquant.errors import OptionError, WeightError
from fxquant.kernels.choose import BACKENDS
from fxquant.kernels.interface import LinearSpec
from fxquant.measure.sizes import model_bytes, stored_elements
from fxquant.numerics.weights import quantize_weight_int4

CPU = torch.device("cpu")
SERVING = [b.name for b in BACKENDS.values() if not b.unsupported(LinearSpec(8, 64, 32, True), CPU)]
every_backend = pytest.mark.parametrize("backend", SERVING)
grids = pytest.mark.parametrize("symmetric", [True, False])


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
    before = quantized.dequantize()
    assert torch.equal(quantized.half().dequantize(), before)
    assert quantized.bias.dtype == quantized.weight.dtype == torch.float16
    assert torch.equal(quantized.weight, before.half())
    assert torch.equal(copy.deepcopy(quantized).dequantize(), before)


def test_a_state_dict_moves_the_weights_to_another_layer():
    one = QuantizedLinearInt4.from_float(nn.Linear(64, 8), 32)
    two = QuantizedLinearInt4.from_float(nn.Linear(64, 8), 32)
    two.load_state_dict(one.state_dict())
    x = torch.randn(3, 64)
    assert torch.equal(one(x), two(x))


def int4(symmetric=True, i=100, o=24, bias=True):
    return QuantizedLinearInt4.from_float(nn.Linear(i, o, bias=bias), 32, symmetric)


def is_same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@grids
@every_backend
def test_only_one_layout_is_in_memory(symmetric, backend, monkeypatch):
    monkeypatch.setenv("FXQUANT_BACKEND", backend)
    quantized = QuantizedLinearInt4.from_float(nn.Linear(512, 256, bias=False), 128, symmetric)
    stored = sum(stored_elements(b) * b.element_size() for b in quantized.buffers())
    limit = {"native": 4.25, "reference": 4.26, "aten": 4.25 if symmetric else 4.5}[backend]
    assert 8 * stored / (512 * 256) <= limit
    assert model_bytes(quantized) == quantized.saved_bytes
    saved = sum(stored_elements(t) * t.element_size() for t in quantized.saved_tensors().values())
    assert saved == quantized.saved_bytes - (2 if symmetric else 0)  # the one zero point


@grids
@every_backend
def test_the_saved_layout_is_the_same_whatever_the_kernel(symmetric, backend, monkeypatch):
    linear = nn.Linear(100, 24)
    packed, scales, zero_points = quantize_weight_int4(linear.weight.detach(), 32, symmetric)
    monkeypatch.setenv("FXQUANT_BACKEND", backend)
    layer = QuantizedLinearInt4.from_float(linear, 32, symmetric)
    state = layer.state_dict()
    assert list(state) == ["bias", "_packed_weight", "_scales", "_zero_points"]
    assert torch.equal(state["_packed_weight"], packed)
    assert torch.equal(state["_scales"], scales.bfloat16())
    assert torch.equal(state["_zero_points"], zero_points.half())
    monkeypatch.setenv("FXQUANT_BACKEND", "reference")
    other = int4(symmetric)
    other.load_state_dict(state)
    assert is_same(other.state_dict(), state)
    assert is_same(copy.deepcopy(layer).state_dict(), state)
    rebuilt = QuantizedLinearInt4.rebuild(layer.describe(), layer.saved_tensors())
    assert is_same(rebuilt.state_dict(), state)
    assert rebuilt.backend == "reference"


@grids
def test_a_layer_survives_other_devices_and_dtypes(symmetric):
    layer = int4(symmetric)
    state, x = layer.state_dict(), torch.randn(3, 100)
    y = layer(x)
    assert is_same(layer.double().state_dict() | {"bias": state["bias"]}, state)
    assert torch.equal(layer.float()(x), y)
    layer.to("meta")
    assert layer.backend == "reference"
    assert layer(x.to("meta")).shape == (3, 24)
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
    layer.load_state_dict(state, assign=True)
    assert torch.equal(layer(x), y)
    emptied = int4(symmetric).to("meta").to_empty(device="cpu")
    emptied.load_state_dict(state)
    assert torch.equal(emptied(x), y)


def test_a_state_dict_that_does_not_fit_says_what_is_needed():
    state = int4(symmetric=False).state_dict()
    with pytest.raises(RuntimeError, match="_zero_points is not 8 everywhere; this layer is"):
        int4().load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"_scales is .*\[24, 2\].*group_size 32.*\[24, 4\]"):
        int4().load_state_dict({**state, "_scales": state["_scales"][:, :2]})
    with pytest.raises(RuntimeError, match="_packed_weight is torch.int32.*needs torch.uint8"):
        int4().load_state_dict({**state, "_packed_weight": state["_packed_weight"].int()})
    with pytest.raises(RuntimeError, match="Unexpected key.*more"):
        int4(symmetric=False).load_state_dict({**state, "more": state["bias"]})
    del state["_scales"]
    layer = int4(symmetric=False)
    with pytest.raises(RuntimeError, match="Missing key.*_scales"):
        layer.load_state_dict(state)
    before = layer.weight
    assert layer.load_state_dict({}, strict=False).missing_keys[1] == "_packed_weight"
    assert torch.equal(layer.weight, before)
    assert layer.load_state_dict(state, strict=False).missing_keys == ["_scales"]
    assert torch.equal(layer._packed_weight, state["_packed_weight"])


@grids
def test_every_kernel_rounds_int8_activations_alike(symmetric, monkeypatch):
    layer, x = int4(symmetric), torch.randn(5, 100) + 1
    layer.activation = "int8"
    y = layer(x)
    monkeypatch.setenv("FXQUANT_BACKEND", "reference")
    layer.activation = "int8"
    assert layer.backend == "reference"
    size = x.abs() @ layer.weight.abs().T
    assert ((layer(x) - y).abs() <= 1e-5 * size).all()


def test_changing_the_kind_of_activation_keeps_the_weight():
    layer = int4(symmetric=False)
    before = layer.state_dict()
    for activation in ("int8", "float"):
        layer.activation = activation
        assert layer.activation == activation
        assert is_same(layer.state_dict(), before)


def test_a_layer_says_which_kernel_it_uses_and_why():
    explained = int4().explain_backend()
    assert explained[int4().backend] == "chosen"
    odd = QuantizedLinearInt4.from_float(nn.Linear(40, 8), 20)
    assert "group_size is 20" in odd.explain_backend()["native"]


@grids
def test_a_layer_exports_with_a_dynamic_number_of_rows(symmetric):
    layer, x = int4(symmetric), torch.randn(7, 100)
    rows = torch.export.Dim("rows", min=2, max=64)
    exported = torch.export.export(layer, (x[:3],), dynamic_shapes=({0: rows},))
    assert torch.equal(exported.module()(x), layer(x))


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
    assert sqnr_db(quantized.to_float()(x), quantized(x)) > 45


def test_anything_but_a_linear_is_refused():
    with pytest.raises(WeightError, match="Conv1d.*torch.nn.Linear"):
        QuantizedLinearInt4.from_float(nn.Conv1d(4, 4, 1))


def test_compiles_as_one_graph():
    quantized = QuantizedLinearInt4.from_float(nn.Linear(64, 32), 32)
    x = torch.randn(5, 64)
    with torch.no_grad():
        compiled = torch.compile(quantized, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(x), quantized(x), atol=1e-6)
