"""From a range of values to the integer grid that spans it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.numerics.integers import IntegerType


@dataclass(frozen=True)
class Grid:
    """Which integers stand for the values: x ≈ scale · (q − zero_point).

    Attributes:
        integer: the integers' range.
        symmetric: whether zero lies in the middle of them.
    """

    integer: IntegerType
    symmetric: bool

    def qparams(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The scale and zero point that span `low`..`high` and zero.

        Args:
            low: the smallest values to span, any shape.
            high: the largest, of the same shape.

        Returns:
            `(scale, zero_point)`, float64 of that shape; the zero point is whole and one of the
            integers. A range without extent has the scale 1.
        """
        low, high = low.double().clamp(max=0), high.double().clamp(min=0)
        if self.symmetric:
            steps = (self.integer.levels - 1) // 2
            scale = _usable(torch.maximum(-low, high) / steps)
            return scale, torch.full_like(scale, self.integer.quant_max - steps)
        scale = _usable((high - low) / (self.integer.levels - 1))
        zero_point = (self.integer.quant_min - low / scale).round()
        return scale, zero_point.clamp(self.integer.quant_min, self.integer.quant_max)


def _usable(scale: Tensor) -> Tensor:
    """`scale`, with 1 where float32 holds it only as a subnormal number or as zero."""
    return torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)
