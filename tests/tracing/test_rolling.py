"""Loops over sizes become one node; loops whose rounds differ do not, and nothing is lost."""

import pytest
import torch

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
