"""How often the data go through the graphs, and what is collected of them on the way."""

from collections import Counter

import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import CalibrationError
from fxquant.graph.calls import Call
from fxquant.graph.stepper import Stepper
from fxquant.passes.quantize_sequentially import quantize_sequentially
from tests.fitters import KeepingFitter

WIDTH, ROWS, BATCHES = 32, 4, 8
QUIET = {"group_size": 32, "skip_param_threshold": 0, "accuracy_warning": "ignore"}
DATA = [torch.randn(ROWS, 6, WIDTH) for _ in range(BATCHES)]


class Attention(nn.Module):
    """Three layers read one value; a head behind the last quantized layer."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        h = self.norm(x)
        weights = (self.q(h) @ self.k(h).transpose(1, 2)).softmax(-1)
        x = x + self.out(weights @ self.v(h))
        return self.head(x)


@pytest.fixture
def graph():
    return fxquant.trace(Attention().eval(), DATA[0])


@pytest.fixture
def runs(monkeypatch):
    """Rows that go through a graph from its first node on, whoever runs it."""
    counted = Counter()
    run, compute = Call.run, Stepper.compute

    def counting_run(self, module):
        if isinstance(module, torch.fx.GraphModule):
            counted["rows"] += self.row_count
        return run(self, module)

    def counting_compute(self, node, values):
        counted[node.name] += 1
        if node.op == "placeholder":
            counted["rows"] += self.call.row_count
        return compute(self, node, values)

    monkeypatch.setattr(Call, "run", counting_run)
    monkeypatch.setattr(Stepper, "compute", counting_compute)
    return counted


@pytest.mark.parametrize(
    ("method", "passes"),
    [
        ("gptq", 2 + 4 / 8),  # both graphs to the last layer; figures on an eighth, twice as many
        ("auto", 2 + 8 / 8),  # the same figures for rounding to nearest
        ("rtn", 7 / 8 + 4 / 8),
        ("awq", 2 * 7 / 8 + 4 / 8),  # once more to search scales
    ],
)
def test_the_data_go_through_the_graphs_as_often_as_is_needed(graph, runs, method, passes):
    fxquant.static_quantize(graph, DATA, method=method, **QUIET)
    assert runs["rows"] == passes * ROWS * BATCHES


def test_nothing_behind_the_last_quantized_layer_runs(graph, runs):
    seen = moments_of(graph)
    assert set(seen) == {"q", "k", "v", "out"}
    assert runs["q"] == 2 * BATCHES
    assert runs["out"] == runs["head"] == runs["output"] == 0


def moments_of(graph):
    fitter = KeepingFitter()
    decisions = fxquant.plan(graph, modules_to_not_convert=["head"], **QUIET).decisions
    calls = [Call((x,)) for x in DATA]
    quantize_sequentially(graph, decisions, calls[:-1], fitter, calls[-1:])
    return fitter.seen


def test_layers_of_one_input_share_its_moments(graph):
    seen = moments_of(graph)
    assert seen["q"].input is seen["k"].input is seen["v"].input
    assert seen["out"].input is not seen["q"].input
    assert seen["q"].tokens == (BATCHES - 1) * ROWS * 6
    assert seen["q"].held_tokens == ROWS * 6
    made = []
    for name in ("q", "k", "v"):
        seen[name].input.once("factor", lambda: made.append(1))
    assert len(made) == 1


def test_what_an_input_lacks_becomes_the_shift_of_each_output(graph, float32_products):
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(WIDTH, WIDTH)
            self.gate, self.up = nn.Linear(WIDTH, 64), nn.Linear(WIDTH, 48)

        def forward(self, x):
            x = self.first(x)
            return torch.cat((self.gate(x), self.up(x)), -1)

    gm = fxquant.trace(Chain().eval(), DATA[0])
    fitter = KeepingFitter()
    decisions = fxquant.plan(gm, **QUIET).decisions
    calls = [Call((x,)) for x in DATA]
    q = quantize_sequentially(gm, decisions, calls[:-1], fitter, calls[-1:])
    with torch.no_grad():
        noisy, clean = (torch.cat([m.first(x) for x in DATA]).flatten(0, 1) for m in (q, gm))
        fitted = slice(0, (BATCHES - 1) * ROWS * 6)
        for name in ("gate", "up"):
            shift = (clean - noisy) @ gm.get_submodule(name).weight.T
            moments = fitter.seen[name]
            expected = shift[fitted].T @ noisy[fitted]
            assert torch.allclose(moments.cross.sum(0), expected, rtol=1e-3, atol=1e-3)
            assert torch.allclose(moments.total_shift, shift[fitted].double().sum(0), atol=1e-3)
            weight = gm.get_submodule(name).weight
            zero = torch.zeros(len(weight))
            error = float(shift[fitted.stop :].double().square().sum())
            (found,) = moments.held_errors(weight, [(weight, zero)])
            assert found == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_a_value_that_becomes_nan_inside_is_named(method):
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.second(torch.sqrt(self.first(x) + 100))

    data = [x.clone() for x in DATA]
    model = Root().eval()
    with torch.no_grad():
        model.first.weight[0, 0] = 1.0
    data[2][1, 1] = -1e5 * torch.eye(WIDTH)[0]
    with pytest.raises(CalibrationError, match="value 'sqrt'.*first in batch 2"):
        fxquant.static_quantize(model, data, method=method, **QUIET)


def test_a_batch_that_the_model_does_not_take_is_named(graph):
    data = [*DATA[:3], torch.randn(2, 6, WIDTH + 1), *DATA[3:]]
    with pytest.raises(CalibrationError, match="calibration batch 3: .*raises"):
        fxquant.static_quantize(graph, data, method="gptq", **QUIET)
