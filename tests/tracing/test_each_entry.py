"""Loops over the experts that some row has chosen go over all experts, where that is the same."""

import torch

import fxquant
from fxquant.tracing.each_entry import NOTE
from tests.awkward import CASES
from tests.awkward.control import CallsTheExpertsThatAreChosen
from tests.awkward.registry import run


def test_a_loop_over_chosen_experts_becomes_one_over_all():
    case = CASES["CallsTheExpertsThatAreChosen"]
    gm = fxquant.trace(case.model(), case.call())
    report = fxquant.trace_report(gm)
    assert not report.opaque
    assert report.coverage == 1.0
    assert all(node.target is not NOTE for node in gm.graph.nodes)
    for rows in (1, 2, 50):
        torch.manual_seed(rows)
        other = case.inputs(rows, 1)
        torch.testing.assert_close(run(gm, other), run(case.reference(), other))


def test_experts_without_rows_are_quantized_like_the_others():
    case = CASES["CallsTheExpertsThatAreChosen"]
    torch.manual_seed(5)
    few = [case.inputs(1, 1)]
    q, info = fxquant.static_quantize(
        case.model(), few, skip_param_threshold=0, group_size=8, accuracy_warning="ignore"
    )
    assert sum(name.startswith("experts") for name in info.selected_layers) == 6
    assert run(q, case.inputs(3, 4)).isfinite().all()


def test_a_loop_in_which_an_expert_that_is_not_chosen_would_count_stays_as_it_is():
    case = CASES["CallsChosenExpertsOnAllRows"]
    gm = fxquant.trace(case.model(), case.call())
    assert [opaque.module for opaque in fxquant.trace_report(gm).opaque] == ["experts"]


class AlwaysAll(CallsTheExpertsThatAreChosen):
    """Every expert is chosen in each call, so that nobody sees what one without rows does."""

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        everyone = torch.arange(6).expand(len(rows), 6)
        return self.experts(rows, everyone).reshape(x.shape)


def test_where_all_entries_were_true_in_every_call_the_loop_stays_as_it_is():
    torch.manual_seed(6)
    gm = fxquant.trace(AlwaysAll().eval(), CASES["CallsTheExpertsThatAreChosen"].inputs(2, 3))
    report = fxquant.trace_report(gm)
    assert report.opaque
    assert any("all were true" in attempt for attempt in report.attempts)
