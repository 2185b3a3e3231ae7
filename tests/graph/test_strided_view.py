"""`strided_view` is `as_strided` inside of a tensor, and refuses what would lie outside."""

import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import ShapeError
from fxquant.graph.strided_view import strided_view


class Windows(nn.Module):
    """Overlapping windows of what lies [time, batch, channels] in memory, or [batch, ...]."""

    def __init__(self, is_transposed):
        super().__init__()
        self.fc, self.is_transposed = nn.Linear(8, 8), is_transposed

    def forward(self, x):
        y = self.fc(x)
        if self.is_transposed:
            y = y.transpose(0, 1)
        n, t, c = y.shape
        a, b, _ = y.stride()
        return y.as_strided((n, t - 1, 2, c), (a, b, b, 1)).sum(2)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_windows_are_those_of_the_model_and_can_be_saved(tmp_path, is_transposed):
    torch.manual_seed(0)
    model = Windows(is_transposed).eval()
    gm = fxquant.trace(model, torch.randn(4, 5, 8))
    assert not fxquant.trace_report(gm).opaque
    fxquant.save_model(gm, tmp_path / "model.fxq")
    x = torch.randn(6, 7, 8)
    with torch.no_grad():
        torch.testing.assert_close(fxquant.load_model(tmp_path / "model.fxq")(x), model(x))


def test_it_is_a_view_of_the_same_memory():
    x = torch.randn(3, 4)
    assert torch.equal(strided_view(x, (2, 4), (8, 1)), x.as_strided((2, 4), (8, 1)))
    strided_view(x, (1,), (1,)).zero_()
    assert x[0, 0] == 0
    y = x.t()
    assert torch.equal(strided_view(y, (2, 4), (8, 1), (1, 0)), y.as_strided((2, 4), (8, 1)))
    assert strided_view(x, (0, 9), (100, 100)).shape == (0, 9)


@pytest.mark.parametrize(
    ("size", "stride", "order"),
    [((2, 4), (9, 1), None), ((13,), (1,), None), ((-1,), (1,), None), ((2,), (-1,), None),
     ((2, 2), (1,), None), ((2, 4), (8, 1), (1, 0))],
)  # fmt: skip
def test_what_is_not_of_the_tensor_is_refused(size, stride, order):
    memory = torch.randn(100)
    with pytest.raises(ShapeError, match="windows of a tensor"):
        strided_view(memory[:12].view(3, 4), size, stride, order)


def test_a_tensor_with_gaps_is_refused():
    with pytest.raises(ShapeError, match="without gaps"):
        strided_view(torch.randn(4, 6)[:, :3], (2,), (1,))
