import operator

import pytest
import torch
from torch import nn

import fxquant
from fxquant.graph.residual import added_to

X = torch.randn(2, 3, 8)


class Block(nn.Module):
    def __init__(self, join):
        super().__init__()
        self.fc, self.drop, self.join = nn.Linear(8, 8), nn.Dropout(0.1), join

    def forward(self, x):
        return self.join(self, x * 2, self.fc(x))


FOUND = {
    "sum": lambda m, r, y: r + y,
    "other order": lambda m, r, y: y + r,
    "torch.add": lambda m, r, y: torch.add(r, y),
    "in place": lambda m, r, y: operator.iadd(y, r),
    "dropout": lambda m, r, y: r + m.drop(y),
    "reshaped": lambda m, r, y: r + y.view(6, 8).reshape(2, 3, 8),
}
NOT_FOUND = {
    "two users": lambda m, r, y: r + y + y.mean(),
    "itself": lambda m, r, y: y + y,
    "activation": lambda m, r, y: r + y.relu(),
    "transposed": lambda m, r, y: r + y.transpose(0, 1).transpose(0, 1),
    "scaled": lambda m, r, y: torch.add(r, y, alpha=2),
    "number": lambda m, r, y: y + 1,
    "output": lambda m, r, y: y,
}


@pytest.mark.parametrize("join", FOUND.values(), ids=FOUND)
def test_the_residual_is_found(join):
    gm = fxquant.trace(Block(join).eval(), X)
    linear = next(n for n in gm.graph.nodes if n.target == "fc")
    residual = added_to(gm, linear)
    assert residual is not None
    assert "mul" in residual.name


@pytest.mark.parametrize("join", NOT_FOUND.values(), ids=NOT_FOUND)
def test_other_uses_are_no_residual(join):
    gm = fxquant.trace(Block(join).eval(), X)
    linear = next(n for n in gm.graph.nodes if n.target == "fc")
    assert added_to(gm, linear) is None
