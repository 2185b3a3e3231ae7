"""ONNX files run by ONNX Runtime, against our graph in float32."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

import fxquant
from fxquant.exporters import onnx_layers
from tests.exporters.conftest import IDS, SMALL
from tests.exporters.layers import int4_layer, with_layers

pytestmark = pytest.mark.usefixtures("float32_products")

LEAST_DB = 110  # the same computation in float32


class Network(nn.Module):
    """Several inputs and outputs, a layer without bias, and one that is used twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 96)
        self.second = nn.Linear(96, 64, bias=False)
        self.norm = nn.LayerNorm(64)
        self.last = nn.Linear(64, 40)

    def forward(self, x, offset=None, *, scale=1.0):
        y = self.norm(self.second(self.first(x).relu()) + x) * scale
        if offset is not None:
            y = y + offset
        return {"last": self.last(y), "hidden": (y, self.second(self.first(y).relu()))}


def data():
    return [torch.randn(8, 5, 64) for _ in range(6)]


def quantized(**options):
    options = {"group_size": 32, "skip_param_threshold": 0, **options}
    return fxquant.quantize(Network().eval(), data(), accuracy_warning="ignore", **options)[0]


def session(path, **entries):
    options = onnxruntime.SessionOptions()
    # ONNX Runtime makes one product of DequantizeLinear and MatMul, at level 4 unless told.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def assert_same(path, model, shape=(3, 7, 64), least=LEAST_DB):
    x = torch.randn(shape)
    found = session(path).run(None, {"x": x.numpy()})
    expected = model(x)
    values = [expected["last"], *expected["hidden"]]
    for one, other in zip(found, values, strict=True):
        assert fxquant.sqnr_db(other, torch.from_numpy(one)) > least


def operators(path):
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize(
    ("options", "standard"),
    [
        ({}, False),
        ({"group_size": -1}, True),
        ({"symmetric": False, "zero_points": "integer"}, False),
        ({"symmetric": False, "zero_points": "integer"}, True),
        ({"group_size": 48, "bits": {"first": 16, "second": 4, "last": 16}}, False),
        ({"activation_bits": 8, "observer": "minmax"}, True),
    ],
    ids=str,
)
def test_onnx_runtime_computes_what_the_graph_does(options, standard, tmp_path):
    graph, path = quantized(**options), tmp_path / "model.onnx"
    assert fxquant.export(graph, path, format="onnx", standard=standard) == []
    used = operators(path)
    assert ("MatMulNBits" in used) != standard
    assert ("DequantizeLinear" in used) == (standard or "activation_bits" in options)
    assert ("QuantizeLinear" in used) == ("activation_bits" in options)
    assert_same(path, graph, shape=(8, 5, 64))
    assert_same(path, graph)


def test_int8_layers_are_dequantized_from_int8(tmp_path):
    graph, path = quantized(bits={"first": 4, "second": 8, "last": 8}), tmp_path / "model.onnx"
    fxquant.export(graph, path, format="onnx")
    # Our own INT8 product rounds scales on the way: the file holds the weights themselves.
    assert_same(path, fxquant.dequantize_model(graph))
    weights = [t for t in onnx.load(path).graph.initializer if t.data_type == 3]
    assert {tuple(t.dims) for t in weights} == {(96, 64), (64, 40)}


def test_fractional_zero_points_run_and_are_told_to_be_slow(tmp_path):
    graph, path = quantized(symmetric=False), tmp_path / "model.onnx"
    findings = fxquant.export(graph, path, format="onnx")
    assert {f.is_loss for f in findings} == {False}
    assert all("50 times slower" in f.problem and 'target="onnx"' in f.remedy for f in findings)
    assert_same(path, graph)
    with pytest.raises(fxquant.SaveError, match="not whole"):
        fxquant.export(graph, tmp_path / "new.onnx", format="onnx", standard=True)
    assert not (tmp_path / "new.onnx").exists()


def test_a_lower_accuracy_is_asked_for_by_its_level(tmp_path):
    graph, path = quantized(), tmp_path / "model.onnx"
    fxquant.export(graph, path, format="onnx", accuracy_level=4)
    assert_same(path, graph, least=30)
    node = next(n for n in onnx.load(path).graph.node if n.op_type == "MatMulNBits")
    assert {a.name: a.i for a in node.attribute}["accuracy_level"] == 4


def test_inputs_keep_their_names_and_open_sizes(tmp_path):
    example = {"x": torch.randn(1, 6, 64), "offset": torch.randn(1, 1, 64)}
    options = {"group_size": 32, "accuracy_warning": "ignore"}
    graph, _ = fxquant.quantize(Network().eval(), example_inputs=example, **options)
    path = tmp_path / "two.onnx"
    assert fxquant.export(graph, path, format="onnx", example_inputs=example) == []
    two = session(path)
    assert [i.name for i in two.get_inputs()] == ["x", "offset"]
    assert [o.name for o in two.get_outputs()] == ["last", "hidden_0", "hidden_1"]
    x, offset = torch.randn(3, 7, 64), torch.randn(3, 1, 64)
    found = two.run(["last"], {"x": x.numpy(), "offset": offset.numpy()})[0]
    expected = graph(x=x, offset=offset)["last"]
    assert fxquant.sqnr_db(expected, torch.from_numpy(found)) > LEAST_DB
    fxquant.export(quantized(), tmp_path / "fixed.onnx", format="onnx", dynamic=False)
    assert session(tmp_path / "fixed.onnx").get_inputs()[0].shape[1:] == [5, 64]


