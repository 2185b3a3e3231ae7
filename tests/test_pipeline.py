import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fxquant
from fxquant.errors import AccuracyError, FxquantError, OptionError, WeightError
from fxquant.modules.activation import quantize_activation
from fxquant.report.tables import format_db
from tests import models
from tests.models import WIDTH

X = torch.randn(64, 5, WIDTH)
QUIET = {"group_size": 32, "accuracy_warning": "ignore"}


def test_the_record_can_be_recomputed_by_hand():
    model = models.Plain().eval()
    q, info = fxquant.static_quantize(model, [X], **QUIET)
    assert info.heldout_samples == 8
    fitted, held = X[:8], X[-8:]  # as many of either
    with torch.no_grad():
        assert info.sqnr_db == pytest.approx(fxquant.sqnr_db(model(held), q(held)), abs=1e-4)
        by_hand = 10 * math.log10(
            model(held).double().square().sum() / (q(held) - model(held)).double().square().sum()
        )
    assert info.sqnr_db == pytest.approx(by_hand, abs=1e-4)
    row = info.rows[0]
    assert row.weight_sqnr_db == pytest.approx(
        fxquant.sqnr_db(model.first.weight, q.first.weight), abs=1e-4
    )
    with torch.no_grad():
        assert row.introduced_sqnr_db == pytest.approx(
            fxquant.sqnr_db(model.first(held), q.first(held)), abs=1e-4
        )
        fitted_db = fxquant.sqnr_db(model(fitted), q(fitted))
    assert info.fitted_sqnr_db == pytest.approx(fitted_db, abs=1e-4)
    assert info.calibration_samples_used == 64
    original = sum(p.numel() * 4 for p in model.parameters())
    assert info.original_size_mb == pytest.approx(original / 1e6)
    packed = (96 * 64 + 64 * 96) // 2
    groups = 96 * 2 + 64 * 3
    floats = 4 * (96 + 64 + 96 + 96)
    symmetric_zero = 2 * 2
    assert info.quantized_size_mb == pytest.approx(
        (packed + 2 * groups + floats + symmetric_zero) / 1e6
    )
    assert info.compression_ratio == pytest.approx(info.original_size_mb / info.quantized_size_mb)


def test_introduced_and_arrived_error_add_up_to_the_cumulative_one():
    model = models.CalledTwice().eval()
    q, info = fxquant.static_quantize(model, [X], **QUIET)
    row, held = info.rows[0], X[-info.heldout_samples :]
    with torch.no_grad():
        clean = [model.fc(held), model.fc(torch.tanh(model.fc(held)))]
        shifted_input = torch.tanh(q.fc(held))
        quantized = [q.fc(held), q.fc(shifted_input)]
        shifted = [model.fc(held), model.fc(shifted_input)]

    def db(a, b):
        return fxquant.sqnr_db(torch.cat(a), torch.cat(b))

    assert row.introduced_sqnr_db == pytest.approx(db(shifted, quantized), abs=1e-4)
    assert row.arrived_sqnr_db == pytest.approx(db(clean, shifted), abs=1e-4)
    assert row.cumulative_sqnr_db == pytest.approx(db(clean, quantized), abs=1e-4)
    assert row.cumulative_sqnr_db < row.introduced_sqnr_db


def test_the_table_has_every_column_and_node():
    _, info = fxquant.static_quantize(models.Plain(), [X], **QUIET)
    text = info.table()
    columns = "module type shape params action weight introduced cumulative warning why"
    for word in (*columns.split(), "first", "norm", "second", "96x64", "LayerNorm"):
        assert word in text
    assert format_db(info.rows[0].weight_sqnr_db) in text


def test_activation_bits_put_nodes_into_the_graph_and_observers_matter():
    model = models.Plain().eval()
    spiky = X.repeat(4, 1, 1)
    spiky[0, 0, :] = 160.0  # in all channels: an outlier of one would be divided away
    plain, _ = fxquant.static_quantize(model, [spiky], **QUIET)
    results = {}
    for observer in ("minmax", "histogram", "movingaverage"):
        q, info = fxquant.static_quantize(
            model,
            spiky.split(16),
            observer=observer,
            activation_bits=8,
            num_calibration_samples=256,
            **QUIET,
        )
        count = sum(n.target is quantize_activation for n in q.graph.nodes)
        assert count == 2
        results[observer] = fxquant.sqnr_db(plain(X[1:]), q(X[1:]))
        assert info.rows[0].input_high == pytest.approx(160.0)
        assert info.rows[0].input_outlier_ratio > 15
    assert results["histogram"] > results["minmax"] + 6
    assert len({round(v, 2) for v in results.values()}) == 3


