"""Our ONNX files run by OpenVINO, against our graph in float32."""

import openvino
import pytest
import torch

import fxquant
from tests.exporters.test_onnx import quantized

LEAST_DB = 100  # the same weights; products and norms are OpenVINO's own
ASYMMETRIC = {"symmetric": False, "zero_points": "integer"}

pytestmark = pytest.mark.usefixtures("float32_products")


def run(path, x):
    """All outputs of a file, without activations rounded on the fly."""
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    compiled = openvino.Core().compile_model(str(path), "CPU", exact)
    found = compiled({"x": x.numpy()})
    return [torch.from_numpy(found[i]) for i in range(len(compiled.outputs))]


@pytest.mark.parametrize("standard", [False, True])
@pytest.mark.parametrize("options", [{}, ASYMMETRIC, {"bits": 8}], ids=str)
def test_openvino_computes_what_the_graph_does(options, standard, tmp_path):
    graph, path = quantized(**options), tmp_path / "model.onnx"
    fxquant.export(graph, path, format="onnx", standard=standard)
    for shape in ((8, 5, 64), (3, 7, 64)):  # sizes stay open
        x = torch.randn(shape)
        expected = graph(x)
        values = [expected["last"], *expected["hidden"]]
        for one, other in zip(run(path, x), values, strict=True):
            assert fxquant.sqnr_db(other, one) > LEAST_DB
