"""What is kept of a model's results, and what a comparison of them finds."""

import pytest
import torch
from torch import nn

import fxquant
from fxquant.tracing.results import MOST_KEPT, ThinnedTensor, difference, kept

SHAPE = (3, 64, 49_152)  # more than twice as many elements as are kept


def test_a_small_result_is_kept_whole_and_is_not_the_model_s():
    x = torch.randn(3, 4)
    whole = kept({"x": x})["x"]
    x.zero_()
    assert whole.abs().sum() > 0
    assert difference(whole, whole.clone()) is None
    assert "other values" in difference(whole, whole + 1)


def test_of_a_large_result_an_even_part_is_kept():
    x = torch.arange(3 * 64 * 49_152, dtype=torch.int32).reshape(SHAPE)
    part = kept(x)
    assert isinstance(part, ThinnedTensor)
    assert MOST_KEPT // 3 < part.values.numel() <= MOST_KEPT
    for dimension, size in enumerate(SHAPE):  # elements of all places along it
        stride = x.stride(dimension)
        assert len((part.values // stride % size).unique()) == size


@pytest.mark.parametrize("place", [(0, 0), (2, 63), (1, 17)])
def test_a_wrong_row_of_a_large_result_is_found(place):
    x = torch.randn(SHAPE)
    wrong = x.clone()
    wrong[place] += 1
    assert difference(kept(x), kept(x.clone())) is None
    assert "other values" in difference(kept(x), kept(wrong))


def test_shape_dtype_and_kind_of_a_large_result_count():
    x = torch.zeros(SHAPE)
    assert "shape" in difference(kept(x), kept(x[:, :1]))
    assert "torch.float64" in difference(kept(x), kept(x.double()))
    assert "layout" in difference(kept(x), kept(x.to_sparse()))
    assert "instead of a tensor" in difference(kept(x), 1)


def test_a_graph_that_differs_in_one_word_of_a_large_vocabulary_is_not_returned():
    class Switching(nn.Module):
        """Adds to one word's logits, unless it is being traced."""

        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 8), nn.Linear(8, 49_152)

        def forward(self, tokens):
            logits = self.head(self.embed(tokens))
            bump = torch.zeros(49_152)
            if type(tokens) is torch.Tensor:
                bump[123] = 1000.0
            return logits + bump

    gm = fxquant.trace(Switching().eval(), torch.randint(0, 7, (3, 64)))
    assert fxquant.trace_report(gm).way == "opaque"
