"""Errors as a whole: where, what happened, what was expected, what to do."""

import pytest
import torch
from torch import nn

import fxquant

X = torch.ones(2, 64)


def model():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))


def with_nan():
    broken = model()
    broken[0].weight.data[3, 5] = float("nan")
    return broken


class TwoInputs(nn.Module):
    def forward(self, x, y):
        return x + y


class Strict(nn.Module):
    def forward(self, x):
        raise ValueError("negative sums are not wanted")


def quantized():
    return fxquant.quantize(model(), accuracy_warning="ignore")[0]


def report():
    return fxquant.sensitivity(model(), [X], method="gradient", rounding="rtn", group_size=32)


SENTENCES = [
    (lambda: fxquant.quantize(model(), bits=7),
     "bits: got 7. Expected one of 2, 3, 4, 5, 6, 8. Choose one of these widths (in a mapping, 16 "
     "leaves a module float)."),
    (lambda: fxquant.quantize(model(), group_size=0),
     "group_size: got 0. Expected a whole number of at least 1, or -1 for one group a row. 128 and "
     "32 are usual."),
    (lambda: fxquant.quantize(model(), None, "w8a9"),
     "preset: got 'w8a9'. Expected one of 'w4a16', 'w4a8', 'w8a8'. Did you mean 'w8a8'?"),
    (lambda: fxquant.quantize(model(), modules_to_not_convert=["O"]),
     "modules_to_not_convert: rule 'O': got no node with parameters that it selects. Expected a "
     "rule that selects at least one. Some names of this model: '0', '2'."),
    (lambda: fxquant.static_quantize(model(), None),
     "calibration_data: got None. Expected an iterable of batches. Pass data, or call "
     "quantize(model) to do without."),
    (lambda: fxquant.static_quantize(model(), []),
     "calibration data: got no samples. Expected at least one batch with a row. Pass "
     "representative inputs; a generator that was used up must be made anew."),
    (lambda: fxquant.static_quantize(model(), ["text"]),
     "calibration data: got an item of type str. Expected a tensor, a tuple or list of arguments, "
     "or a dict of keyword arguments. Let the data loader yield what the model is called with."),
    (lambda: fxquant.static_quantize(model(), [torch.full((2, 64), float("nan"))]),
     "calibration batch 0, argument [0]: got NaN. Expected numbers. Remove or repair the samples "
     "with missing values."),
    (lambda: fxquant.quantize(with_nan()),
     "0.weight: got NaN or Inf in 1 of 4096 elements. Expected finite values. Check the checkpoint "
     "that the model was loaded from."),
    (lambda: fxquant.trace(Strict(), X),
     "Strict.forward: it raises on the example inputs: ValueError: negative sums are not wanted. "
     "Expected inputs the model runs on. Check the shapes, dtypes and argument names of the "
     "example inputs."),
    (lambda: fxquant.trace(TwoInputs(), X),
     "TwoInputs.forward: got example inputs that do not fit: missing a required argument: 'y'. "
     "Expected arguments of forward(x, y). Pass a tensor, a tuple of positional or a dict of "
     "keyword arguments."),
    (lambda: fxquant.quantize(fxquant.trace(model()), into="model"),
     "into: got 'model' for a graph, which does not know the class it was traced from. Expected "
     "the model itself. Pass the model, or call swap_modules(model, graph) afterwards."),
    (lambda: fxquant.quantize(model(), average_bits=4.5),
     "average_bits: got no data. Expected data to measure on, and one number of bits. Pass data, "
     "and leave bits out."),
    (lambda: fxquant.load_model("nowhere/m.safetensors"),
     "nowhere/m.safetensors: reading it failed: no such file or directory. Expected a whole file "
     "that fxquant.save_model wrote. Check the path; if the file is damaged, copy or save it "
     "again."),
    (lambda: fxquant.save_model(quantized(), "nowhere/m.safetensors"),
     "nowhere/m.safetensors: writing it failed: no such file or directory. Expected a folder that "
     "exists, can be written and has space. Create the folder, free some space, or choose another "
     "path."),
    (lambda: fxquant.save_model(fxquant.quantize(model(), accuracy_warning="ignore"), "m"),
     "save_model: got a pair. Expected a torch.fx.GraphModule. quantize returns a pair: write "
     "`qmodel, info = ...`, then pass the one needed."),
    (lambda: fxquant.diff(model(), model()),
     "before: got an object of type Sequential. Expected a torch.fx.GraphModule. Pass the graph "
     "that trace, quantize, static_quantize or load_model returned."),
    (lambda: fxquant.allocate(report()),
     "allocate: got 0 budgets. Expected exactly one of average_bits, max_bytes and min_sqnr_db. "
     "Pass one of them."),
    (lambda: fxquant.create_observer("histo"),
     "observer: got 'histo'. Expected one of 'minmax', 'movingaverage', 'ema', 'histogram', 'kl', "
     "'auto'. Did you mean 'histogram'?"),
    (lambda: fxquant.MinMaxObserver().calculate_qparams(),
     "MinMaxObserver: got no observed values. Expected calibration data that reaches this node. "
     "Run fxquant.calibrate with representative data first."),
    (lambda: fxquant.swap_modules(nn.Sequential(nn.Linear(8, 8)), quantized()),
     "0.weight: got shape [8, 8] instead of [64, 64]. Expected the model that was quantized. Pass "
     "a model of the same class and configuration, or quantize this one."),
]  # fmt: skip


