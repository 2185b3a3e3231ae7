import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.algorithms.rtn import round_to_nearest
from fxquant.errors import OptionError
from fxquant.kernels.choose import BACKENDS, choose_backend
from fxquant.kernels.int8 import matmul_int8, pad_int8
from fxquant.kernels.interface import LinearSpec
from fxquant.kernels.reference import quantize_tokens
from fxquant.numerics.metrics import sqnr_db

CPU = torch.device("cpu")


def layer(out_features, in_features, group_size, symmetric, activation="float"):
    spec = LinearSpec(out_features, in_features, group_size, symmetric, activation)
    weight = round_to_nearest(
        torch.randn(out_features, in_features), group_size=group_size, symmetric=symmetric
    )
    return spec, weight


@given(
    st.integers(1, 40),
    st.integers(1, 150),
    st.sampled_from([32, 64, 128]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_every_backend_computes_what_float64_computes(o, i, group_size, symmetric, dtype, rows):
    spec, weight = layer(o, i, group_size, symmetric)
    x = (torch.randn(rows, 2, i) + 1).to(dtype)  # a mean shows errors of the zero point
    expected = F.linear(x.double(), weight.dequantize().double())
    for backend in BACKENDS.values():
        if backend.unsupported(spec, CPU) is None:
            y = backend.matmul(x, backend.pack(weight, spec), spec)
            assert y.dtype == dtype
            assert y.shape == (rows, 2, o)
            error = (y.double() - expected).abs()
            scale = x.double().abs() @ weight.dequantize().double().abs().T
            assert (error <= 8e-3 * scale + 1e-6).all(), backend.name


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_fast_backend_is_accurate_on_shifted_activations(symmetric):
    spec, weight = layer(256, 512, 128, symmetric)
    x = torch.randn(64, 512) + 2
    backend, _ = choose_backend(spec, CPU)
    assert backend.name != "reference"
    y = backend.matmul(x, backend.pack(weight, spec), spec)
    assert sqnr_db(F.linear(x, weight.dequantize()), y) > 45


def test_int8_activations_keep_a_scale_for_each_token_and_group():
    x = torch.randn(4, 64)
    x[0, :32] *= 1000  # must not cost the other group its precision
    error = (quantize_tokens(x, 32) - x).abs()
    step = x.view(4, 2, 32).abs().amax(-1, keepdim=True) / 127
    assert (error.view(4, 2, 32) <= step / 2 * 1.001).all()


def test_reasons_tell_why_a_backend_was_not_chosen():
    spec, _ = layer(8, 40, 20, True)
    backend, reasons = choose_backend(spec, CPU)
    assert backend.name == "reference"
    assert "group_size is 20" in reasons["aten"]


def test_a_backend_can_be_forced_and_a_wrong_name_lists_the_valid_ones(monkeypatch):
    spec, _ = layer(16, 64, 32, True)
    monkeypatch.setenv("FXQUANT_BACKEND", "reference")
    assert choose_backend(spec, CPU)[0].name == "reference"
    monkeypatch.setenv("FXQUANT_BACKEND", "refrence")
    with pytest.raises(OptionError, match="'aten', 'reference'.*Did you mean 'reference'"):
        choose_backend(spec, CPU)


@given(st.integers(1, 40), st.integers(1, 70), st.integers(0, 17))
@settings(max_examples=60, deadline=None)
def test_the_int8_product_takes_every_shape(o, i, rows):
    q = torch.randint(-127, 128, (o, i), dtype=torch.int8)
    scales = torch.rand(o).bfloat16()
    x = torch.randn(rows, i)
    expected = x.bfloat16().double() @ (q.double() * scales.double()[:, None]).T
    y = matmul_int8(x, pad_int8(q), scales)
    assert y.shape == (rows, o)
    assert ((y - expected).abs() <= 1e-2 * expected.abs().amax() if rows else y == 0).all()
