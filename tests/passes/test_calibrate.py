import sys
from collections import UserDict

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fxquant
from fxquant.errors import CalibrationError, OptionError
from fxquant.graph.layers import sites
from tests import models
from tests.models import WIDTH

X = torch.randn(12, 5, WIDTH)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, a, b):
        return self.fc(a) + b


class Watched(nn.Module):
    """A module of the user's own, with observers in it and ways to call it."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.5)
        self.watch = fxquant.create_observer("minmax")
        self.unused = fxquant.create_observer("minmax")

    def forward(self, x, mask=None, *, verbose=False):
        x = self.watch(self.dropout(self.norm(x)))
        return x if mask is None else x * mask


class Flagged(nn.Module):
    def __init__(self):
        super().__init__()
        self.watch = fxquant.create_observer("minmax")

    def forward(self, x, is_flat=False, *, mask=None):
        assert is_flat is False
        assert mask is None
        return self.watch(x)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(X)


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
    watchers = {
        site.name: gm.get_submodule(site.input.target)
        for site in sites(gm)
        if isinstance(site.module, nn.Linear)
    }
    assert all(isinstance(watcher, fxquant.Observer) for watcher in watchers.values())
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
        [UserDict(x=X)],
        DataLoader(Stream(), batch_size=5),
        DataLoader(TensorDataset(X), batch_size=5),
        DataLoader(TensorDataset(X, torch.arange(12)), batch_size=5),
    ],
    ids=[
        "tensors",
        "generator of tuples",
        "list",
        "dicts",
        "mappings",
        "stream",
        "loader",
        "pairs with targets",
    ],
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


@pytest.mark.parametrize(("wanted", "drawn"), [(4, 1), (5, 1), (6, 2)])
def test_it_draws_no_batch_that_it_does_not_use(wanted, drawn):
    batches = iter(X.split(5))
    assert fxquant.calibrate(observed(), batches, num_samples=wanted) == wanted
    assert len(list(batches)) == 3 - drawn


def test_fewer_samples_than_wanted_are_all_used():
    assert fxquant.calibrate(observed(), X.split(5), num_samples=100) == 12


def test_only_tensors_with_a_row_for_each_sample_are_cut():
    gm = observed(TwoInputs())
    shared = torch.randn(5, WIDTH)
    assert fxquant.calibrate(gm, [(X, shared)], num_samples=3) == 3
    assert gm.a_observer.statistics().count == X[:3].numel()


def test_rows_of_tensors_in_a_list_count():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.watch = fxquant.create_observer("minmax")

        def forward(self, parts):
            return self.watch(parts[0] + parts[1])

    model = Listed()
    assert fxquant.calibrate(model, [([X, X],)], num_samples=8) == 8
    assert model.watch.statistics().count == X[:8].numel()


def test_a_tensor_without_dimensions_is_one_sample():
    assert fxquant.calibrate(Flagged(), [torch.tensor(1.0), torch.tensor(2.0)]) == 2


def test_two_inputs_take_pairs_as_arguments():
    gm = observed(TwoInputs())
    assert fxquant.calibrate(gm, [(X, X)]) == 12


def test_the_second_of_a_pair_is_an_input_where_the_model_has_a_second_one():
    rows = torch.randn(6, 4)
    with pytest.raises(
        CalibrationError, match=r"batch 0.*forward\(x, mask=None, \*, verbose=False"
    ):
        fxquant.calibrate(Watched(), [(rows, torch.randn(5))])
    assert fxquant.calibrate(Watched(), [(rows, torch.ones(4))]) == 6


def test_an_option_of_the_model_is_no_input():
    model = Flagged()
    assert fxquant.calibrate(model, [(X, torch.arange(12))]) == 12
    assert model.watch.statistics().count == X.numel()


def test_the_model_runs_in_evaluation_mode_and_keeps_its_own():
    model = Watched()
    model.dropout.eval()
    modes = [m.training for m in model.modules()]
    rows = torch.randn(50, 4) + 3
    fxquant.calibrate(model, [rows])
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(model.norm.running_mean, torch.zeros(4))
    assert model.watch.statistics().high == pytest.approx(rows.max().item(), rel=1e-4)
    with pytest.raises(CalibrationError):
        fxquant.calibrate(model, ["text"])
    assert [m.training for m in model.modules()] == modes


def test_an_observer_that_nothing_reached_says_so_when_asked():
    model = Watched()
    assert fxquant.calibrate(model, [torch.randn(3, 4)]) == 3
    with pytest.raises(CalibrationError, match="value 'unused'.*no observed values.*calibrate"):
        model.unused.calculate_qparams()


def test_calibrating_again_adds():
    gm = observed()
    fxquant.calibrate(gm, [X[:5]])
    fxquant.calibrate(gm, [X[5:]])
    assert gm.x_observer.statistics().count == X.numel()


def test_a_progress_bar_shows_when_asked_and_on_a_terminal(capsys, monkeypatch):
    fxquant.calibrate(observed(), X.split(5), progress=True)
    assert "calibrating: 100%" in capsys.readouterr().err
    fxquant.calibrate(observed(), DataLoader(Stream(), batch_size=5), progress=True)
    assert "calibrating: 3it" in capsys.readouterr().err
    fxquant.calibrate(observed(), [X])
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    fxquant.calibrate(observed(), [X])
    assert "calibrating" in capsys.readouterr().err
    fxquant.calibrate(observed(), [X], progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ([], "no samples.*generator that was used up"),
        (X, r"single Tensor.*\[batch\]"),
        ({"x": X}, r"single dict.*\[batch\]"),
        (["text"], "item of type str.*data loader"),
        (5, r"single int.*\[batch\]"),
        ([X, torch.randn(2, 3)], r"batch 1.*0: \[2, 3\].*forward\(x\)"),
        ([(X, X, [X, 1])], r"batch 0.*2: \(\[12, 5, 64\], int\)"),
        ([{"x": X, "labels": X}], r"keys \['labels'\].*among \['x'\].*Leave the others out"),
    ],
)
def test_wrong_data_is_named(data, text):
    with pytest.raises(CalibrationError, match=text):
        fxquant.calibrate(observed(), data)


def test_the_cause_of_a_refused_batch_is_kept():
    with pytest.raises(CalibrationError) as caught:
        fxquant.calibrate(observed(), [torch.randn(2, 3)])
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_nan_names_the_node():
    bad = X.clone()
    bad[3, 2, 1] = float("nan")
    gm = observed()
    with pytest.raises(CalibrationError, match="value 'x'.*NaN or Inf"):
        fxquant.calibrate(gm, [X, bad, X])
    gm.x_observer.node_name = "my input"
    with pytest.raises(CalibrationError, match="my input.*NaN or Inf"):
        fxquant.calibrate(gm, [X])


def test_wrong_options_fail_at_once():
    with pytest.raises(OptionError, match="'minmax'"):
        observed(observer="mimax")
    with pytest.raises(OptionError, match="num_samples"):
        fxquant.calibrate(observed(), [X], num_samples=0)
