"""What runs under `torch.vmap` is one graph of plain ops."""

import pytest
import torch
from torch import nn
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

import fxquant

W = 8


class MapsALayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(W, W), nn.Linear(W, W)

    def forward(self, x):
        return self.second(torch.vmap(lambda row: self.first(row) - row.mean())(x))


class MapsPositions(MapsALayer):
    """A mask by a function of one row, one query and one key, as libraries of models make it."""

    def forward(self, x):
        blocks = (x[:, :, 0] > 0).long()

        def sees(row, query, key):
            return (query >= key) | (blocks[row, query] == blocks[row, key])

        for places in ((None, None, 0), (None, 0, None), (0, None, None)):
            sees = torch.vmap(sees, in_dims=places)
        rows, positions = torch.arange(x.shape[0]), torch.arange(x.shape[1])
        with TransformGetItemToIndex():
            mask = sees(rows, positions, positions)
        h = self.first(x)
        weights = (h @ h.mT).masked_fill(~mask, -1e9).softmax(-1)
        return self.second(weights @ h)


@pytest.mark.parametrize("cls", [MapsALayer, MapsPositions])
def test_a_mapped_function_is_part_of_the_graph(cls, tmp_path):
    torch.manual_seed(0)
    model = cls().eval()
    gm = fxquant.trace(model, torch.randn(2, 5, W))
    assert not fxquant.trace_report(gm).opaque
    assert {"first", "second"} <= {str(n.target) for n in gm.graph.nodes if n.op == "call_module"}
    fxquant.save_model(gm, tmp_path / "model.fxq")
    loaded = fxquant.load_model(tmp_path / "model.fxq")
    for shape in ((2, 5, W), (1, 7, W), (3, 4, W)):
        x = torch.randn(shape)
        torch.testing.assert_close(loaded(x), model(x))
