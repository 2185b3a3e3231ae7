import itertools

import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import OptionError
from fxquant.modules.embedding_bag import QuantizedEmbeddingBag
from fxquant.modules.weight_forms import form_of
from fxquant.numerics.weights import quantize_weight

NUMBERS = torch.tensor([3, 0, 69, 3, 5, 5, 12, 40, 3, 3])
OFFSETS = torch.tensor([0, 2, 2, 7, 8])  # the second bag is empty


def bags(**options):
    """A quantized bag, and the float one with the same rows."""
    bag = nn.EmbeddingBag(70, 40, **options)
    weight = quantize_weight(bag.weight, 4, 32, True)
    made = QuantizedEmbeddingBag.of(bag, weight, None)
    return made, made.to_float()


@pytest.mark.parametrize(
    ("mode", "padding", "last"),
    list(itertools.product(("sum", "mean", "max"), (None, 3), (False, True))),
)
def test_bags_are_those_of_the_dequantized_rows(mode, padding, last):
    made, floats = bags(mode=mode, padding_idx=padding, include_last_offset=last)
    calls = [(NUMBERS, OFFSETS), (NUMBERS.int(), OFFSETS.int()), (NUMBERS.view(2, 5),)]
    if mode == "sum":
        factors = torch.randn(10)
        calls += [(NUMBERS, OFFSETS, factors), (NUMBERS.view(2, 5), None, factors.view(2, 5))]
    for call in calls:
        numbers = NUMBERS[: int(OFFSETS[-1])] if last and call[0].ndim == 1 else call[0]
        given = (numbers.to(call[0].dtype), *call[1:])
        if len(given) == 3 and last and numbers.ndim == 1:
            given = (*given[:2], given[2][: len(numbers)])
        torch.testing.assert_close(made(*given), floats(*given))


@pytest.mark.parametrize(
    "call",
    [
        (NUMBERS,),
        (NUMBERS.view(2, 5), OFFSETS),
        (NUMBERS, torch.tensor([1, 2])),
        (NUMBERS, torch.tensor([0, 4, 2])),
        (NUMBERS, torch.tensor([0, 11])),
        (NUMBERS, torch.tensor([0, 1 << 40])),
        (NUMBERS, torch.zeros(0, dtype=torch.int64)),
        (NUMBERS, OFFSETS, torch.ones(3)),
    ],
)
def test_offsets_that_point_elsewhere_are_refused(call):
    with pytest.raises(OptionError):
        bags(mode="sum")[0](*call)
    with pytest.raises(IndexError):
        bags()[0](torch.tensor([[70]]))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.EmbeddingBag(500, 64, mode="sum"), nn.Linear(64, 4)

    def forward(self, numbers):
        return self.head(self.words(numbers))


def test_a_bag_is_quantized_saved_and_swapped(tmp_path):
    model, numbers = Words().eval(), torch.randint(0, 500, (4, 6))
    options = {"group_size": 32, "accuracy_warning": "ignore", "example_inputs": numbers}
    _, info = fxquant.quantize(model, **options)
    assert {d.module: d.action for d in info.decisions}["words"] == "float"
    graph, info = fxquant.quantize(model, embeddings=4, **options)
    assert {d.module: d.action for d in info.decisions}["words"] == "int4"
    assert info.quantized_size_mb * 5 < info.original_size_mb
    assert fxquant.sqnr_db(model(numbers), graph(numbers)) > 15
    fxquant.save_model(graph, tmp_path / "m.safetensors", info)
    loaded = fxquant.load_model(tmp_path / "m.safetensors")
    swapped = fxquant.swap_modules(model, graph)
    assert type(swapped) is Words
    for other in (loaded, swapped):
        assert torch.equal(other(numbers), graph(numbers))
    floats = fxquant.dequantize_model(graph)
    torch.testing.assert_close(floats(numbers), graph(numbers))


def test_a_bag_that_writes_into_its_weight_stays_float():
    assert form_of(nn.EmbeddingBag(4, 4)).is_lookup
    assert form_of(nn.EmbeddingBag(4, 4, max_norm=1.0)) is None
