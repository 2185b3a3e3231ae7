"""What a paired run compares."""

import pickle

import pytest
import torch
from torch import nn

import fxquant
from fxquant.distributed.processes import Processes
from fxquant.graph.calls import Call
from fxquant.measure import measured_rows
from fxquant.measure.paired_run import output_sqnr, run_paired

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def graph():
    torch.manual_seed(0)
    return fxquant.trace(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)), X)


def test_nodes_beside_layers_are_compared_only_where_that_is_wanted(graph):
    q, _ = fxquant.quantize(graph, group_size=32, accuracy_warning="ignore")
    whole, few = (run_paired(graph, q, [Call((X,))], compares_nodes=c) for c in (True, False))
    assert len(whole.nodes) > len(whole.layers) == 2
    assert few.nodes == {}
    assert few.output.db == whole.output.db
    for name, errors in whole.layers.items():
        assert few.layers[name].introduced.db == errors.introduced.db
        assert few.layers[name].cumulative.db == errors.cumulative.db


def test_a_record_compares_layers_and_the_output_alone(graph, monkeypatch):
    runs = []

    def noting(*arguments, **options):
        runs.append(run_paired(*arguments, **options))
        return runs[-1]

    monkeypatch.setattr(measured_rows, "run_paired", noting)
    fxquant.quantize(graph, [X], group_size=32, accuracy_warning="ignore")
    assert len(runs) == 1
    assert len(runs[0].layers) == 2
    assert runs[0].nodes == {}


def test_batches_of_each_process_are_its_own(graph):
    """Of two processes, each measures half of the parts, and sends what it has seen."""
    q, _ = fxquant.quantize(graph, group_size=32, accuracy_warning="ignore")
    calls = [Call((X + i,)) for i in range(4)]
    ran = []
    hook = graph.get_submodule("0").register_forward_hook(lambda *_: ran.append(1))

    class Second(Processes):
        """The other one sends nothing."""

        rank, count = 1, 2

        def __init__(self):
            pass

        def broadcast(self, value, owner):
            return pickle.loads(pickle.dumps(value)) if owner == self.rank else type(value)()

    found = output_sqnr(graph, q, calls, processes=Second())
    assert len(ran) == 2
    hook.remove()
    assert found.db == output_sqnr(graph, q, calls[1::2]).db
