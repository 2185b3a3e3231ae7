"""Rounding in C++, and what happens without it."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.algorithms import rtn
from fxquant.algorithms.rtn import REFITS, clip_ratios, round_to_nearest
from fxquant.errors import OptionError
from fxquant.kernels import rounding
from fxquant.kernels.extension import NOT_BUILT, _native
from fxquant.kernels.rounding import round_groups, self_test, unsupported
from fxquant.numerics.code_books import CODE_BOOKS
from fxquant.numerics.integers import WIDTHS
from fxquant.numerics.quantized_weight import QuantizedWeight

SETS = _native.instruction_sets() if NOT_BUILT is None else []
built = pytest.mark.skipif(not SETS, reason="the extension was not built: no compiler")


@pytest.fixture(autouse=True)
def _fastest_set_afterwards():
    yield
    for name in SETS[:1]:
        _native.use(name)


def empty(weight, group_size, symmetric, bits, book):
    return QuantizedWeight.empty(
        weight, bits=bits, group_size=group_size, symmetric=symmetric, code_book=book
    )


def in_cpp(weight, group_size=32, symmetric=True, importance=None, bits=4, whole=False, book=None):
    made = empty(weight, group_size, symmetric, bits, book)
    ratios = clip_ratios(made)
    options = {"clip_ratios": ratios, "refits": REFITS, "integer_zero_points": whole}
    round_groups(weight, made, importance=importance, **options)
    return made


def in_torch(weight, group_size, symmetric, importance=None, bits=4, whole=False, book=None):
    made = empty(weight, group_size, symmetric, bits, book)
    rtn._round_in_torch(weight, made, importance, whole)
    return made


def tensors(made):
    return made.packed, made.scales, made.zero_points


def same_bits(one, other):
    """Also where 0.0 and -0.0 are equal."""
    pairs = zip(tensors(one), tensors(other), strict=True)
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


def error(result, weight, importance=None):
    difference = result.dequantize() - weight.float()
    weights = torch.ones(weight.shape[1]) if importance is None else importance
    return float((difference.double().square() * weights).sum())


@built
@given(
    o=st.integers(20, 60),
    i=st.integers(1, 300),
    group_size=st.sampled_from([1, 3, 8, 17, 32, 64, 128, 256, 500]),
    form=st.tuples(st.sampled_from(WIDTHS), st.booleans(), st.none())
    | st.tuples(st.just(4), st.just(True), st.sampled_from(list(CODE_BOOKS))),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    size=st.sampled_from([1e-3, 1.0, 50.0]),
    shift=st.sampled_from([0.0, 3.0]),
    weighted=st.booleans(),
    whole=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_every_instruction_set_finds_the_bits_and_torch_the_error(
    o, i, group_size, form, dtype, size, shift, weighted, whole
):
    bits, symmetric, book = form
    weight = ((torch.randn(o, i) + shift) * size).to(dtype)
    importance = torch.rand(i) * (torch.rand(i) > 0.3) if weighted else None
    results = []
    for name in SETS:
        _native.use(name)
        results.append(in_cpp(weight, group_size, symmetric, importance, bits, whole, book))
    assert all(same_bits(results[0], other) for other in results[1:])
    expected = in_torch(weight, group_size, symmetric, importance, bits, whole, book)
    if whole and book is None:
        zeros = results[0].zero_points
        assert ((zeros == zeros.round()) & (zeros >= 0) & (zeros < 2**bits)).all()
    found, allowed = (error(r, weight, importance) for r in (results[0], expected))
    # Where two grids are as good, sums in another order may go on from the other one.
    assert found == pytest.approx(allowed, rel=0.02, abs=1e-9 * size**2)
    assert (results[0].integers() == expected.integers()).float().mean() > 0.9


@built
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_result_does_not_depend_on_threads(symmetric):
    weight, threads = torch.randn(200, 333), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(in_cpp(weight, 32, symmetric))
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(results[0], other) for other in results[1:])


@built
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 1e-38, 1e-42, 3e38, -3e38])
def test_groups_of_one_value_and_the_ends_of_float32_stay_sound(value, symmetric):
    weight = torch.full((3, 70), value)
    again = in_cpp(weight, 32, symmetric).dequantize()
    torch.testing.assert_close(again, weight, rtol=0.01, atol=1e-39)
    mixed = weight * torch.randn(3, 70).clamp(-1, 1)
    found = in_cpp(mixed, 32, symmetric).dequantize()
    assert torch.isfinite(found).all()
    assert ((found - mixed).abs() <= mixed.abs().max() * 0.15 + 1e-39).all()


@pytest.mark.parametrize("round_it", [pytest.param(in_cpp, marks=built), in_torch])
def test_no_scale_is_fitted_to_levels_that_are_all_the_same(round_it):
    # The columns that count are near the range's end, at its level; only one that does not is far.
    # The mean of these equal levels is one of them but for rounding.
    for _ in range(20):
        weight = torch.cat([-0.3 * torch.rand(2000, 4), -1 - 2 * torch.rand(2000, 1)], dim=1)
        importance = torch.cat([torch.rand(4), torch.zeros(1)])
        made = round_it(weight, 5, False, importance, bits=2)
        assert made.scales.abs().max() < 3


@built
def test_a_weight_that_is_not_contiguous_is_read_rightly():
    weight = torch.randn(64, 48)
    assert same_bits(in_cpp(weight.T), in_cpp(weight.T.contiguous()))


@built
@pytest.mark.parametrize("group_size", [100, 2**31, 2**62, 2**63 - 1, 2**70])
def test_a_group_may_be_larger_than_a_row(group_size):
    weight = torch.randn(16, 96)
    assert same_bits(in_cpp(weight, group_size), in_cpp(weight, 96))


@built
def test_zeros_of_both_signs_give_the_same_bits():
    weight = (torch.arange(64) % 15 + 1).float()[None]
    weight[0, 4], weight[0, 16] = -0.0, 0.0
    results = []
    for name in SETS:
        _native.use(name)
        results.append(in_cpp(weight, 64, False))
    assert all(same_bits(results[0], other) for other in results[1:])
    assert not torch.signbit(results[0].zero_points).any()


class Wrapped(torch.Tensor):
    """A subclass, which may keep its values anywhere."""


@built
def test_what_the_extension_cannot_take_goes_through_torch():
    weight = torch.randn(8, 64)
    assert "not on meta" in unsupported(weight.to("meta"))
    assert "Wrapped, whose memory is its own" in unsupported(weight.as_subclass(Wrapped))
    assert "a torch.sparse_coo Tensor" in unsupported(weight.to_sparse())
    assert "a view that negates" in unsupported(torch._neg_view(weight))
    assert unsupported(torch.nn.Parameter(weight)) is None
    negated = round_to_nearest(torch._neg_view(weight), group_size=32)
    torch.testing.assert_close(
        negated.dequantize(), round_to_nearest(-weight, group_size=32).dequantize()
    )
    assert "torch.float64" in unsupported(weight.double())
    found = round_to_nearest(weight.double(), group_size=32)
    assert torch.equal(found.scales, round_to_nearest(weight, group_size=32).scales)


@built
def test_an_extension_that_rounds_wrongly_is_not_used(monkeypatch):
    assert self_test() is None
    right = rounding.round_groups

    def wrong(weight, made, **options):
        right(weight, made, **options)
        made.scales.mul_(1.5)

    monkeypatch.setattr(rounding, "round_groups", wrong)
    assert "rounds wrongly on this CPU" in self_test()


def test_without_the_extension_torch_rounds(monkeypatch):
    monkeypatch.setattr(rounding, "FAULT", "it was not built when fxquant was installed")
    weight = torch.randn(8, 64)
    assert "not built" in unsupported(weight)
    found = round_to_nearest(weight, group_size=32, symmetric=False)
    assert same_bits(found, in_torch(weight, 32, False))


ALONE = """
import sys
import torch
{before}
import fxquant
from fxquant.kernels import rounding

model = torch.nn.Sequential(torch.nn.Linear(256, 64)).float()
qmodel, info = fxquant.quantize(model, accuracy_warning="ignore")
x = torch.randn(3, 256, dtype=torch.float32)
assert fxquant.sqnr_db(model(x), qmodel(x)) > 12
assert info.rows[0].weight_sqnr_db > 15
print(rounding.FAULT, qmodel.get_submodule("0").backend)
"""


def alone(before):
    run = subprocess.run(
        [sys.executable, "-c", ALONE.format(before=before)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_without_the_extension_everything_works():
    said = alone("sys.modules['fxquant.kernels._native'] = None")
    assert "it was not built when fxquant was installed" in said
    assert "aten" in said


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_the_default_dtype_of_torch_does_not_matter(dtype):
    alone(f"torch.set_default_dtype(torch.{dtype})")


def test_the_default_device_of_torch_does_not_matter_when_imported():
    alone("with torch.device('meta'): import fxquant.pipeline")


def test_importance_of_another_length_says_what_is_needed():
    for shape in ((63,), (65,), (1, 64)):
        with pytest.raises(OptionError, match=r"one value for each of the 64 columns.*mean square"):
            round_to_nearest(torch.randn(8, 64), importance=torch.ones(shape))
