"""Integer types and the one affine map to them: x ≈ scale · (q − zero_point).

A type holds all integers of a range, or some of them: a code book, whose integers are numbered by
codes of fewer bits (see `code_books`).
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fxquant.errors import OptionError

WIDTHS = (2, 3, 4, 5, 6, 8)  # bits of a weight's integers


@dataclass(frozen=True)
class IntegerType:
    """The integers of a format.

    Attributes:
        name: of the format.
        bits: of an integer; of a code that numbers it, where there is a book.
        quant_min: the least of them.
        quant_max: the largest.
        book: the integers that there are, rising, all from 0 to 255; None: all of the range.
    """

    name: str
    bits: int
    quant_min: int
    quant_max: int
    book: tuple[int, ...] | None = None

    @property
    def levels(self) -> int:
        """How many integers there are."""
        return self.quant_max - self.quant_min + 1 if self.book is None else len(self.book)

    @property
    def middle(self) -> float:
        """The zero point of symmetric weights: half of the range lies below it."""
        return float((self.quant_min + self.quant_max + 1) // 2)

    def nearest_(self, x: Tensor) -> Tensor:
        """Round floats to the nearest of the integers, in place; of two, a book has the larger."""
        if self.book is None:
            return x.round_().clamp_(self.quant_min, self.quant_max)
        # The middles between neighbours are whole halves, so that the half decides.
        table = _nearest_of_halves(self.book, x.device)
        halves = (x * 2).nan_to_num_(0.0).clamp_(0, len(table) - 1)
        return x.copy_(torch.take(table, halves.long()))

    def of_codes(self, codes: Tensor) -> Tensor:
        """The integers that codes stand for, uint8 of any shape; without a book they are equal."""
        if self.book is None:
            return codes
        book = torch.tensor(self.book, dtype=torch.uint8, device=codes.device)
        return book.index_select(0, codes.reshape(-1).int()).view(codes.shape)

    def codes_of(self, q: Tensor) -> Tensor:
        """Undo `of_codes`, for integers of this type."""
        if self.book is None:
            return q
        numbers = _numbers_of(self.book, q.device)
        return numbers.index_select(0, q.reshape(-1).int()).view(q.shape)


@cache
def _nearest_of_halves(book: tuple[int, ...], device: torch.device) -> Tensor:
    """For i = 0 .. 511, the integer of a book that is nearest to all from i / 2 to (i + 1) / 2."""
    levels = torch.tensor(book, dtype=torch.float32, device=device)
    places = torch.arange(512, device=device) / 2 + 0.25
    return levels[(places[:, None] - levels).abs().argmin(1)]


@cache
def _numbers_of(book: tuple[int, ...], device: torch.device) -> Tensor:
    """For each of 0 .. 255 that is in a book its number there, uint8 [256]."""
    numbers = [book.index(level) if level in book else 0 for level in range(256)]
    return torch.tensor(numbers, dtype=torch.uint8, device=device)


_UNSIGNED = {bits: IntegerType(f"uint{bits}", bits, 0, (1 << bits) - 1) for bits in WIDTHS}
UINT4, UINT8 = _UNSIGNED[4], _UNSIGNED[8]
INT8 = IntegerType("int8", 8, -128, 127)


def unsigned(bits: int) -> IntegerType:
    """The integers 0 .. 2 ** bits - 1, as weights have them.

    Raises:
        OptionError: `bits` is none of `WIDTHS`.
    """
    if isinstance(bits, bool | float) or bits not in WIDTHS:
        raise OptionError(
            "bits",
            found=repr(bits),
            needed=f"one of {', '.join(map(str, WIDTHS))}",
            remedy="Choose one of these widths.",
        )
    return _UNSIGNED[bits]


def quantize_affine(x: Tensor, scale: Tensor, zero_point: Tensor, integer: IntegerType) -> Tensor:
    """Round `x` to the integers of `integer`, kept in the dtype of `x`.

    Args:
        x: any shape; NaN stays NaN, but for code books.
        scale: broadcasts against `x`; may be negative, must not be 0.
        zero_point: broadcasts against `x`; need not be whole.
        integer: what there is to round to.
    """
    # Multiplying by a reciprocal rounds differently, so divide.
    return integer.nearest_(x / scale + zero_point)


def dequantize_affine(q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """The float values of integers `q`: scale · (q − zero_point); shapes broadcast.

    They lie in memory in the order in which `q` does: torch takes that from the first operand.
    """
    return (q.to(scale.dtype) - zero_point) * scale


def safe_scale(scale: Tensor) -> Tensor:
    """`scale` with each 0 replaced by 1: a range without extent maps to the zero point."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)
