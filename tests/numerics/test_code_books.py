"""Code books: 16 levels of 8 bits, numbered by codes of 4."""

import pytest
import torch

from fxquant.algorithms.gptq import gptq, quantization_loss
from fxquant.algorithms.hqq import half_quadratic
from fxquant.algorithms.refine import refine
from fxquant.algorithms.requantize import requantize
from fxquant.algorithms.rtn import round_to_nearest
from fxquant.errors import OptionError
from fxquant.numerics.code_books import CODE_BOOKS, code_book_of, integer_type, number_of
from fxquant.numerics.integers import quantize_affine, unsigned
from fxquant.numerics.metrics import sqnr_db
from fxquant.numerics.quantized_weight import QuantizedWeight
from fxquant.numerics.weights import calculate_scale_zp_groupwise, quantize_weight
from fxquant.observers.moments import LayerMoments

every_book = pytest.mark.parametrize("book", CODE_BOOKS)
NF4 = [
    -1.0, -0.69619280, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.07958030, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0,
]  # fmt: skip


def test_nf4_has_the_published_values_to_8_bits():
    levels = (torch.tensor(CODE_BOOKS["nf4"].book) - 128) / 127
    assert (levels - torch.tensor(NF4)).abs().max() <= 0.5 / 127
    weight, exact = torch.randn(64, 1024).view(64, 8, 128), torch.tensor(NF4)
    scale = weight.abs().amax(-1, keepdim=True).bfloat16().float()
    nearest = (weight / scale)[..., None].sub(exact).abs().argmin(-1)
    errors = [
        ((values[nearest] * scale - weight).square().sum() / weight.square().sum()).log10() * 10
        for values in (exact, levels)
    ]
    assert abs(errors[0] - errors[1]) < 0.05  # dB


@every_book
def test_codes_and_levels_are_the_same_both_ways(book):
    integer = integer_type(4, book)
    assert (integer.levels, integer.middle) == (16, 128)
    assert code_book_of(number_of(book)) == book
    codes = torch.randint(0, 16, (5, 33), dtype=torch.uint8)
    levels = integer.of_codes(codes)
    assert set(levels.flatten().tolist()) <= set(integer.book)
    assert torch.equal(integer.codes_of(levels), codes)


@every_book
def test_rounding_gives_the_nearest_level(book):
    integer = integer_type(4, book)
    x = torch.cat([torch.randn(1000) * 90 + 128, torch.tensor([-1e30, 1e30, torch.inf])])
    found = quantize_affine(x, torch.tensor(1.0), torch.tensor(0.0), integer)
    levels = torch.tensor(integer.book).float()
    nearest = (x[:, None].clamp(-500, 800) - levels).abs().amin(1)
    torch.testing.assert_close((x.clamp(-500, 800) - found).abs(), nearest)


@every_book
@pytest.mark.parametrize("group_size", [32, 100, -1])
def test_a_weight_is_stored_in_as_many_bytes_as_integers_and_comes_back(book, group_size):
    weight = torch.randn(37, 250)
    made = quantize_weight(weight, 4, group_size, code_book=book)
    assert made.nbytes == quantize_weight(weight, 4, group_size).nbytes
    values = (made.integers().double() - 128) * made.scales.double().repeat_interleave(
        made.group_size, 1
    )[:, :250]
    torch.testing.assert_close(made.dequantize().double(), values)
    saved = made.to_saved()
    assert [t.dtype for t in saved] == [torch.uint8, torch.bfloat16, torch.float16]
    parts = [part.clone() for part in made.split(16)]
    assert torch.equal(QuantizedWeight.joined(parts).dequantize(), made.dequantize())
    again = made.with_integers(made.integers(), made.scales, made.zero_points)
    assert torch.equal(again.packed, made.packed)


@every_book
def test_every_method_rounds_to_the_levels_and_keeps_more_than_with_integers(book):
    torch.manual_seed(0)
    weight, x = torch.randn(96, 256), torch.randn(2000, 256) @ torch.randn(256, 256)
    moments = LayerMoments(256, 96)
    moments.add(x)
    form = {"group_size": 64}
    for kept, other in (
        (round_to_nearest(weight, code_book=book, **form), round_to_nearest(weight, **form)),
        (half_quadratic(weight, code_book=book, **form), half_quadratic(weight, **form)),
    ):
        assert kept.code_book == book
        assert sqnr_db(weight, kept.dequantize()) > sqnr_db(weight, other.dequantize())
    losses = []
    for code_book in (book, None):
        made = gptq(weight, moments, code_book=code_book, **form)
        better = refine(weight, made, moments)
        assert (made.code_book, better.code_book) == (code_book, code_book)
        losses += [quantization_loss(weight, w.dequantize(), moments) for w in (made, better)]
    assert losses[1] < losses[0] < losses[2]
    assert losses[1] < losses[3]
    assert set(better.integers().flatten().tolist()) <= set(range(16))


@every_book
def test_a_changed_weight_is_rounded_again_to_the_same_book(book):
    weight = torch.randn(20, 128)
    made = round_to_nearest(weight, group_size=32, code_book=book)
    changed = requantize(made.dequantize() + 0.01 * torch.randn(20, 128), made)
    assert changed.code_book == book
    assert sqnr_db(made.dequantize(), changed.dequantize()) > 20


def test_what_a_code_book_cannot_be_is_refused_in_words():
    weight = torch.randn(8, 64)
    for make in (quantize_weight, lambda *a, **k: calculate_scale_zp_groupwise(weight, 32, **k)):
        with pytest.raises(OptionError, match="code_book: got 'nf5'.*Did you mean 'nf4'"):
            make(weight, bits=4, code_book="nf5")
        with pytest.raises(OptionError, match="bits: got 3 with the code book.*Pass bits=4"):
            make(weight, bits=3, code_book="nf4")
        with pytest.raises(OptionError, match="symmetric: got False with.*lie around zero"):
            make(weight, bits=4, symmetric=False, code_book="nf4")
    assert integer_type(5) == unsigned(5)
