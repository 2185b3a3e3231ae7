import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.algorithms.rtn import round_to_nearest
from fxquant.kernels.choose import BACKENDS
from fxquant.kernels.interface import LinearSpec
from fxquant.kernels.reference import REFERENCE, quantize_tokens
from fxquant.numerics.metrics import sqnr_db
from fxquant.numerics.weights import quantize_weight_int8

CPU = torch.device("cpu")
FOUR_BITS = LinearSpec(64, 64, 32, True)
every_backend = pytest.mark.parametrize(
    "name", [name for name, b in BACKENDS.items() if b.unsupported(FOUR_BITS, CPU) is None]
)
grids = pytest.mark.parametrize("symmetric", [True, False])


def layer(out_features, in_features, group_size, symmetric, activation="float"):
    spec = LinearSpec(out_features, in_features, group_size, symmetric, activation)
    weight = round_to_nearest(
        torch.randn(out_features, in_features), group_size=group_size, symmetric=symmetric
    )
    return spec, weight


def run(name, x, spec, weight, bias=None):
    backend = BACKENDS[name]
    return backend.matmul(x, backend.pack(weight, spec), spec, bias)


@given(
    st.integers(1, 40),
    st.integers(1, 150),
    st.sampled_from([32, 64, 128]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 5),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_every_backend_computes_what_float64_computes(o, i, group, symmetric, dtype, rows, biased):
    spec, weight = layer(o, i, group, symmetric)
    x = (torch.randn(rows, 2, i) + 1).to(dtype)  # a mean shows errors of the zero point
    bias = torch.randn(o) if biased else None
    expected = F.linear(x.double(), weight.dequantize().double())
    size = x.double().abs() @ weight.dequantize().double().abs().T
    if bias is not None:
        expected, size = expected + bias, size + bias.abs()
    for name, backend in BACKENDS.items():
        if backend.unsupported(spec, CPU) is None:
            y = run(name, x, spec, weight, bias)
            assert y.dtype == dtype
            assert y.shape == (rows, 2, o)
            assert ((y.double() - expected).abs() <= 1e-2 * size + 1e-6).all(), name


@pytest.mark.parametrize("group_size", [32, 128])
@every_backend
@grids
def test_a_mean_of_the_activations_costs_no_accuracy(name, symmetric, group_size):
    spec, weight = layer(256, 512, group_size, symmetric)
    x = torch.randn(64, 512) + 2
    expected = F.linear(x.double(), weight.dequantize().double())
    assert sqnr_db(expected, run(name, x, spec, weight)) > 50


@given(
    st.integers(1, 70),
    st.integers(1, 300),
    st.sampled_from([32, 64, 128]),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_unpack_undoes_pack(o, i, group_size, symmetric):
    spec, weight = layer(o, i, group_size, symmetric)
    for name, backend in BACKENDS.items():
        if backend.unsupported(spec, CPU) is None:
            again = backend.unpack(backend.pack(weight, spec), spec)
            assert torch.equal(again.packed, weight.packed), name
            assert torch.equal(again.scales, weight.scales), name
            assert torch.equal(again.zero_points, weight.zero_points), name
            assert (again.group_size, again.in_features) == (group_size, i)


@every_backend
@grids
def test_the_same_weight_and_input_give_the_same_bits(name, symmetric):
    spec, weight = layer(48, 200, 64, symmetric)
    x = torch.randn(5, 200)
    first, second = (BACKENDS[name].pack(weight, spec) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    y = BACKENDS[name].matmul(x, first, spec)
    assert torch.equal(y, BACKENDS[name].matmul(x, second, spec))


@every_backend
@grids
def test_gradients_flow_to_the_input(name, symmetric):
    spec, weight = layer(16, 64, 32, symmetric)
    x, bias = torch.randn(3, 64, requires_grad=True), torch.randn(16, requires_grad=True)
    run(name, x, spec, weight, bias).sum().backward()
    torch.testing.assert_close(x.grad, weight.dequantize().sum(0).expand(3, 64))
    torch.testing.assert_close(bias.grad, torch.full((16,), 3.0))


class Product(torch.nn.Module):
    def __init__(self, name, spec, weight):
        super().__init__()
        self.backend, self.spec = BACKENDS[name], spec
        for i, tensor in enumerate(self.backend.pack(weight, spec)):
            self.register_buffer(f"t{i}", tensor)

    def forward(self, x):
        return self.backend.matmul(x, tuple(self.buffers()), self.spec)


@every_backend
@grids
def test_a_backend_compiles_without_a_graph_break(name, symmetric):
    module = Product(name, *layer(32, 96, 64, symmetric))
    x = torch.randn(3, 96)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(x), module(x), rtol=1e-2, atol=2e-2)


@every_backend
@grids
def test_a_backend_exports_with_a_dynamic_number_of_rows(name, symmetric):
    module = Product(name, *layer(32, 96, 64, symmetric))
    rows = torch.export.Dim("rows", min=2, max=64)
    exported = torch.export.export(module, (torch.randn(3, 96),), dynamic_shapes=({0: rows},))
    x = torch.randn(7, 96)
    torch.testing.assert_close(exported.module()(x), module(x), rtol=1e-2, atol=2e-2)


def naive_int8(x, weight, group_size):
    """One token [in] at a time, in integers, as the interface defines it."""
    q = torch.stack((weight.packed & 15, weight.packed >> 4), -1).flatten(1)[:, : len(x)].double()
    y = torch.zeros(len(q), dtype=torch.float64)
    for number, start in enumerate(range(0, len(x), group_size)):
        part = x[start : start + group_size]
        scale = part.abs().max() / 127
        integers = (part * (1 / scale)).round().double()
        dot = q[:, start : start + group_size] @ integers
        dot -= weight.zero_points[:, number].double() * integers.sum()
        y += scale.double() * weight.scales[:, number].double() * dot
    return y


@given(st.integers(1, 20), st.integers(1, 200), st.sampled_from([32, 64, 128]), st.booleans())
@settings(max_examples=30, deadline=None)
def test_int8_activations_multiply_as_integers(o, i, group_size, symmetric):
    spec, weight = layer(o, i, group_size, symmetric, "int8")
    x = torch.randn(2, i) + 1
    expected = torch.stack([naive_int8(row, weight, group_size) for row in x])
    size = x.double().abs() @ weight.dequantize().double().abs().T
    for name, backend in BACKENDS.items():
        if backend.unsupported(spec, CPU) is None:
            y = run(name, x, spec, weight)
            assert ((y - expected).abs() <= 1e-5 * size + 1e-6).all(), name


@given(st.integers(1, 40), st.integers(1, 300), st.integers(0, 17))
@settings(max_examples=60, deadline=None)
def test_a_scale_for_each_row_of_int8_is_served_by_several(o, i, rows):
    spec, weight = LinearSpec(o, i, i, True, bits=8), quantize_weight_int8(torch.randn(o, i))
    x = torch.randn(rows, i)
    expected = x.double() @ weight.dequantize().double().T
    size = x.double().abs() @ weight.dequantize().double().abs().T
    serving = [name for name, b in BACKENDS.items() if b.unsupported(spec, CPU) is None]
    assert "aten_int8" in serving
    for name in serving:
        y = run(name, x, spec, weight)
        assert y.shape == (rows, o)
        assert ((y - expected).abs() <= 1e-2 * size + 1e-6).all(), name
        again = BACKENDS[name].unpack(BACKENDS[name].pack(weight, spec), spec)
        assert torch.equal(again.packed, weight.packed)
        assert torch.equal(again.scales, weight.scales)


def test_int8_activations_keep_a_scale_for_each_token_and_group():
    x = torch.randn(4, 64)
    x[0, :32] *= 1000  # must not cost the other group its precision
    error = (quantize_tokens(x, 32) - x).abs()
    step = x.view(4, 2, 32).abs().amax(-1, keepdim=True) / 127
    assert (error.view(4, 2, 32) <= step / 2 * 1.001).all()


def test_int8_activations_pass_gradients_as_if_nothing_was_rounded():
    spec, weight = layer(16, 64, 32, True, "int8")
    x = torch.randn(3, 64, requires_grad=True)
    y = REFERENCE.matmul(x, REFERENCE.pack(weight, spec), spec)
    assert torch.allclose(y, REFERENCE.matmul(x.detach(), REFERENCE.pack(weight, spec), spec))
    y.sum().backward()
    torch.testing.assert_close(x.grad, weight.dequantize().sum(0).expand(3, 64))


def test_a_gradient_does_not_change_the_bits():
    spec, weight = layer(48, 64, 32, symmetric=False)
    for backend in (b for b in BACKENDS.values() if b.unsupported(spec, CPU) is None):
        tensors = backend.pack(weight, spec)
        x = torch.randn(5, 64)
        plain = backend.matmul(x, tensors, spec)
        assert torch.equal(backend.matmul(x.requires_grad_(), tensors, spec), plain), backend.name
