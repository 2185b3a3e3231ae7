"""Layers inside a module that cannot be traced, of every kind, are quantized in their places."""

import pytest
import torch
from torch import nn

import fxquant
from fxquant.graph.calls import Call
from fxquant.graph.layers import sites
from fxquant.passes.opaque_layers import MOST_RUNS
from fxquant.passes.quantize_sequentially import quantize_sequentially
from tests.fingerprint import unchanged
from tests.fitters import KeepingFitter

QUIET = {"group_size": 32, "skip_param_threshold": 0, "accuracy_warning": "ignore"}
CHANNELS = 32
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Detector(nn.Module):
    """Takes pictures one by one, and branches on what it has computed."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.each = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS)
        self.norm = nn.BatchNorm2d(CHANNELS)
        self.up = nn.ConvTranspose2d(CHANNELS, CHANNELS, 2, 2)
        self.kinds = nn.Embedding(2, CHANNELS)
        self.head = nn.Linear(CHANNELS, 4)

    def forward(self, pictures):
        found = []
        for picture in pictures:
            h = torch.relu(self.norm(self.each(self.stem(picture[None]))))
            h = self.up(h if h.mean() > 0.1 else h + 0.1)
            h = h.mean((-1, -2)) + self.kinds((picture.sum() > 0).long())
            found.append(self.head(h))
        return torch.cat([row for row in found if row.sum() > -1e9])


def pictures():
    torch.manual_seed(1)
    return [torch.randn(4, 3, 12, 12) for _ in range(6)]


@pytest.mark.parametrize("method", ["rtn", "gptq", "best"])
def test_every_layer_is_quantized_and_the_copy_gives_the_same_bits(method):
    torch.manual_seed(0)
    model, data = Detector().eval(), pictures()
    fxquant.trace(model, data[0])  # imports what torch.export needs
    with unchanged(model, data):
        q, info = fxquant.static_quantize(model, data, method=method, embeddings=8, **QUIET)
        swapped = fxquant.swap_modules(model, q)
    report = fxquant.trace_report(q)
    assert report.opaque
    assert report.coverage == 1.0
    actions = {d.module: d.action for d in info.decisions}
    assert {n for n, action in actions.items() if action == "float"} == {"norm"}
    assert set(info.selected_layers) == {"stem", "each", "up", "kinds", "head"}
    assert info.sqnr_db > 20
    with torch.no_grad():
        assert torch.equal(swapped(data[0]), q(data[0]))
    assert not swapped.fxquant_left_float


def test_fitting_convolutions_inside_closes_much_of_the_gap_of_rounding():
    torch.manual_seed(0)
    model, data = Detector().eval(), pictures()
    (_, rounded), (_, fitted) = (
        fxquant.static_quantize(model, data, method=method, **QUIET) for method in ("rtn", "gptq")
    )
    assert fitted.sqnr_db > rounded.sqnr_db + 3


class Deep(nn.Module):
    """More layers one after the other than an opaque module is run for."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(CHANNELS, CHANNELS) for _ in range(2 * MOST_RUNS + 1))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x if x.sum() > 0 else -x)
        return x


def test_of_many_layers_neighbours_are_fitted_in_one_run():
    torch.manual_seed(0)
    model = Deep().eval()
    gm = fxquant.trace(model, torch.randn(2, CHANNELS))
    decisions = fxquant.plan(model, example_inputs=torch.randn(2, CHANNELS), **QUIET).decisions
    runs = []
    (opaque,) = {site.node.target for site in sites(gm)}
    gm.get_submodule(opaque).register_forward_pre_hook(lambda *_: runs.append(1))
    fitter = KeepingFitter()
    quantize_sequentially(gm, decisions, [Call((torch.randn(8, CHANNELS),))], fitter)
    assert len(fitter.seen) == len(model.layers)
    assert all(moments.tokens == 8 for moments in fitter.seen.values())
    assert 0 < len(runs) <= 2 * MOST_RUNS + 1  # either graph, and one for the order of the calls
