"""fxquant's attention against torch's op in float64, and where torch's takes over."""

import copy
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from fxquant.errors import OptionError
from fxquant.kernels import attention as kernel
from fxquant.kernels.attention import attention

LIMITS = {torch.float32: 3e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
DTYPES = list(LIMITS)


def tensors(queries, keys, heads=4, key_heads=4, width=24, dtype=torch.float32):
    """Queries, keys and values as projections give them: heads behind tokens."""
    made = []
    for count, number in ((queries, heads), (keys, key_heads), (keys, key_heads)):
        made.append(torch.randn(2, count, number, width).to(dtype).transpose(1, 2))
    return made


def expected(query, key, value, mask=None, is_causal=False, scale=None):
    if mask is not None and mask.is_floating_point():
        mask = mask.double()
    inputs = (query.double(), key.double(), value.double())
    is_grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        *inputs, mask, is_causal=is_causal, scale=scale, enable_gqa=is_grouped
    )


def assert_right(found, query, key, value, *options):
    assert found.dtype == query.dtype
    right = expected(query, key, value, *options)
    assert (found.double() - right).abs().max() <= LIMITS[query.dtype]


@pytest.mark.parametrize(
    ("dtype", "queries", "keys"), list(product(DTYPES, (1, 7, 130), (1, 9, 300))), ids=str
)
def test_it_is_torchs_function(dtype, queries, keys):
    torch.manual_seed(0)
    for key_heads in (4, 2, 1):
        inputs = tensors(queries, keys, key_heads=key_heads, dtype=dtype)
        for mask in (
            None,
            torch.rand(2, 1, 1, keys) > 0.3,
            torch.randn(queries, keys).to(dtype),
            torch.randn(2, 4, queries, keys).to(dtype),
        ):
            assert_right(attention(*inputs, mask), *inputs, mask)
        assert_right(attention(*inputs, None, True, 0.1), *inputs, None, True, 0.1)


def test_any_strides_are_read_where_they_lie():
    packed = torch.randn(2, 9, 3, 4, 16)
    for order in (packed.permute(2, 0, 3, 1, 4), packed.permute(2, 0, 3, 1, 4).contiguous()):
        assert_right(attention(*order), *order)
    query, key, value = tensors(9, 9)
    assert_right(attention(query, key.expand_as(key), value), query, key, value)
    spread = torch.randn(2, 4, 9, 48)[..., ::2]
    assert_right(attention(spread, spread, spread), spread, spread, spread)


def test_a_row_that_sees_no_key_is_zero():
    query, key, value = tensors(5, 6)
    mask = torch.ones(5, 6, dtype=torch.bool)
    mask[2] = False
    found = attention(query, key, value, mask)
    assert torch.equal(found[:, :, 2], torch.zeros(2, 4, 24))
    assert_right(found, query, key, value, mask)


def test_the_lowest_number_as_a_mask_leaves_equal_weights():
    query, key, value = tensors(5, 6)
    mask = torch.full((5, 6), torch.finfo(torch.float32).min)
    mean = value.mean(2, keepdim=True).expand(2, 4, 5, 24)
    assert torch.allclose(attention(query, key, value, mask), mean, atol=1e-6)


def test_nan_and_infinity_reach_the_rows_that_see_them():
    query, key, value = tensors(40, 40)
    query[0, 1, 3, 5] = torch.nan
    value[1, 2, 7, 0] = torch.inf
    found = attention(query, key, value)
    assert found[0, 1, 3].isnan().all()
    assert found[0, 1, [0, 4]].isfinite().all()
    assert torch.equal(found[1, 2, :, 0], torch.full((40,), torch.inf))


def test_the_bits_depend_neither_on_the_batch_nor_on_threads():
    query, key, value = tensors(50, 50)
    found = attention(query, key, value)
    assert torch.equal(attention(query[1:], key[1:], value[1:]), found[1:])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(attention(query, key, value), found)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(kernel.NOT_BUILT is not None, reason="the extension was not built")
def test_every_instruction_set_serves():
    query, key, value = tensors(30, 40, key_heads=2, dtype=torch.bfloat16)
    mask = torch.rand(30, 40) > 0.3
    names = kernel._native.instruction_sets()
    try:
        for name in names:
            kernel._native.use(name)
            assert_right(attention(query, key, value, mask), query, key, value, mask)
            assert kernel.self_test() is None
    finally:
        kernel._native.use(names[0])


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q.double(), k.double(), v.double()),
        lambda q, k, v: (q[0], k[0], v[0]),
        lambda q, k, v: (q, k[:1], v[:1]),
        lambda q, k, v: (q.bfloat16(), k.bfloat16(), v.bfloat16(), torch.ones(9, 9)),
    ],
)
def test_what_the_kernel_does_not_take_goes_to_torch(change, monkeypatch):
    query, key, value, *mask = change(*tensors(9, 9))
    monkeypatch.setattr(kernel, "FAULT", "switched off")
    in_torch = attention(query, key, value, *mask)
    monkeypatch.undo()
    assert torch.allclose(
        attention(query, key, value, *mask), in_torch, atol=LIMITS.get(query.dtype, 0)
    )


def test_what_does_not_fit_is_refused():
    query, key, value = tensors(9, 9)
    with pytest.raises(RuntimeError):
        attention(query, key[..., :8], value)
    with pytest.raises(RuntimeError):
        attention(query, key, value, torch.ones(9, 8, dtype=torch.bool))
    with pytest.raises(OptionError, match="a value for each key"):
        attention(query, key, value[:, :, :4])


def test_gradients_are_torchs():
    inputs = [t.contiguous().requires_grad_() for t in tensors(6, 7)]
    mask = torch.randn(6, 7, requires_grad=True)
    attention(*inputs, mask).sin().sum().backward()
    found = [t.grad for t in (*inputs, mask)]
    others = [copy.deepcopy(t.detach()).requires_grad_() for t in (*inputs, mask)]
    F.scaled_dot_product_attention(*others).sin().sum().backward()
    for one, other in zip(found, others, strict=True):
        assert torch.allclose(one, other.grad, atol=1e-6)


def test_it_is_an_operator_of_torch():
    query, key, value = tensors(6, 7)
    mask = torch.rand(6, 7) > 0.2
    op = torch.ops.fxquant.attention.default
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(op, (query, key, value, mask, False, None), test_utils=tests)
    grouped = (query, key[:, :2], value[:, :2], None, True, 0.3)
    torch.library.opcheck(op, grouped, test_utils=tests)


def test_it_can_be_exported():
    class Attends(torch.nn.Module):
        def forward(self, query, key, value):
            return attention(query, key, value, None, True) * 2

    inputs = tuple(tensors(6, 6))
    program = torch.export.export(Attends(), inputs)
    names = [str(node.target) for node in program.graph.nodes]
    assert "fxquant.attention.default" in names
    assert torch.equal(program.module()(*inputs), Attends()(*inputs))
