import copy
import pickle

import pytest
import torch
from torch import nn

from fxquant import sqnr_db
from fxquant.kernels.choose import BACKENDS
from fxquant.kernels.interface import LinearSpec
from fxquant.modules.embedding import QuantizedEmbedding
from fxquant.modules.weight_forms import form_of
from fxquant.numerics.integers import WIDTHS
from fxquant.numerics.weights import quantize_weight

CPU = torch.device("cpu")


def quantized(bits=4, entries=70, dim=40, group_size=32, symmetric=True):
    embedding = nn.Embedding(entries, dim, padding_idx=3)
    weight = quantize_weight(embedding.weight, bits, group_size, symmetric)
    return embedding, QuantizedEmbedding.of(embedding, weight, None)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 8, 20, -1])
def test_rows_are_those_of_the_dequantized_weight(bits, symmetric, group_size):
    _, layer = quantized(bits, symmetric=symmetric, group_size=group_size)
    numbers = torch.randint(0, 70, (3, 5))
    assert torch.equal(layer(numbers), layer.dequantize()[numbers])
    assert layer(numbers.int()).shape == (3, 5, 40)
    assert layer(torch.zeros(0, 2, dtype=torch.int64)).shape == (0, 2, 40)


@pytest.mark.parametrize("name", list(BACKENDS))
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_backend_picks_the_rows_that_it_would_unpack(name, symmetric):
    spec = LinearSpec(130, 64, 32, symmetric)
    backend = BACKENDS[name]
    if backend.unsupported(spec, CPU):
        return
    weight = quantize_weight(torch.randn(130, 64), 4, 32, symmetric)
    places = torch.tensor([0, 129, 63, 64, 64])
    rows = backend.rows(backend.pack(weight, spec), spec, places)
    assert torch.equal(rows.values(), weight.dequantize()[places])


@pytest.mark.parametrize("number", [-1, 70, 127, 128])
def test_a_number_without_a_row_is_an_error(number):
    _, layer = quantized()  # 70 rows lie in blocks of 64
    with pytest.raises(IndexError):
        layer(torch.tensor([number]))


def test_the_dtype_is_that_of_the_float_layer():
    _, layer = quantized()
    numbers = torch.arange(5)
    assert layer.bfloat16()(numbers).dtype == layer.weight.dtype == torch.bfloat16
    assert layer.to_float().padding_idx == 3


def test_copies_and_pickles_look_up_the_same():
    _, layer = quantized(3)
    numbers = torch.arange(5)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(numbers), layer(numbers))


def test_eight_bits_are_close():
    embedding, layer = quantized(8)
    assert sqnr_db(embedding.weight, layer.weight) > 40


def test_embeddings_that_write_or_compute_more_have_no_form():
    class Scaled(nn.Embedding):
        def forward(self, input):
            return 2 * super().forward(input)

    assert form_of(nn.Embedding(4, 4)).is_lookup
    assert form_of(nn.Embedding(4, 4, max_norm=1.0)) is None
    assert form_of(Scaled(4, 4)) is None
