"""Recurrent modules are modules in graphs that `torch.export` made."""

import pytest
import torch
from torch import nn

import fxquant

W = 8


class Recurrent(nn.Module):
    """The branch makes the way one of `torch.export`."""

    def __init__(self, kind, **options):
        super().__init__()
        self.cell, self.fc = kind(W, W, **options), nn.Linear(W, W)

    def forward(self, x):
        if torch.isnan(x).any():
            raise ValueError("not a number")
        y, state = self.cell(x)
        last = state[0] if isinstance(state, tuple) else state
        return self.fc(y) + last.mean()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("options", [{"batch_first": True}, {"num_layers": 2, "bias": False}])
def test_they_are_put_back_and_can_be_saved(tmp_path, kind, options):
    torch.manual_seed(0)
    model = Recurrent(kind, **options).eval()
    gm = fxquant.trace(model, torch.randn(3, 5, W))
    assert fxquant.trace_report(gm).way == "export"
    assert any(isinstance(module, kind) for module in gm.modules())
    fxquant.save_model(gm, tmp_path / "model.fxq")
    loaded, x = fxquant.load_model(tmp_path / "model.fxq"), torch.randn(2, 7, W)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x))
