"""Products of two values, such as attention's scores, with factors of 8 bits."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.errors import OptionError
from fxquant.graph.activation_products import activation_products
from fxquant.modules.activation import rounded_vectors

OPTIONS = {
    "bits": 8, "activation_bits": 8, "activation_products": True, "skip_layer_names": (),
    "skip_param_threshold": 0, "accuracy_warning": "ignore", "method": "rtn",
}  # fmt: skip


class Attention(nn.Module):
    """Attention written in one of the ways that are in use, with rotated queries and keys."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.qkv, self.out = how, nn.Linear(16, 48), nn.Linear(16, 16)
        self.register_buffer("frequencies", torch.rand(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        steps = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
        angles = steps.expand(x.shape[0], -1, 1) @ self.frequencies.expand(x.shape[0], 1, 2)
        q = q * torch.cat((angles, angles), -1).cos()[:, None]
        if self.how == "sdpa":
            y = F.scaled_dot_product_attention(q, k, value=v)
        else:
            if self.how == "matmul":
                scores = q @ k.transpose(-2, -1)
            elif self.how == "einsum":
                scores = torch.einsum("bhqd,bhkd->bhqk", q, k)
            else:
                flat = [t.flatten(0, 1) for t in (q, k)]
                scores = torch.bmm(flat[0], flat[1].mT).view(*q.shape[:3], -1)
            y = torch.softmax(scores / 2, -1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


WAYS = {"sdpa": 1, "matmul": 2, "einsum": 2, "bmm": 2}
DATA = [torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(i)) for i in range(20)]


@cache
def traced(how: str) -> tuple[nn.Module, torch.fx.GraphModule]:
    torch.manual_seed(0)
    model = Attention(how).eval()
    return model, fxquant.trace(model, DATA[0])


@pytest.mark.parametrize("observer", ["minmax", "dynamic"])
@pytest.mark.parametrize("how", WAYS)
def test_factors_are_rounded_however_attention_is_written(how, observer, tmp_path):
    model, float_graph = traced(how)
    graph, info = fxquant.quantize(float_graph, DATA, observer=observer, **OPTIONS)
    kind = "dynamic" if observer == "dynamic" else "static"
    assert list(info.products.values()) == [f"{kind} 8-bit factors, simulated"] * WAYS[how]
    assert f"products of activations: {WAYS[how]}, {kind}" in str(info)
    plain, left = fxquant.quantize(
        float_graph, DATA, observer=observer, **{**OPTIONS, "activation_products": False}
    )
    assert list(left.products.values()) == ["float factors"] * WAYS[how]
    assert not torch.equal(graph(DATA[0]), plain(DATA[0]))
    assert info.sqnr_db > left.sqnr_db - 6  # 8 bits cost what 8 bits cost
    fxquant.save_model(graph, tmp_path / "m.safetensors", info)
    loaded = fxquant.load_model(tmp_path / "m.safetensors")
    assert torch.equal(loaded(DATA[1][:, :3]), graph(DATA[1][:, :3]))
    assert fxquant.info(loaded).products == info.products
    with pytest.warns(fxquant.swap.LeftFloatWarning, match="rounded in the graph alone"):
        swapped = fxquant.swap_modules(model, graph)
    assert swapped.fxquant_float_inputs == list(info.products)
    assert torch.equal(swapped(DATA[0]), plain(DATA[0]))


def test_what_depends_on_sizes_alone_is_no_factor_nor_are_integers():
    _, graph = traced("matmul")
    names = {node.name for node in activation_products(graph)}
    products = [n.name for n in graph.graph.nodes if "matmul" in n.name]
    assert len(products) == 3
    assert names == set(products[1:])  # the first makes the angles

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            counts = (x > 0).long()
            return self.linear(x) + (counts @ counts.mT).sum(-1, keepdim=True)

    data = [torch.randn(3, 4) for _ in range(20)]
    for observer in ("minmax", "dynamic"):
        _, info = fxquant.quantize(Counts().eval(), data, observer=observer, **OPTIONS)
        assert info.products == {}


def test_static_factors_are_those_of_a_calculation_by_hand():
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x @ y + self.linear(x)

    torch.manual_seed(0)
    batches = [(torch.rand(4, 4), torch.randn(4, 4)) for _ in range(20)]
    model = Product().eval()
    graph, _ = fxquant.quantize(model, batches, **OPTIONS)
    x, y = batches[0]
    (product,) = activation_products(graph)
    (added,) = product.users
    (linear,) = (node for node in added.args if node is not product)
    by_hand = read(graph, product.args[0], x) @ read(graph, product.args[1], y)
    rest = graph.linear(read(graph, linear.args[0], x))
    assert torch.allclose(graph(x, y), by_hand + rest, atol=1e-5)


def read(graph: torch.fx.GraphModule, node: torch.fx.Node, x: Tensor) -> Tensor:
    """What a dequantized value of the graph is, for the value that was quantized."""
    scale, zero = (graph.get_buffer(str(n.target)) for n in node.args[1:3])
    return scale * ((x / scale + zero).round().clamp(0, 255) - zero)


def test_vectors_are_rounded_along_their_axis():
    x = torch.randn(3, 4, 5)
    for axis in (-1, -2, None):
        axes = (0, 1, 2) if axis is None else (axis,)
        low, high = x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)
        step = (high.clamp(min=0) - low.clamp(max=0)) / 254
        found = rounded_vectors(x, axis)
        assert ((found - x).abs() <= step * 0.5001).all()
        assert not torch.equal(found, x)
    assert rounded_vectors(torch.arange(3), -1).dtype is torch.long
    assert rounded_vectors(x[:0], -1).shape == (0, 4, 5)
    assert torch.equal(rounded_vectors(x[0, 0], -2), x[0, 0])  # no such axis: a vector of one
    heads = torch.randn(2, 5, 3, 4).transpose(1, 2)  # a `view` behind a product needs its order
    assert rounded_vectors(heads, -1).stride() == heads.stride()
    bad = x.clone()
    bad[0, 0, 0] = torch.nan
    found = rounded_vectors(bad, -1)
    assert found[0, 0].isnan().all()
    assert not found[1].isnan().any()
    leaf = x.clone().requires_grad_()
    rounded_vectors(leaf, -1).sum().backward()
    assert torch.equal(leaf.grad, torch.ones_like(x))


def test_the_option_needs_activations_of_8_bits():
    with pytest.raises(OptionError, match="activation_products"):
        fxquant.QuantConfig(activation_products=True)
    with pytest.raises(OptionError, match="True or False"):
        fxquant.QuantConfig(activation_bits=8, activation_products=1)


def test_onnx_holds_static_factors_and_refuses_dynamic_ones(tmp_path, float32_products):
    onnxruntime = pytest.importorskip("onnxruntime")
    _, model = traced("matmul")
    graph, _ = fxquant.quantize(model, DATA, target="onnx", **OPTIONS)
    path = tmp_path / "m.onnx"
    fxquant.export(graph, path, format="onnx", example_inputs=(DATA[0],))
    options = onnxruntime.SessionOptions()  # what it makes of the file has roundings of its own
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options)
    found = session.run(None, {session.get_inputs()[0].name: DATA[1].numpy()})[0]
    expected = graph(DATA[1])
    error = (torch.from_numpy(found) - expected).square().sum()
    assert 10 * torch.log10(expected.square().sum() / error) > 100
    dynamic, _ = fxquant.quantize(model, DATA, observer="dynamic", **OPTIONS)
    findings = {f.where for f in fxquant.check_export(dynamic, "onnx")}
    assert "products of activations" in findings
