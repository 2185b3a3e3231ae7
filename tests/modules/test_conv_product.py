"""Convolutions that run on their packed weight, against torch's convolution of the same values."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant.kernels.extension import NOT_BUILT, _native
from fxquant.modules import conv_product
from fxquant.modules.activation import rounded_samples
from fxquant.modules.conv import QuantizedConv, matrix_of_convolution
from fxquant.modules.conv_product import FEWEST_OUTPUTS, is_picked
from fxquant.numerics.weights import quantize_weight
from tests.compare import BFLOAT16_SETS

pytestmark = pytest.mark.skipif(NOT_BUILT is not None, reason="the extension is not built here")
OUT = FEWEST_OUTPUTS + 2
FLOOR_DB = {torch.float32: 110, torch.bfloat16: 45, torch.float16: 60}
torch.manual_seed(0)
LAYERS = {
    "plain": nn.Conv2d(5, OUT, 3),
    "padded": nn.Conv2d(5, OUT, 3, padding=1),
    "sides of their own": nn.Conv2d(5, OUT, (3, 2), stride=(1, 2), padding=(0, 1), dilation=(2, 1)),
    "same": nn.Conv2d(5, OUT, 3, dilation=2, padding="same"),
    "reflecting": nn.Conv2d(5, OUT, 3, padding=1, padding_mode="reflect", bias=False),
    "one dimension": nn.Conv1d(5, OUT, 3, stride=2, padding=2),
    "three": nn.Conv3d(5, OUT, 2, padding=1),
}


@pytest.fixture(params=_native.instruction_sets() if NOT_BUILT is None else [])
def _instructions(request):
    _native.use(request.param)
    yield
    _native.use(_native.instruction_sets()[0])


def quantized(conv, bits=8, symmetric=True, group_size=-1, activation="float"):
    weight = quantize_weight(matrix_of_convolution(conv).detach(), bits, group_size, symmetric)
    made = QuantizedConv.of(conv, weight, None if conv.bias is None else conv.bias.detach())
    made.matrix.activation = activation
    return made.eval()


def image(conv, dtype=torch.float32):
    torch.manual_seed(0)
    x = torch.randn(2, 5, *(9, 8, 7)[: len(conv.kernel_size)]) * torch.tensor([1.0, 30.0]).view(
        2, *[1] * (len(conv.kernel_size) + 1)
    )
    return (x.relu() - 0.2).to(dtype)


@torch.no_grad()
@pytest.mark.parametrize("dtype", FLOOR_DB, ids=str)
@pytest.mark.parametrize("activation", ["float", "int8"])
@pytest.mark.parametrize("conv", LAYERS.values(), ids=LAYERS)
@pytest.mark.usefixtures("_instructions")
def test_it_computes_what_torch_does_with_its_values(conv, activation, dtype):
    for bits, symmetric, group_size in ((8, True, -1), (4, False, 8)):
        layer = quantized(conv, bits, symmetric, group_size, activation)
        x = image(conv, dtype)
        assert is_picked(layer, x, [1, 1])
        assert layer.activation_arithmetic == (None if activation == "float" else "integers")
        given = x.float()
        if activation == "int8":
            given = rounded_samples(given, layer.dims + 1)
        expected, found = layer.to_float()(given), layer(x)
        assert found.dtype == dtype
        assert found.is_contiguous()
        floor = FLOOR_DB[dtype]
        if _native.instruction_sets()[0] in BFLOAT16_SETS and activation == "float":
            floor = min(floor, 45)  # float activations are multiplied as bfloat16
        for one, other in zip(expected, found, strict=True):
            assert fxquant.sqnr_db(one, other.float()) > floor
        assert torch.equal(layer(x[0]), found[0])


@torch.no_grad()
def test_inputs_of_any_layout_give_the_same_bits():
    for activation in ("float", "int8"):
        layer = quantized(LAYERS["padded"], activation=activation)
        x = image(layer)
        y = layer(x)
        other = layer(x.to(memory_format=torch.channels_last))
        assert torch.equal(y, other)
        assert other.is_contiguous(memory_format=torch.channels_last)
        strided = torch.stack((x, x), -1).flatten(-2)[..., ::2]
        assert torch.equal(layer(strided), y)


@torch.no_grad()
def test_a_sample_that_is_not_finite_leaves_the_others_alone():
    layer = quantized(LAYERS["padded"], activation="int8")
    x = image(layer)
    y = layer(x)
    for value in (torch.nan, torch.inf):
        bad = x.clone()
        bad[0, 0, 0, 0] = value
        assert layer(bad)[0].isnan().all()
        assert torch.equal(layer(bad)[1], y[1])


def test_gradients_and_tracers_see_torchs_convolution():
    layer = quantized(LAYERS["padded"], activation="int8")
    x = image(layer).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert torch.equal(
        y, F.conv2d(rounded_samples(x, 3), layer.dequantize(), layer.bias, padding=1)
    )
    assert x.grad is not None
    assert not is_picked(layer, torch.empty(2, 5, 9, 8, device="meta"), [])
    assert not is_picked(quantized(nn.Conv2d(5, 8, 3)), image(layer), [])  # few outputs


@torch.no_grad()
def test_a_weight_that_is_loaded_has_sums_of_its_own():
    one, other = (quantized(nn.Conv2d(5, OUT, 3), activation="int8") for _ in range(2))
    x = image(one)
    one(x), other(x)
    one.load_state_dict(other.state_dict())
    assert torch.equal(one(x), other(x))


def test_an_image_too_wide_for_the_kernels_offsets_is_left_to_torch(monkeypatch):
    layer = quantized(nn.Conv2d(5, OUT, 3))
    x = image(layer)
    monkeypatch.setattr(conv_product, "MOST_AWAY", 5 * 11 * 10 - 1)
    assert is_picked(layer, x, [0] * 4)
    assert not is_picked(layer, x, [1] * 4)
    assert not is_picked(layer, x.repeat(1, 1, 1, 2)[..., ::2], [0] * 4)
