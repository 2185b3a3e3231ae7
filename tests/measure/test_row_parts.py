"""Large batches in parts of rows."""

import pytest
import torch
from torch import nn

import fxquant
from fxquant.graph.calls import Call
from fxquant.measure import row_parts as module
from fxquant.measure.paired_run import output_sqnr, run_paired
from fxquant.measure.row_parts import leading_rows, row_parts

X = torch.randn(10, 4, 16)


class Head(nn.Module):
    """Far more outputs than inputs."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 640)

    def forward(self, x):
        return self.head(x)


@pytest.fixture
def graph():
    return fxquant.trace(Head().eval(), X[:2])


def test_parts_have_as_many_rows_as_fit(graph, monkeypatch):
    monkeypatch.setattr(module, "MOST_ELEMENTS", 3 * 4 * 640)
    parts = list(row_parts(graph, [Call((X,)), Call((X[:2],))]))
    assert [part.row_count for part in parts] == [3, 3, 3, 1, 2]
    assert torch.equal(torch.cat([part.args[0] for part in parts[:4]]), X)


def test_small_batches_and_graphs_of_unknown_shapes_stay_whole(graph, monkeypatch):
    assert [part.row_count for part in row_parts(graph, [Call((X,))])] == [10]
    monkeypatch.setattr(module, "MOST_ELEMENTS", 640)
    unknown = fxquant.trace(Head().eval())
    assert [part.row_count for part in row_parts(unknown, [Call((X,))])] == [10]


def test_a_batch_whose_parts_the_graph_refuses_stays_whole(monkeypatch):
    class Fixed(Head):
        def forward(self, x):
            return super().forward(x.reshape(10, 4, 16))

    gm = fxquant.trace(Fixed().eval(), X)
    monkeypatch.setattr(module, "MOST_ELEMENTS", 640)
    assert [part.row_count for part in row_parts(gm, [Call((X,))])] == [10]


def test_figures_do_not_depend_on_the_parts(graph, monkeypatch):
    q, _ = fxquant.quantize(graph, group_size=16, accuracy_warning="ignore")
    calls = [Call((X,)), Call((X[:3] + 1,))]
    whole = output_sqnr(graph, q, calls).db, run_paired(graph, q, calls).output.db
    monkeypatch.setattr(module, "MOST_ELEMENTS", 2 * 4 * 640)
    parts = output_sqnr(graph, q, calls).db, run_paired(graph, q, calls).output.db
    assert parts == pytest.approx(whole, abs=1e-4)


def test_leading_rows_end_inside_a_batch():
    calls = [Call((X[:4],)), Call((X[4:],))]
    assert [c.row_count for c in leading_rows(calls, 6)] == [4, 2]
    assert [c.row_count for c in leading_rows(calls, 4)] == [4]
