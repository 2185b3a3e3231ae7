import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.kernels.int8 import matmul_int8, pad_int8


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


def test_padding_leaves_a_fitting_weight_alone():
    q = torch.randint(-127, 128, (3, 32), dtype=torch.int8)
    assert pad_int8(q) is q
    assert torch.equal(pad_int8(q[:, :20])[:, :20], q[:, :20])