def test_a_large_channel_costs_the_others_nothing():
    model = models.Plain().eval()
    uneven = X * torch.where(torch.arange(WIDTH) == 3, 200.0, 1.0)
    model.first.weight.data[:, 3] = 0  # nothing depends on it
    plain, _ = fxquant.static_quantize(model, [uneven], **QUIET)
    for observer in ("minmax", "histogram", "dynamic"):
        q, _ = fxquant.static_quantize(
            model, [uneven], observer=observer, activation_bits=8, **QUIET
        )
        with torch.no_grad():
            figure = fxquant.sqnr_db(plain(uneven), q(uneven))
        assert figure > (10 if observer == "dynamic" else 30)


def test_dynamic_activations_need_no_data():
    q, info = fxquant.quantize(models.Plain().eval(), activation_bits=8, **QUIET)
    assert q.first.activation == q.second.activation == "int8"
    assert info.config.observer == "dynamic"
    with torch.no_grad():
        weights_only, _ = fxquant.quantize(models.Plain().eval(), **QUIET)
        assert not torch.equal(q.first(X), weights_only.first(X))


def test_eight_bits_are_more_accurate_than_four_and_a_mapping_mixes_them():
    model = models.Plain().eval()
    figures = {}
    for name, bits in (("4", 4), ("8", 8), ("mixed", {"first": 4, "second": 8})):
        q, info = fxquant.static_quantize(model, [X], bits=bits, **QUIET)
        figures[name] = info.sqnr_db
    assert figures["4"] < figures["mixed"] < figures["8"]
    assert figures["8"] > 35
    assert isinstance(q.second, fxquant.QuantizedLinearInt8)


def test_without_data_weights_alone_are_compared():
    q, info = fxquant.quantize(models.Plain(), **QUIET)
    assert info.sqnr_db is None
    assert info.rows[0].introduced_sqnr_db is None
    assert info.rows[0].weight_sqnr_db > 20
    assert isinstance(q.first, fxquant.QuantizedLinearInt4)


def test_a_traced_graph_can_be_quantized_and_stays_as_it_was():
    gm = fxquant.trace(models.Plain(), X)
    before = gm(X)
    q, _ = fxquant.static_quantize(gm, [X], **QUIET)
    assert torch.equal(gm(X), before)
    assert isinstance(gm.first, nn.Linear)
    assert [n.name for n in q.graph.nodes] == [n.name for n in gm.graph.nodes]


def test_dequantizing_gives_plain_linears_with_the_same_outputs():
    q, _ = fxquant.static_quantize(models.Plain(), [X], **QUIET)
    plain = fxquant.dequantize_model(q)
    assert type(plain.first) is nn.Linear
    assert torch.equal(plain.first.weight, q.first.weight)
    assert fxquant.sqnr_db(plain(X), q(X)) > 45


def test_the_graph_compiles_whole():
    q, _ = fxquant.static_quantize(models.Plain(), [X], **QUIET)
    compiled = torch.compile(q, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(X), q(X), atol=1e-5)


def test_warnings_are_graded_and_can_be_shown_raised_or_ignored():
    model = models.Plain()
    with pytest.warns(fxquant.AccuracyWarning, match="only 3 calibration samples"):
        fxquant.static_quantize(model, [X[:3]], group_size=32)
    limits = {"sqnr_warning_threshold": 60.0, "sqnr_error_threshold": 50.0}
    with pytest.raises(
        AccuracyError, match=r"critical: output SQNR.*below 50 dB.*Keep these layers"
    ):
        fxquant.static_quantize(model, [X], group_size=32, accuracy_warning="error", **limits)
    _, info = fxquant.static_quantize(model, [X], **QUIET, **limits)
    assert sum(w.startswith("critical") for w in info.warnings) == 3
    assert "critical" in info.table()
    fxquant.check_accuracy_warnings(info, 60.0, 1.0, on_failure="ignore")
    assert sum(w.startswith("low") for w in info.warnings) == 3
    with pytest.raises(OptionError, match="'error', 'warn', 'ignore'"):
        fxquant.check_accuracy_warnings(info, on_failure="shout")


def test_it_warns_when_nothing_is_skipped_or_nothing_is_quantized():
    _, info = fxquant.quantize(nn.Sequential(nn.Linear(64, 64)), **QUIET)
    assert any("every layer was quantized, the first and the last too" in w for w in info.warnings)
    _, info = fxquant.quantize(nn.Sequential(nn.Linear(4, 4)), **QUIET)
    assert any("nothing was quantized" in w for w in info.warnings)


