import copy

import pytest
import torch
from torch import nn

from fxquant import sqnr_db
from fxquant.errors import OptionError
from fxquant.modules.conv import QuantizedConv
from fxquant.modules.weight_forms import form_of
from fxquant.numerics.integers import WIDTHS
from fxquant.numerics.weights import quantize_weight

# a float layer, and the shape of an input without the batch
LAYERS = {
    "1d": (lambda: nn.Conv1d(6, 10, 5, stride=2, padding=3), (6, 19)),
    "2d": (lambda: nn.Conv2d(6, 8, (3, 2), padding=(1, 0), dilation=(1, 2)), (6, 9, 11)),
    "3d": (lambda: nn.Conv3d(4, 6, 2, bias=False), (4, 5, 6, 4)),
    "grouped": (lambda: nn.Conv2d(6, 9, 3, groups=3, padding="same"), (6, 8, 8)),
    "depthwise": (lambda: nn.Conv2d(7, 7, 3, groups=7, stride=2), (7, 9, 9)),
    "reflecting": (lambda: nn.Conv2d(5, 4, 3, padding=2, padding_mode="reflect"), (5, 7, 7)),
    "point": (lambda: nn.Conv2d(6, 8, 1, stride=(2, 1)), (6, 8, 7)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(6, 4, 3, stride=2, groups=2), (6, 9)),
    "transposed 2d": (
        lambda: nn.ConvTranspose2d(4, 6, (2, 3), stride=2, padding=1, output_padding=1, dilation=2),
        (4, 5, 6),
    ),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (2, 3, 3, 3)),
}
every_layer = pytest.mark.parametrize("name", list(LAYERS))


def pair(name, bits=8, group_size=-1):
    layer = LAYERS[name][0]().eval()
    form = form_of(layer)
    weight = quantize_weight(form.matrix(layer), bits, group_size)
    return layer, form.quantized(layer, weight, layer.bias, None), form


@every_layer
def test_the_quantized_layer_computes_what_a_float_one_with_its_weight_does(name):
    layer, quantized, _ = pair(name)
    assert quantized.weight_shape == tuple(layer.weight.shape)
    floats = quantized.to_float()
    assert type(floats) is type(layer)
    for batch in ((3,), ()):
        x = torch.randn(*batch, *LAYERS[name][1])
        assert quantized(x).shape == layer(x).shape
        assert sqnr_db(floats(x), quantized(x)) > 40
        assert sqnr_db(layer(x), quantized(x)) > 30
    assert torch.equal(copy.deepcopy(quantized)(x), quantized(x))
    assert quantized(x.bfloat16()).dtype == torch.bfloat16


@every_layer
def test_the_matrix_times_what_each_block_reads_is_what_it_gives(name):
    layer, _, form = pair(name)
    x = torch.randn(2, *LAYERS[name][1])
    reads = form.reads(layer, x)
    matrices = form.matrix(layer).chunk(form.blocks(layer))
    assert len(reads) == len(matrices) == layer.groups
    assert all(r.shape[1] == m.shape[1] for r, m in zip(reads, matrices, strict=True))
    if form.gives is None:
        return
    given = form.gives(layer, layer(x), x)
    biases = [0] * layer.groups if layer.bias is None else layer.bias.chunk(layer.groups)
    for read, matrix, bias, expected in zip(reads, matrices, biases, given, strict=True):
        assert torch.allclose(read @ matrix.T + bias, expected, atol=1e-5)


def test_an_output_size_is_kept():
    layer, quantized, _ = pair("transposed 1d")
    x = torch.randn(2, 6, 9)
    assert quantized(x, [20]).shape == layer(x, [20]).shape == (2, 4, 20)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("group_size", [4, -1])
def test_every_width_and_group_is_closer_the_wider(bits, group_size):
    layer, quantized, _ = pair("2d", bits, group_size)
    assert quantized.bits == bits
    rows = torch.cat(list(quantized.weight_parts()))
    assert torch.allclose(rows.view(layer.weight.shape), quantized.dequantize())
    assert sqnr_db(layer.weight, quantized.weight) > 5.5 * bits - 7


def test_large_inputs_give_a_part_of_their_places():
    layer = nn.Conv2d(3, 4, 3)
    (read,) = form_of(layer).reads(layer, torch.randn(4, 3, 200, 200))
    assert 4_000 < len(read) < 20_000


def test_sizes_that_do_not_belong_together_are_refused():
    sizes = {"kernel_size": (3,), "stride": (1,), "padding": 0, "dilation": (1,), "bias": False}
    more = {"output_padding": (0,), "padding_mode": "zeros", "groups": 2}
    with pytest.raises(OptionError, match="channels"):
        QuantizedConv(1, False, 5, 4, **sizes, **more)
