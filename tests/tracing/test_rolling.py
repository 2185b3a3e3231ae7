"""Loops over sizes become one node; loops whose rounds differ do not, and nothing is lost."""

import pytest
import torch
from torch import nn

import fxquant
from fxquant.graph.loops import loop
from tests.awkward import CASES
from tests.awkward.registry import run

ROLLED = ("ScansTheLength", "WritesEachPosition", "ReadsNeighbours", "ListsItsRows",
          "GoesThroughRows", "LoopsTwice")  # fmt: skip
NOT_ROLLED = ("TreatsARoundApart", "LooksFarAhead", "LeavesALoop", "NestsLoops",
              "LoopsOverTheLength")  # fmt: skip


def traced(name):
    case = CASES[name]
    gm = fxquant.trace(case.model(), case.call())
    return case, gm, [n for n in gm.graph.nodes if n.target is loop]


@pytest.mark.parametrize("name", ROLLED)
def test_a_loop_over_a_size_is_one_node_that_takes_any_size(name):
    case, gm, loops = traced(name)
    report = fxquant.trace_report(gm)
    assert loops
    assert not report.opaque
    assert not report.refused
    torch.manual_seed(3)
    longer = case.inputs(7, 50)
    expected, found = run(case.reference(), longer), run(gm, longer)
    leaves = torch.utils._pytree.tree_leaves
    found = dict(found) if isinstance(found, dict) else found
    for one, other in zip(leaves(expected), leaves(found), strict=True):
        torch.testing.assert_close(other, one)


@pytest.mark.parametrize("name", NOT_ROLLED)
def test_a_loop_whose_rounds_are_not_the_same_or_hold_a_layer_stays_as_it_is(name):
    _, _, loops = traced(name)
    assert not loops


def test_range_is_what_it_was():
    before = range
    fxquant.trace(CASES["ScansTheLength"].model(), CASES["ScansTheLength"].call())
    assert range is before
    assert isinstance(before(3), range)


class ScansChunks(nn.Module):
    """A scan over chunks of four tokens, of which the last is padded."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        length = x.shape[1]
        x = nn.functional.pad(self.fc(x), (0, 0, 0, -length % 4))
        state, made = x.new_zeros(x.shape[0], 8), []
        for i in range(x.shape[1] // 4):
            state = torch.tanh(state + x[:, 4 * i : 4 * i + 4].sum(1))
            made.append(state)
        return torch.stack(made, 1)


class GoesThroughTheBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return torch.stack([row.cumsum(0) for row in self.fc(x)])


@pytest.mark.parametrize(
    ("model", "length", "exports"),
    [
        (ScansChunks(), 16, [True]),  # four rounds: there is nothing to look for
        (ScansChunks(), 7, [True, True]),  # refuses longer inputs, with which it is made again
        (GoesThroughTheBatch(), 7, [False, True]),  # two rounds: ends there, again with three
    ],
)
def test_an_example_with_few_rounds_is_left_at_the_first_loop(monkeypatch, model, length, exports):
    export, succeeded = torch.export.export, []

    def counted(*args, **kwargs):
        succeeded.append(False)
        program = export(*args, **kwargs)
        succeeded[-1] = True
        return program

    monkeypatch.setattr(torch.export, "export", counted)
    gm = fxquant.trace(model, torch.randn(2, length, 8))
    assert succeeded == exports
    report = fxquant.trace_report(gm)
    assert not report.opaque
    assert not report.refused
    x = torch.randn(5, 23, 8)
    torch.testing.assert_close(gm(x), model(x))
