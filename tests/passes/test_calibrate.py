import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxquant
from fxquant.errors import CalibrationError, OptionError
from fxquant.passes.insert_observers import observed_inputs
from tests import models
from tests.models import WIDTH

X = torch.randn(12, 5, WIDTH)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, a, b):
        return self.fc(a) + b


def observed(model=None, **options):
    return fxquant.insert_observers(fxquant.trace(model or models.Plain()), **options)


def test_observers_are_graph_nodes_that_change_nothing():
    gm = fxquant.trace(models.Plain())
    with_observers = fxquant.insert_observers(gm, "histogram", bins=64)
    calls = [n for n in with_observers.graph.nodes if n.op == "call_module"]
    watching = [
        n for n in calls
        if isinstance(with_observers.get_submodule(n.target), fxquant.Observer)
    ]  # fmt: skip
    assert [n.name for n in watching] == ["x_observer", "dropout_observer"]
    assert torch.equal(with_observers(X), gm(X))
    assert not any("observer" in n.name for n in gm.graph.nodes)


def test_inserting_twice_inserts_once():
    once = observed()
    twice = fxquant.insert_observers(once)
    assert str(twice.graph) == str(once.graph)


def test_a_value_that_feeds_many_layers_has_one_observer():
    gm = observed(models.CrossAttention(), observer="minmax")
    watchers = observed_inputs(gm)
    assert len(watchers) == 4
    names = [n for n in watchers if n.endswith(("_k", "_v"))]
    assert len({id(watchers[n]) for n in names}) == 1


@pytest.mark.parametrize(
    "data",
    [
        [X[:6], X[6:]],
        ((x,) for x in X.split(5)),
        [[X]],
        [{"x": X[:7]}, {"x": X[7:]}],
        DataLoader(TensorDataset(X), batch_size=5),
        DataLoader(TensorDataset(X, torch.arange(12)), batch_size=5),
    ],
    ids=["tensors", "generator of tuples", "list", "dicts", "loader", "pairs with targets"],
)
def test_every_form_of_data_gives_the_same_ranges_and_counts_rows(data):
    gm = observed()
    assert fxquant.calibrate(gm, data) == 12
    assert gm.x_observer.statistics().count == X.numel()
    assert gm.x_observer.maximum == X.max()


def test_it_stops_inside_a_batch_at_the_wanted_number():
    gm = observed()
    assert fxquant.calibrate(gm, X.split(5), num_samples=7) == 7
    assert gm.x_observer.statistics().count == X[:7].numel()


def test_two_inputs_take_pairs_as_arguments():
    gm = observed(TwoInputs())
    assert fxquant.calibrate(gm, [(X, X)]) == 12


def test_a_progress_bar_shows_when_asked(capsys):
    fxquant.calibrate(observed(), [X], progress=True)
    assert "calibrating" in capsys.readouterr().err
    fxquant.calibrate(observed(), [X])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ([], "no samples.*generator that was used up"),
        (X, r"single Tensor.*\[batch\]"),
        ({"x": X}, r"single dict.*\[batch\]"),
        (["text"], "item of type str.*data loader"),
        ([X, torch.randn(2, 3)], r"batch 1.*0: \[2, 3\]"),
        ([{"z": X}], "batch 0.*z"),
    ],
)
def test_wrong_data_is_named(data, text):
    with pytest.raises(CalibrationError, match=text):
        fxquant.calibrate(observed(), data)


def test_nan_names_the_node():
    bad = X.clone()
    bad[3, 2, 1] = float("nan")
    with pytest.raises(CalibrationError, match="value 'x'.*NaN or Inf"):
        fxquant.calibrate(observed(), [X, bad, X])


def test_wrong_options_fail_at_once():
    with pytest.raises(OptionError, match="'minmax'"):
        observed(observer="mimax")
    with pytest.raises(OptionError, match="num_samples"):
        fxquant.calibrate(observed(), [X], num_samples=0)