def test_a_broken_weight_is_named():
    model = models.Plain()
    with torch.no_grad():
        model.second.weight[0, 0] = float("inf")
    with pytest.raises(WeightError, match=r"second\.weight.*1 of 6144"):
        fxquant.quantize(model, **QUIET)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"method": "gptqq"}, "method.*'rtn'"),
        ({"observer": "mimax"}, "observer.*'minmax'"),
        ({"activation_bits": 4}, "activation_bits.*8 or None"),
        ({"accuracy_warning": "no"}, "accuracy_warning"),
        ({"num_calibration_samples": 0}, "num_calibration_samples"),
        ({"group_size": 0}, "group_size"),
    ],
)
def test_wrong_options_say_what_is_valid(options, text):
    with pytest.raises(OptionError, match=text):
        fxquant.static_quantize(models.Plain(), [X], **{**QUIET, **options})


@pytest.mark.parametrize("data", [[], [torch.full((2, 5, WIDTH), float("nan"))]])
def test_empty_or_broken_data_is_an_error(data):
    with pytest.raises(FxquantError, match="no samples|got NaN"):
        fxquant.static_quantize(models.Plain(), data, **QUIET)


def test_sensitivity_measures_each_layer(tmp_path):
    report = fxquant.sensitivity(models.Plain(), [X], group_size=32)
    assert [r.module for r in report.rows] == ["first", "second"]
    assert report.rows[1].cumulative_sqnr_db < report.rows[1].introduced_sqnr_db
    report.to_csv(tmp_path / "r.csv")
    assert (tmp_path / "r.csv").read_text().startswith("module,kind,shape,params,bits")
    assert "first" in report.table()


@pytest.mark.parametrize("method", ["rtn", "hqq", "awq", "smoothquant", "gptq", "best"])
@pytest.mark.parametrize("case", ["bfloat16", "one token", "zeros", "short group", "called twice"])
def test_every_method_has_a_defined_result(method, case):
    model = (models.CalledTwice() if case == "called twice" else models.Plain()).eval()
    x, options = X, dict(QUIET)
    if case == "bfloat16":
        model, x = model.bfloat16(), X.bfloat16()
    elif case == "one token":
        x = X[:1, :1]
    elif case == "zeros":
        x = torch.zeros_like(X)
    elif case == "short group":
        options["group_size"] = 28
    q, info = fxquant.static_quantize(model, [x], method=method, skip_param_threshold=0, **options)
    with torch.no_grad():
        expected, found = model(X.to(x.dtype)), q(X.to(x.dtype))
    assert found.dtype == x.dtype
    assert fxquant.sqnr_db(expected, found) > 12
    assert all(d.reason for d in info.decisions)


def test_nan_in_a_batch_is_an_error_that_names_the_batch_and_the_value():
    batches = [X.clone() for _ in range(4)]
    batches[2][1, 1, 1] = torch.nan
    for method in ("gptq", "awq"):
        with pytest.raises(FxquantError, match=r"batch 2, argument \[0\]: got NaN"):
            fxquant.static_quantize(models.Plain().eval(), batches, method=method, **QUIET)


class Pooled(nn.Module):
    """Convolutions only: there is nothing to quantize."""

    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x):
        return self.last(torch.relu(self.conv(x))).mean((2, 3))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", ["rtn", "gptq", "auto", "awq+gptq"])
def test_a_model_with_nothing_to_quantize_costs_one_pass_over_the_data(method):
    model, x = Pooled(), torch.randn(66, 3, 20, 20)
    gm = fxquant.trace(model, x)
    with FlopCounterMode(display=False) as once:
        gm(x)
    with FlopCounterMode(display=False) as all_of_it:
        _, info = fxquant.static_quantize(gm, [x], method=method, accuracy_warning="ignore")
    assert info.selected_layers == []
    assert all_of_it.get_total_flops() == once.get_total_flops()


@pytest.mark.parametrize("rows", [2, 4, 9])
@pytest.mark.parametrize("seed", range(4))
def test_auto_is_never_worse_than_rounding_on_rows_held_out(rows, seed):
    torch.manual_seed(seed)
    model, x = models.Plain(), torch.randn(rows, 9, WIDTH)
    found = {
        method: fxquant.static_quantize(
            model, [x], method=method, group_size=32, skip_param_threshold=0,
            accuracy_warning="ignore",
        )[1]
        for method in ("rtn", "auto")
    }  # fmt: skip
    assert found["auto"].heldout_samples == found["rtn"].heldout_samples >= 1
    assert found["auto"].sqnr_db >= found["rtn"].sqnr_db


def test_the_ledger_says_whether_few_tokens_were_enough():
    torch.manual_seed(0)
    _, info = fxquant.static_quantize(
        models.Plain(), [torch.randn(4, 5, WIDTH)], method="gptq", group_size=32,
        skip_param_threshold=0, accuracy_warning="ignore",
    )  # fmt: skip
    reasons = [d.reason for d in info.decisions if d.bits is not None]
    few = f"15 tokens for {WIDTH} inputs; still better than rounding on 5 tokens held out"
    worse = "gptq was worse on tokens that were held out: rounded to nearest"
    assert reasons
    assert all(few in reason or worse in reason for reason in reasons), reasons
