"""What cannot work is refused in words, before anything is done or written."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import fxquant
from fxquant.errors import (
    BudgetError,
    CalibrationError,
    FxquantError,
    OptionError,
    SaveError,
    TraceError,
    WeightError,
)
from tests.fingerprint import unchanged

QUIET = {"group_size": 32, "skip_param_threshold": 0, "accuracy_warning": "ignore"}
NAN, INF = math.nan, math.inf


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 64)).eval()


def rows(count=16, width=64):
    torch.manual_seed(1)
    return torch.randn(count, width)


@pytest.fixture(scope="module")
def report():
    return fxquant.sensitivity(
        model(), [rows()], rounding="rtn", group_size=32, skip_param_threshold=0
    )


@pytest.fixture(scope="module")
def quantized():
    return fxquant.static_quantize(model(), [rows()], **QUIET)


@pytest.mark.parametrize("budget", ["average_bits", "max_bytes", "min_sqnr_db"])
@pytest.mark.parametrize("value", [NAN, "4", "4GB", True, [4]])
def test_a_budget_that_is_no_number_is_refused(report, budget, value):
    with pytest.raises(OptionError, match=rf"{budget}: got .* Expected a number"):
        fxquant.allocate(report, **{budget: value})


@pytest.mark.parametrize("choices", [(), 5, "48", (7,), ("4",), (4, True), (NAN,)])
def test_choices_that_are_no_measured_widths_are_refused(report, choices):
    with pytest.raises(OptionError, match="choices: got .* some of"):
        fxquant.allocate(report, average_bits=4.5, choices=choices)


@pytest.mark.parametrize("value", [0, -1, -INF, 1.9])
def test_a_budget_that_is_too_small_is_refused(report, value):
    with pytest.raises(BudgetError, match="at least 2 bits a weight"):
        fxquant.allocate(report, average_bits=value)


def test_an_allocation_leaves_the_random_state_alone(report):
    torch.manual_seed(12345)
    with unchanged(nn.Module()):
        assert set(fxquant.allocate(report, average_bits=8).values()) == {8}


@pytest.mark.parametrize("value", [NAN, "20", None, True])
@pytest.mark.parametrize("name", ["sqnr_warning_threshold", "sqnr_error_threshold"])
def test_a_threshold_that_is_no_number_is_refused(quantized, name, value):
    _, info = quantized
    before = info.to_dict()
    for reaction in ("warn", "error", "ignore"):
        with pytest.raises(OptionError, match=f"{name}: got"):
            fxquant.check_accuracy_warnings(info, on_failure=reaction, **{name: value})
    assert info.to_dict() == before


NO_BATCHES = {
    "another width": [rows(), rows(4, 10)],
    "another dtype": [rows(), rows(4).double()],
    "sparse": [rows(), rows(4).to_sparse()],
    "on meta": [rows(), rows(4).to("meta")],
    "nested": [rows(), torch.nested.nested_tensor([rows(2), rows(3)], layout=torch.jagged)],
}
WITH_DATA = {
    "rtn": lambda m, data: fxquant.static_quantize(m, data, method="rtn", **QUIET),
    "gptq": lambda m, data: fxquant.static_quantize(m, data, method="gptq", **QUIET),
    "awq": lambda m, data: fxquant.static_quantize(m, data, method="awq", **QUIET),
    "activations": lambda m, data: fxquant.static_quantize(m, data, activation_bits=8, **QUIET),
    "budget": lambda m, data: fxquant.quantize(m, data, average_bits=5, **QUIET),
    "sensitivity": fxquant.sensitivity,
}


@pytest.mark.parametrize("call", WITH_DATA)
@pytest.mark.parametrize("kind", NO_BATCHES)
def test_a_batch_that_the_model_does_not_take_is_refused_wherever_it_is_first_run(kind, call):
    subject, data = model(), NO_BATCHES[kind]
    if kind != "nested":  # of a nested tensor no fingerprint is taken
        with unchanged(subject, data), pytest.raises(CalibrationError, match="batch"):
            WITH_DATA[call](subject, data)
        return
    with unchanged(subject), pytest.raises(CalibrationError, match="nested"):
        WITH_DATA[call](subject, data)


def test_a_plan_on_a_batch_that_the_model_does_not_take_is_refused():
    subject, data = model(), NO_BATCHES["another width"]
    with unchanged(subject, data), pytest.raises(CalibrationError, match="batch"):
        fxquant.plan(subject, data)


@pytest.mark.parametrize("inputs", [rows().to_sparse(), {"input": rows().to_sparse()}])
def test_an_example_that_is_not_dense_is_refused(inputs):
    with pytest.raises(TraceError, match="forward, argument .*sparse.*dense"):
        fxquant.trace(model(), inputs)


def test_a_dataset_is_not_taken_for_a_batch():
    with pytest.raises(CalibrationError, match="DataLoader"):
        fxquant.static_quantize(model(), TensorDataset(rows()))


def on_meta(graph):
    return graph.to("meta")


def hooked(graph):
    graph.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    return graph


def patched(graph):
    graph.forward = lambda x: x * 2
    return graph


@pytest.mark.parametrize(
    ("change", "text"),
    [(on_meta, "meta"), (hooked, "model: got forward hooks"), (patched, "forward function of")],
)
def test_a_graph_that_a_file_would_lose_a_part_of_is_not_saved(change, text, tmp_path):
    graph, info = fxquant.quantize(model(), example_inputs=rows(), **QUIET)
    with pytest.raises(SaveError, match=text):
        fxquant.save_model(change(graph), tmp_path / "m.safetensors", info)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("info", [{}, "a record", 5])
def test_a_record_that_is_none_is_not_saved(quantized, info, tmp_path):
    with pytest.raises(SaveError, match="info: got"):
        fxquant.save_model(quantized[0], tmp_path / "m.safetensors", info)
    assert list(tmp_path.iterdir()) == []


def test_a_model_on_meta_takes_no_file(quantized, tmp_path):
    fxquant.save_model(quantized[0], tmp_path / "m.safetensors")
    with torch.device("meta"):
        empty = model()
    with unchanged(empty), pytest.raises(OptionError, match=r"load_into, 0.weight.*meta"):
        fxquant.load_into(empty, tmp_path / "m.safetensors")


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def layer(change):
    made = nn.Linear(64, 64)
    change(made)
    return made


NO_PLAIN_LAYERS = {
    "a forward of its own": Doubled(64, 64),
    "patched": layer(lambda made: setattr(made, "forward", torch.relu)),
    "a hook": layer(lambda made: made.register_forward_hook(lambda module, args, y: 2 * y)),
    "a pre-hook": layer(lambda made: made.register_forward_pre_hook(lambda module, args: None)),
    "lazy": nn.LazyLinear(64),
    "meta": nn.Linear(64, 64, device="meta"),
    "complex": nn.Linear(64, 64, dtype=torch.complex64),
}


@pytest.mark.parametrize("kind", NO_PLAIN_LAYERS)
@pytest.mark.parametrize(
    "from_float",
    [fxquant.QuantizedLinearInt4.from_float, fxquant.QuantizedLinearInt8.from_float],
    ids=["int4", "int8"],
)
def test_a_layer_that_would_lose_something_is_not_rounded(kind, from_float):
    with pytest.raises(WeightError, match="Expected"):
        from_float(NO_PLAIN_LAYERS[kind])


@pytest.mark.parametrize("weight", [torch.eye(64).to_sparse(), torch.ones(4, 64, device="meta")])
def test_a_weight_without_values_at_their_places_is_refused(weight):
    with pytest.raises(WeightError, match="dense matrix with values"):
        fxquant.quantize_weight_int4(weight)


def test_inputs_that_only_an_example_tells_are_not_guessed():
    class Forwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 64)

        def forward(self, *tensors):
            return sum(self.fc(x) for x in tensors)

    x, subject = rows(), Forwards().eval()
    graph, _ = fxquant.quantize(subject, **QUIET)
    assert any("no example tells how many" in a for a in fxquant.trace_report(graph).attempts)
    for arguments in ((x,), (x, -x / 2)):
        torch.testing.assert_close(graph(*arguments), subject(*arguments), atol=0.4, rtol=0)
    with pytest.raises(FxquantError, match="opaque"):
        fxquant.save_model(graph, "never.safetensors")


@pytest.mark.parametrize("path", ["missing/report", "", None, 5])
@pytest.mark.parametrize("kind", ["to_json", "to_csv", "to_html"])
def test_a_report_that_cannot_be_written_is_refused(report, kind, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SaveError, match="Expected"):
        getattr(report, kind)(path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["to_json", "to_csv", "to_html"])
def test_a_report_replaces_a_file_whole(report, kind, tmp_path):
    file, link = tmp_path / "report", tmp_path / "link"
    file.write_text("old")
    file.chmod(0o600)
    link.symlink_to(file)
    getattr(report, kind)(link)
    assert link.is_symlink()
    assert file.stat().st_mode & 0o777 == 0o600
    assert "0" in file.read_text()


@pytest.mark.parametrize("name", ["missing/graph.svg", "missing/graph.dot", "missing/graph.html"])
def test_a_picture_that_cannot_be_written_is_refused(quantized, name, tmp_path):
    with pytest.raises(SaveError, match="no such file or directory"):
        fxquant.draw(quantized[0], tmp_path / name)


@pytest.mark.parametrize(
    "call",
    [
        lambda: fxquant.load_checkpoint(None),
        lambda: fxquant.quantize_checkpoint(5, "never"),
        lambda: fxquant.quantize_checkpoint(".", None),
        lambda: fxquant.QuantConfig.from_dict(None),
        lambda: fxquant.sensitivity(model(), [rows()], bits={"0": 4}),
        lambda: fxquant.create_observer("minmax").merge(5),
        lambda: fxquant.create_observer("minmax")([1.0]),
        lambda: fxquant.create_observer("ema", averaging_constant="x"),
    ],
)
def test_an_argument_of_a_wrong_kind_is_refused(call):
    with pytest.raises(FxquantError, match="Expected"):
        call()


def test_a_selection_that_is_no_tensor_is_refused():
    with pytest.raises(OptionError, match="select's result"):
        fxquant.sensitivity(
            model(), [rows()], method="exact", rounding="rtn", select=lambda output: None
        )
