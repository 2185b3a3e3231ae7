"""A check by value becomes a check of the graph; a branch on values stays the model's own."""

import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import TraceError

W = 8


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(W, W), nn.Linear(W, W)
        self.table = nn.Parameter(torch.randn(64, W))


class Refuses(Layers):
    def forward(self, x):
        if torch.isnan(x).any():
            raise ValueError("not a number")
        h = self.first(x)
        assert h.abs().max() < 100, "too large"
        return self.second(h)


class AsksForPositions(Layers):
    """The answer is the same for all inputs; whoever exports is told nothing, though."""

    def forward(self, x):
        gaps = torch.arange(x.shape[1]).diff(prepend=torch.tensor([-1]))
        is_fake = isinstance(gaps, torch._subclasses.FakeTensor)
        if not is_fake and (gaps == 1).all():
            return self.first(x)
        return self.second(x)


class Branches(Layers):
    def forward(self, x):
        return self.first(x) if x.mean() > -1e3 else self.second(x)


class CountsHits(Layers):
    def forward(self, x):
        return self.first(x) if x.flatten().nonzero().shape[0] > 2 else self.second(x)


class ComparesANumber(Layers):
    def forward(self, x):
        if float(x.abs().max()) > 1e3:
            raise ValueError("too large")
        return self.second(self.first(x))


class RefusesBothOnly(Layers):
    def forward(self, x):
        if x.mean() > -1e3 and x.mean() > 1e3:
            raise ValueError("too large")
        return self.second(self.first(x))


class CutsATable(Layers):
    """A slice whose ends are numbers in tensors."""

    def forward(self, x):
        span = torch.tensor(x.shape[1]).clamp(max=32)
        return self.second(self.first(x) + self.table[32 - span : 32 - span + x.shape[1]])


def traced(cls):
    torch.manual_seed(0)
    model = cls().eval()
    gm = fxquant.trace(model, torch.randn(2, 5, W))
    other = torch.randn(3, 7, W)
    torch.testing.assert_close(gm(other), model(other))
    return gm


@pytest.mark.parametrize("cls", [Refuses, AsksForPositions, CutsATable])
def test_what_holds_for_all_inputs_is_one_graph_that_can_be_saved(cls, tmp_path):
    gm = traced(cls)
    assert not fxquant.trace_report(gm).opaque
    fxquant.save_model(gm, tmp_path / "model.fxq")
    x = torch.randn(2, 6, W)
    assert torch.equal(fxquant.load_model(tmp_path / "model.fxq")(x), gm(x))


@pytest.mark.parametrize(
    ("value", "code"), [(float("nan"), "if torch.isnan"), (1e5, "assert h.abs")]
)
def test_what_the_model_refuses_the_graph_refuses_in_words(value, code):
    with pytest.raises(TraceError, match=rf"line \d+ of test_known_values.py: .*{code}"):
        traced(Refuses)(torch.full((2, 5, W), value))


@pytest.mark.parametrize("cls", [Branches, CountsHits, ComparesANumber, RefusesBothOnly])
def test_a_branch_that_other_inputs_may_take_stays_the_models_own(cls):
    assert fxquant.trace_report(traced(cls)).opaque
