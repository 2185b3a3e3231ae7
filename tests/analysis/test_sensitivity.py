import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant.analysis import batching
from fxquant.analysis.candidates import find_candidates
from fxquant.analysis.memory_plan import plan_exact
from fxquant.demo.language_model import calibration_tokens, load_language_model
from fxquant.errors import BudgetError, CalibrationError, OptionError
from fxquant.graph.calls import Call
from fxquant.graph.copying import copy_sharing_tensors
from fxquant.graph.layers import sites
from fxquant.graph.stepper import Stepper
from fxquant.modules.linear import QuantizedLinear
from fxquant.numerics.integers import WIDTHS
from tests import models
from tests.models import WIDTH

X = [torch.randn(8, 5, WIDTH), torch.randn(3, 5, WIDTH)]
OPTIONS = {"group_size": 32, "skip_param_threshold": 0}


class Branches(nn.Module):
    """Residuals, a shared layer, an opaque child, and a layer that ends nowhere else."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.child = models.BranchingChild()
        self.left = nn.Linear(WIDTH, WIDTH)
        self.right = nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, 40)

    def forward(self, x):
        x = x + torch.tanh(self.first(x))
        x = x + self.shared(F.gelu(self.shared(x)))
        y = self.child(x)
        return self.last(self.left(y) * torch.sigmoid(self.right(y)) + x)


def shipped_parts(gm, method, width):
    """The layers by name as `static_quantize` ships them, and the rows that it held out."""
    q, info = fxquant.static_quantize(
        gm, X, method=method, bits=width, accuracy_warning="ignore", **OPTIONS
    )
    layers = {s.name: s.module for s in sites(q) if isinstance(s.module, QuantizedLinear)}
    return layers, X[-1][-info.heldout_samples :]


def naive_errors(gm, method, width):
    """Put one shipped layer in place, run everything on the held-out rows, put it back."""
    layers, held_out = shipped_parts(gm, method, width)
    gm = copy_sharing_tensors(gm, frozen=True)
    found = {}
    for candidate in find_candidates(gm, list(layers)):
        signal = noise = 0.0
        with torch.no_grad():
            for x in [held_out]:
                expected = gm(x)
                with candidate.replaced_by(layers[candidate.name]):
                    noise += (gm(x) - expected).double().square().sum().item()
                signal += expected.double().square().sum().item()
        found[candidate.name] = -10 * math.log10(noise / signal)
    return found


@pytest.mark.parametrize(("rounding", "width"), [("rtn", 4), ("gptq", 4), (None, 4), ("rtn", 8)])
def test_exact_equals_the_naive_scan_of_what_ships(rounding, width):
    """On branches, shared and opaque modules, with each method, on rows held out."""
    gm = fxquant.trace(Branches(), X[0])
    report = fxquant.sensitivity(gm, X, method="exact", bits=width, rounding=rounding, **OPTIONS)
    assert (report.samples, report.heldout_samples) == (11, 1)
    names = [row.module for row in report.rows]
    assert set(names) == {
        "first", "shared", "child.fc", "child.block.0", "child.block.2", "left", "right", "last",
    }  # fmt: skip
    naive = naive_errors(gm, rounding or "auto", width)
    for row in report.rows:
        assert row.output_sqnr_db == pytest.approx(naive[row.module], abs=1e-3)
        assert set(row.output_errors) == set(WIDTHS)


@pytest.mark.parametrize("kind", ["branches", "mixes rows"])
def test_batched_widths_give_what_single_runs_give(monkeypatch, kind):
    small = [x[:2] for x in X]
    gm = fxquant.trace(Branches() if kind == "branches" else MixesRows(), small[0])
    figures = {}
    for limit in (0, batching.BATCHED_BYTES):
        monkeypatch.setattr(batching, "BATCHED_BYTES", limit)
        report = fxquant.sensitivity(gm, small, method="exact", **OPTIONS)
        figures[limit] = [r.output_errors for r in report.rows]
    for plain, together in zip(*figures.values(), strict=True):
        assert plain == pytest.approx(together, rel=1e-2)


class MixesRows(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        y = self.fc(x)
        return y - 0.9 * y.mean(0)


def test_a_graph_with_its_rows_elsewhere_is_found_out():
    def values_of(model, x):
        stepper = Stepper(fxquant.trace(model), Call((x,)))
        values = {}
        for node in stepper.nodes:
            values[node] = stepper.compute(node, values)
        return batching.repeated_values(stepper, values, 2)

    x = torch.randn(3, WIDTH)
    assert values_of(models.Plain(), x) is not None
    sorting = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Softmax(dim=0))
    assert values_of(sorting, x) is None


def test_the_graph_is_as_it_was_after_an_exact_run():
    gm = fxquant.trace(Branches(), X[0])
    before = gm(X[0])
    fxquant.sensitivity(gm, X, method="exact", **OPTIONS)
    assert torch.equal(gm(X[0]), before)
    assert all(p.requires_grad for p in gm.parameters())


def rank_correlation(a, b):
    def ranks(values):
        order = sorted(range(len(values)), key=values.__getitem__)
        return torch.tensor([float(order.index(i)) for i in range(len(values))])

    return torch.corrcoef(torch.stack((ranks(a), ranks(b))))[0, 1].item()


@pytest.mark.parametrize(("metric", "rounding"), [("sqnr", None), ("kl", "rtn")])
def test_the_gradient_method_ranks_layers_as_exact_does_on_the_embedded_model(metric, rounding):
    # 12 rows are held out; on 4 the estimate of a layer is wrong by up to ten times either way.
    data = list(calibration_tokens()[::4, :40].split(16))
    gm = fxquant.trace(load_language_model(), data[0])
    errors = {}
    for method in ("exact", "gradient"):
        report = fxquant.sensitivity(gm, data, method=method, metric=metric, rounding=rounding)
        errors[method] = [row.output_errors[4] for row in report.rows]
    assert rank_correlation(errors["exact"], errors["gradient"]) >= 0.8
    ratios = [g / e for e, g in zip(errors["exact"], errors["gradient"], strict=True)]
    assert 0.5 < sorted(ratios)[len(ratios) // 2] < 2  # the unit is right, not only the order


def test_analysis_is_another_name_of_method():
    report = fxquant.sensitivity(models.Plain(), X, analysis="gradient", rounding="rtn", **OPTIONS)
    assert report.method == "gradient"
    with pytest.raises(OptionError, match="analysis: got 'nonsense'"):
        fxquant.sensitivity(models.Plain(), X, analysis="nonsense", **OPTIONS)


def test_a_metric_of_ones_own_is_used_by_exact_and_refused_by_gradient():
    def worst(a, b):
        return (a - b).abs().max().item()

    report = fxquant.sensitivity(models.Plain(), X, method="exact", metric=worst, **OPTIONS)
    assert report.metric == "custom"
    assert all(row.output_sqnr_db is None for row in report.rows)
    assert all(0 < row.output_errors[8] < row.output_errors[4] for row in report.rows)
    with pytest.raises(OptionError, match="method='exact'"):
        fxquant.sensitivity(models.Plain(), X, method="gradient", metric=worst, **OPTIONS)
    with pytest.raises(OptionError, match="'kl' where the output is logits"):
        fxquant.sensitivity(models.Plain(), X, method="exact", metric="cosine", **OPTIONS)


def test_local_follows_the_error_through_joins():
    gm = fxquant.trace(Branches(), X[0])
    report = fxquant.sensitivity(gm, X, **OPTIONS)
    flows = {flow.node: flow for flow in report.flows}
    join = next(f for f in report.flows if f.kind == "add" and len(f.shares) == 2)
    assert sum(join.shares.values()) == pytest.approx(1)
    assert flows["first"].gain_db is None  # nothing erroneous comes in
    assert "error came from" in report.flow_table()
    rows = {row.module: row for row in report.rows}
    assert flows["last"].sqnr_db == pytest.approx(rows["last"].cumulative_sqnr_db, abs=1e-6)
    assert flows["last"].sqnr_db == pytest.approx(report.output_sqnr_db, abs=1e-6)


def test_the_memory_plan_predicts_the_measured_peak():
    data = list(calibration_tokens()[::12][:8].split(8))
    gm = fxquant.trace(load_language_model(), data[0])
    report = fxquant.sensitivity(gm, data, method="exact", rounding="rtn")
    assert report.heldout_samples == 1
    candidates = find_candidates(gm, [row.module for row in report.rows])
    plan = plan_exact(gm, candidates, report.heldout_samples)
    assert plan.activations == pytest.approx(report.peak_bytes, rel=0.3)
    assert plan_exact(gm, candidates, 16).activations == 16 * plan.activations


def test_a_plan_and_a_progress_bar_show_when_asked(capsys):
    gm = fxquant.trace(models.Plain(), X[0])
    fxquant.sensitivity(gm, X, method="exact", progress=True, **OPTIONS)
    shown = capsys.readouterr().err
    assert "memory plan" in shown
    assert "exact: 100%" in shown


def test_a_table_says_how_it_was_measured_and_bad_data_is_refused():
    table = fxquant.sensitivity(models.Plain(), X, rounding="rtn", **OPTIONS).table()
    assert table.endswith("layers made by rtn from 10 rows, measured on 1 rows held out")
    for data, options, error in (
        ([], {}, CalibrationError),
        ([torch.zeros(0, 5, WIDTH)], {}, CalibrationError),
        ([torch.full((4, 5, WIDTH), math.nan)], {}, CalibrationError),
        (X, {"num_samples": 0}, OptionError),
        (X, {"rounding": "nearest"}, OptionError),
    ):
        with pytest.raises(error):
            fxquant.sensitivity(models.Plain(), data, **options, **OPTIONS)


@pytest.fixture(scope="module")
def branches():
    torch.manual_seed(0)
    gm = fxquant.trace(Branches(), X[0])
    return fxquant.sensitivity(gm, X, method="exact", rounding="rtn", **OPTIONS)


@pytest.mark.parametrize("average", [4, 4.5, 5.3, 6, 8])
def test_allocate_finds_the_best_allocation_within_the_budget(branches, average):
    plan = fxquant.allocate(branches, average_bits=average, choices=(4, 8))
    rows = branches.rows
    sizes = [r.shape[0] * r.shape[1] for r in rows]
    assert plan.average_bits <= average + 1e-9
    best = math.inf
    for bits in itertools.product((4, 8), repeat=len(rows)):
        if sum(s * b for s, b in zip(sizes, bits, strict=True)) <= average * sum(sizes):
            error = sum(r.output_errors[b] for r, b in zip(rows, bits, strict=True))
            best = min(best, error)
    found = sum(r.output_errors[plan[r.module]] for r in rows)
    uniform = {r.module: 4 for r in rows}
    assert found == pytest.approx(best, rel=0.02) or dict(plan) == uniform
    assert plan.measured_sqnr_db >= branches.evaluate(uniform)
    assert plan.predicted_sqnr_db == pytest.approx(-10 * math.log10(found))


def test_an_allocation_is_what_static_quantize_does(branches):
    gm = fxquant.trace(Branches(), X[0])
    plan = fxquant.allocate(branches, average_bits=6)
    torch.manual_seed(0)
    _, info = fxquant.static_quantize(
        fxquant.trace(Branches(), X[0]),
        X,
        bits=plan,
        group_size=32,
        method="rtn",
        accuracy_warning="ignore",
    )
    assert {d.module: d.bits or 16 for d in info.decisions if d.module in plan} == plan
    assert info.sqnr_db == pytest.approx(plan.measured_sqnr_db, abs=1e-3)
    assert gm is not None


def test_budgets_in_decibels(branches):
    goal = fxquant.allocate(branches, min_sqnr_db=25)
    assert goal.measured_sqnr_db >= 25
    assert goal.average_bits < 8
    together = fxquant.allocate(branches, average_bits=6, keep_together=True)
    assert together["left"] == together["right"]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_budget_in_bytes_counts_every_tensor_of_the_file(branches, share):
    widths = {b: fxquant.allocate(branches, average_bits=b, choices=(b,)).bytes for b in (2, 8)}
    budget = widths[2] + share * (widths[8] - widths[2])
    plan = fxquant.allocate(branches, max_bytes=budget)
    torch.manual_seed(0)
    gm = fxquant.trace(Branches(), X[0])
    _, info = fxquant.static_quantize(
        gm, X, bits=plan, method="rtn", accuracy_warning="ignore", **OPTIONS
    )
    assert round(info.quantized_size_mb * 1e6) == plan.bytes <= budget
    assert plan.bytes > budget * 0.97


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"average_bits": 1.5}, "1.5 bits a weight. Expected at least 2 bits a weight"),
        ({"average_bits": 3, "choices": (4, 8)}, "at least 4 bits"),
        ({"max_bytes": 10}, r"at least [\d,]+ bytes.*which 2 bits take. Raise the budget"),
        ({"min_sqnr_db": 300, "choices": (4, 8)}, "at most .* dB, what 8 bits"),
    ],
)
def test_an_impossible_budget_says_what_is_possible(branches, options, text):
    with pytest.raises(BudgetError, match=text):
        fxquant.allocate(branches, **options)


def test_two_budgets_or_unknown_choices_are_refused(branches):
    with pytest.raises(OptionError, match="exactly one"):
        fxquant.allocate(branches, average_bits=5, max_bytes=9)
    with pytest.raises(OptionError, match="widths the report measured"):
        fxquant.allocate(branches, average_bits=5, choices=(4, 7))


def test_a_local_report_can_be_allocated_too():
    report = fxquant.sensitivity(fxquant.trace(Branches(), X[0]), X, **OPTIONS)
    plan = fxquant.allocate(report, average_bits=6)
    assert plan.predicted_sqnr_db is None
    assert plan.measured_sqnr_db >= report.output_sqnr_db


def test_plans_are_compared_in_the_metric_of_the_report():
    report = fxquant.sensitivity(
        Branches(), X, method="gradient", rounding="rtn", metric="kl", **OPTIONS
    )
    plan = fxquant.allocate(report, average_bits=3)
    uniform = dict.fromkeys(plan, 3)
    assert report.evaluate_error(dict(plan)) <= report.evaluate_error(uniform)
    assert plan.measured_sqnr_db == report.evaluate(dict(plan))
