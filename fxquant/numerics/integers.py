"""Integer types and the one affine map to them: x ≈ scale · (q − zero_point)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.errors import OptionError

WIDTHS = (2, 3, 4, 5, 6, 8)  # bits of a weight's integers


@dataclass(frozen=True)
class IntegerType:
    """The range of an integer format."""

    name: str
    bits: int
    quant_min: int
    quant_max: int

    @property
    def levels(self) -> int:
        """How many integers there are."""
        return self.quant_max - self.quant_min + 1


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
        x: any shape; NaN stays NaN.
        scale: broadcasts against `x`; may be negative, must not be 0.
        zero_point: broadcasts against `x`; need not be whole.
        integer: the range to clamp to.
    """
    # Multiplying by a reciprocal rounds differently, so divide.
    return (x / scale + zero_point).round_().clamp_(integer.quant_min, integer.quant_max)


def dequantize_affine(q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """The float values of integers `q`: scale · (q − zero_point); shapes broadcast.

    They lie in memory in the order in which `q` does: torch takes that from the first operand.
    """
    return (q.to(scale.dtype) - zero_point) * scale


def safe_scale(scale: Tensor) -> Tensor:
    """`scale` with each 0 replaced by 1: a range without extent maps to the zero point."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)