@pytest.mark.parametrize(("call", "sentence"), SENTENCES, ids=range(len(SENTENCES)))
def test_an_error_says_where_what_happened_what_was_expected_and_what_to_do(call, sentence):
    with pytest.raises(fxquant.FxquantError) as caught:
        call()
    assert str(caught.value) == sentence


WRONG = {"int": 5, "None": None, "class": nn.Linear, "pair": (5, "model"), "model": model()}
TAKE_A_GRAPH = {
    "trace_report": fxquant.trace_report,
    "insert_observers": fxquant.insert_observers,
    "dequantize_model": fxquant.dequantize_model,
    "to_networkx": fxquant.to_networkx,
    "info": fxquant.info,
    "diff": lambda graph: fxquant.diff(graph, graph),
    "draw": lambda graph: fxquant.draw(graph, "never.svg"),
    "swap_modules": lambda graph: fxquant.swap_modules(model(), graph),
    "save_model": lambda graph: fxquant.save_model(graph, "never.safetensors"),
    "check_accuracy_warnings": fxquant.check_accuracy_warnings,
    "allocate": lambda report: fxquant.allocate(report, average_bits=4.5),
    "load_model": fxquant.load_model,
    "check_export": lambda source: fxquant.check_export(source, "gptq"),
    "quantize_weight_int4": fxquant.quantize_weight_int4,
}
TAKE_A_MODULE = {
    "trace": fxquant.trace,
    "quantize": fxquant.quantize,
    "plan": fxquant.plan,
    "static_quantize": lambda given: fxquant.static_quantize(given, [X]),
    "sensitivity": lambda given: fxquant.sensitivity(given, [X]),
    "calibrate": lambda given: fxquant.calibrate(given, [X]),
    "load_into": lambda given: fxquant.load_into(given, "never.safetensors"),
    "from_float": fxquant.QuantizedLinearInt4.from_float,
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("function", TAKE_A_GRAPH.values(), ids=TAKE_A_GRAPH)
def test_an_argument_of_a_wrong_type_is_an_error_of_fxquant(function, wrong, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(fxquant.FxquantError, match="Expected"):
        function(wrong)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", list(WRONG)[:-1])
@pytest.mark.parametrize("function", TAKE_A_MODULE.values(), ids=TAKE_A_MODULE)
def test_what_is_no_module_is_an_error_of_fxquant(function, wrong):
    with pytest.raises(fxquant.FxquantError, match="Expected"):
        function(WRONG[wrong])
