"""Observers of the extremes."""

from typing import Self

import torch
from torch import Tensor

from fxquant.errors import OptionError
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

    Merged observers average their averages, weighted by batches.

    Args:
        averaging_constant: the weight of the newest batch, above 0 and at most 1.
        integer: the integers of the grid, `"uint8"` or `"int8"`.
        symmetric: whether zero lies in the middle of them.
    """

    average_minimum: Tensor
    average_maximum: Tensor
    batches: Tensor

    def __init__(
        self, averaging_constant: float = 0.01, *, integer: str = "uint8", symmetric: bool = False
    ) -> None:
        super().__init__(integer=integer, symmetric=symmetric)
        if not 0 < averaging_constant <= 1:
            raise OptionError(
                "averaging_constant",
                found=repr(averaging_constant),
                needed="a number above 0 and at most 1",
                remedy="Use 0.01, or a larger value for few batches.",
            )
        self.averaging_constant = averaging_constant
        self.register_buffer("average_minimum", torch.zeros(()))
        self.register_buffer("average_maximum", torch.zeros(()))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def _observe(self, values: Tensor, low: Tensor, high: Tensor) -> None:
        super()._observe(values, low, high)
        # The first batch is taken whole; `where` keeps the choice on the device.
        one = torch.ones((), device=low.device)
        share = torch.where(self.batches == 0, one, self.averaging_constant)
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
        self.batches = torch.zeros_like(self.batches)

    def _merge(self, other: Self) -> None:
        share = (other.batches / (self.batches + other.batches)).float()
        self.average_minimum = torch.lerp(self.average_minimum, other.average_minimum, share)
        self.average_maximum = torch.lerp(self.average_maximum, other.average_maximum, share)
        self.batches = self.batches + other.batches

    def _options(self) -> dict[str, object]:
        return {"averaging_constant": self.averaging_constant, **super()._options()}
