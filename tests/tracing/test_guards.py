import pytest
import torch
from torch import nn

from fxquant.errors import ShapeError
from fxquant.tracing.guards import insert_guards


@pytest.mark.parametrize(("batch", "length"), [(1, 4), (3, 1), (3, 4)])
def test_the_least_of_three_sizes_is_checked(batch, length):
    gm = torch.fx.symbolic_trace(nn.ReLU())
    insert_guards(gm.graph, ["min(5, L['input'].size()[0], L['input'].size()[1]) > 1"])
    gm.recompile()
    x = torch.randn(batch, length)
    if min(batch, length) > 1:
        assert torch.equal(gm(x), x.relu())
    else:
        with pytest.raises(ShapeError, match="batch size"):
            gm(x)