def test_a_language_model_runs_at_any_length_as_graph_and_in_its_class(int4, tmp_path):
    swapped = fxquant.swap_modules(int4.model, int4.graph)
    swapped.config.use_cache = False
    fxquant.export(int4.graph, tmp_path / "graph.onnx", format="onnx")
    fxquant.export(swapped, tmp_path / "class.onnx", format="onnx", example_inputs=IDS)
    ids = torch.randint(0, SMALL.vocab_size, (3, 9))
    expected = int4.graph(input_ids=ids)["logits"]
    for name in ("graph", "class"):
        found = session(tmp_path / f"{name}.onnx").run(["logits"], {"input_ids": ids.numpy()})[0]
        assert fxquant.sqnr_db(expected, torch.from_numpy(found)) > LEAST_DB


def test_a_saved_file_remembers_its_inputs_and_a_folder_holds_weights_apart(int4, tmp_path):
    fxquant.save_model(int4.graph, tmp_path / "m.safetensors")
    fxquant.export(tmp_path / "m.safetensors", tmp_path / "new", format="onnx")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["model.onnx", "model.onnx.data"]
    assert (tmp_path / "new" / "model.onnx").stat().st_size < 200_000
    ids = IDS["input_ids"]
    found = session(tmp_path / "new" / "model.onnx").run(None, {"input_ids": ids.numpy()})[0]
    expected = int4.graph(input_ids=ids)["logits"]
    assert fxquant.sqnr_db(expected, torch.from_numpy(found)) > LEAST_DB


def test_float16_models_compute_in_float16(tmp_path):
    model = LlamaForCausalLM(SMALL).eval().half()
    graph, _ = fxquant.quantize(model, example_inputs=IDS, group_size=32, target="onnx")
    fxquant.export(graph, tmp_path / "half.onnx", format="onnx")
    assert "Cast" not in {
        n.op_type for n in onnx.load(tmp_path / "half.onnx").graph.node if "proj" in n.name
    }
    found = session(tmp_path / "half.onnx").run(None, {"input_ids": IDS["input_ids"].numpy()})[0]
    assert found.dtype == np.float16
    expected = graph(**IDS)["logits"]
    assert fxquant.sqnr_db(expected.float(), torch.from_numpy(found).float()) > 35


def test_layers_with_the_same_weights_stay_apart(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    model[2].load_state_dict(model[0].state_dict())
    example = {"example_inputs": torch.randn(4, 64), "accuracy_warning": "ignore"}
    graph, _ = fxquant.quantize(model, group_size=32, **example)
    fxquant.export(graph, tmp_path / "model.onnx", format="onnx")
    assert operators(tmp_path / "model.onnx").count("MatMulNBits") == 2


def test_what_cannot_be_held_is_refused(int4, tmp_path):
    dynamic = quantized(activation_bits=8, observer="dynamic")
    assert "ranges are found while it runs" in fxquant.check_export(dynamic, "onnx")[0].problem
    model = with_layers(
        fxquant.swap_modules(int4.model, int4.graph), lambda o, i: int4_layer(o, i, group_size=24)
    )
    assert "groups of 24 are no multiple of 16" in fxquant.check_export(model, "onnx")[0].problem
    with pytest.raises(fxquant.OptionError, match=r"activation_bits.*ranges that are static"):
        fxquant.QuantConfig(target="onnx", activation_bits=8, observer="dynamic")
    half = fxquant.quantize(LlamaForCausalLM(SMALL).bfloat16().eval(), example_inputs=IDS)[0]
    assert "bfloat16" in fxquant.check_export(half, "onnx")[-1].problem


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"accuracy_level": 5}, "got 5"),
        ({"accuracy_level": 4, "standard": True}, "with standard=True"),
        ({"opset": 17}, "unknown options"),
    ],
)
def test_options_are_checked(int4, tmp_path, options, text):
    with pytest.raises(fxquant.OptionError, match=text):
        fxquant.export(int4.graph, tmp_path / "x.onnx", format="onnx", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_needs_an_example_or_cannot_be_exported_says_so(int4, tmp_path):
    swapped = fxquant.swap_modules(int4.model, int4.graph)
    with pytest.raises(fxquant.OptionError, match="example_inputs"):
        fxquant.export(swapped, tmp_path / "x.onnx", format="onnx")

    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x):
            return self.layer(x) if x.sum() > 0 else x

    example = {"example_inputs": torch.rand(4, 64), "accuracy_warning": "ignore"}
    graph, _ = fxquant.quantize(Branching().eval(), group_size=32, **example)
    with pytest.raises(fxquant.SaveError, match=r"torch\.export cannot take.*trace_report"):
        fxquant.export(graph, tmp_path / "x.onnx", format="onnx")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_read_back_differently_are_not_put_in_place(int4, tmp_path, monkeypatch):
    right = onnx_layers.OnnxInt4._by_block
    monkeypatch.setattr(
        onnx_layers.OnnxInt4,
        "_by_block",
        lambda self, values, layer: right(self, values, layer) * 2,
    )
    with pytest.raises(fxquant.SaveError, match="other weights in the files"):
        fxquant.export(int4.graph, tmp_path / "x.onnx", format="onnx")
    assert list(tmp_path.iterdir()) == []
