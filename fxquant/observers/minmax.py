"""Observers of the extremes."""

from typing import Self

import torch
from torch import Tensor

from fxquant.errors import OptionError, check_number
from fxquant.observers.base import Observer
from fxquant.observers.grid import Grid


class MinMaxObserver(Observer):
    """Spans everything that was seen.

    Args:
        integer: the integers of the grid, `"uint8"` or `"int8"`.
        symmetric: whether zero lies in the middle of them.
    """

    def _range(self, grid: Grid) -> tuple[Tensor, Tensor]:
        return self.minimum, self.maximum


class MovingAverageMinMaxObserver(Observer):
    """Spans a moving average of each batch's extremes.

    Args:
        averaging_constant: the weight of the newest batch, above 0 and at most 1.
        integer: the integers of the grid, `"uint8"` or `"int8"`.
        symmetric: whether zero lies in the middle of them.
    """

    average_minimum: Tensor
    average_maximum: Tensor
    first_minimum: Tensor
    first_maximum: Tensor
    batches: Tensor

    def __init__(
        self, averaging_constant: float = 0.01, *, integer: str = "uint8", symmetric: bool = False
    ) -> None:
        super().__init__(integer=integer, symmetric=symmetric)
        check_number("averaging_constant", averaging_constant)
        if not 0 < averaging_constant <= 1:
            raise OptionError(
                "averaging_constant",
                found=repr(averaging_constant),
                needed="a number above 0 and at most 1",
                remedy="Use 0.01, or a larger value for few batches.",
            )
        self.averaging_constant = averaging_constant
        for name in ("average_minimum", "average_maximum", "first_minimum", "first_maximum"):
            self.register_buffer(name, torch.zeros(()))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def _observe(self, values: Tensor, low: Tensor, high: Tensor) -> None:
        super()._observe(values, low, high)
        # The first batch is taken whole; `where` keeps the choice on the device.
        one, is_first = torch.ones((), device=low.device), self.batches == 0
        self.first_minimum = torch.where(is_first, low, self.first_minimum)
        self.first_maximum = torch.where(is_first, high, self.first_maximum)
        share = torch.where(is_first, one, self.averaging_constant)
        self.average_minimum = torch.lerp(self.average_minimum, low, share)
        self.average_maximum = torch.lerp(self.average_maximum, high, share)
        self.batches = self.batches + 1

    def _range(self, grid: Grid) -> tuple[Tensor, Tensor]:
        return self.average_minimum, self.average_maximum

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.average_minimum = torch.zeros_like(self.average_minimum)
        self.average_maximum = torch.zeros_like(self.average_maximum)
        self.first_minimum = torch.zeros_like(self.first_minimum)
        self.first_maximum = torch.zeros_like(self.first_maximum)
        self.batches = torch.zeros_like(self.batches)

    def _merge(self, other: Self) -> None:
        """The batches of `other` come after those seen here.

        `other` took its first batch whole; here it counts like any other, so that all but a share
        of it is replaced by the average that was there before.
        """
        if not self.has_seen_values:
            self.first_minimum, self.first_maximum = other.first_minimum, other.first_maximum
            self.average_minimum = other.average_minimum
            self.average_maximum = other.average_maximum
        else:
            kept = (1 - self.averaging_constant) ** other.batches.double()
            low = self.average_minimum - other.first_minimum
            high = self.average_maximum - other.first_maximum
            self.average_minimum = other.average_minimum + (kept * low).float()
            self.average_maximum = other.average_maximum + (kept * high).float()
        self.batches = self.batches + other.batches

    def _options(self) -> dict[str, object]:
        return {"averaging_constant": self.averaging_constant, **super()._options()}
