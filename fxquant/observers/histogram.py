"""An observer that keeps a histogram and clips where KL(P ‖ Q) is smallest."""

from typing import Self

import torch
from torch import Tensor

from fxquant.errors import OptionError, check_positive_int
from fxquant.observers.base import Observer
from fxquant.observers.grid import Grid
from fxquant.observers.kl import best_range

LEAST_BIN_RATIO = 2.0**-24  # of the largest magnitude: float32 tells no finer bins apart
TINY = torch.finfo(torch.float32).tiny
OUTLIER_RATIO = 10.0  # above it, `AutoObserver` clips


class HistogramObserver(Observer):
    """Counts values in bins of one common grid that grows with the batches.

    The bin width is a power of two and bin edges are multiples of it, so when the range grows, old
    bins fall whole into new ones and nothing is approximated. Exact zeros are not counted: the
    integer grid represents them exactly.

    Args:
        bins: how many bins, at least 2.
        integer: the integers of the grid, `"uint8"` or `"int8"`.
        symmetric: whether zero lies in the middle of them.
    """

    histogram: Tensor
    width: Tensor
    first: Tensor

    def __init__(
        self, bins: int = 2048, *, integer: str = "uint8", symmetric: bool = False
    ) -> None:
        super().__init__(integer=integer, symmetric=symmetric)
        check_positive_int("bins", bins)
        if bins < 2:
            raise OptionError(
                "bins",
                found="1",
                needed="at least 2",
                remedy="Use 2048; more bins see finer, fewer take less memory.",
            )
        self.bins = bins
        self.register_buffer("histogram", torch.zeros(bins, dtype=torch.int64))
        self.register_buffer("width", torch.zeros((), dtype=torch.float64))
        self.register_buffer("first", torch.zeros((), dtype=torch.int64))  # first edge / width

    def _observe(self, values: Tensor, low: Tensor, high: Tensor) -> None:
        super()._observe(values, low, high)
        self._grow(self.minimum, self.maximum)
        # Times a power of two is exact, and so is the floor less a whole number.
        index = (values.flatten() * (1 / self.width).float()).floor_().sub_(self.first.float())
        index = self._inside(index.int())
        one = torch.ones((), dtype=torch.int64, device=values.device)
        # Not bincount: it waits for the device.
        histogram = self.histogram.index_add(0, index, one.expand(index.numel()))
        zeros = values.numel() - torch.count_nonzero(values)
        zero_bin = self._inside(-self.first)
        self.histogram = histogram.index_add_(0, zero_bin[None], -zeros[None])

    def _grow(self, low: Tensor, high: Tensor) -> None:
        """Widen the bins so that they cover `low`..`high`."""
        ends = torch.stack((low, high)).double()
        needed = torch.maximum(
            (ends[1] - ends[0]) / (self.bins - 1), ends.abs().amax() * LEAST_BIN_RATIO
        )
        width = torch.maximum(self.width, needed.clamp(min=TINY).log2().ceil().exp2())
        first = (ends[0] / width).floor()
        moved = self._inside(((self._numbers() * (self.width / width)).floor() - first).long())
        self.histogram = torch.zeros_like(self.histogram).index_add_(0, moved, self.histogram)
        self.width, self.first = width, first.long()

    def _numbers(self) -> Tensor:
        """The bins' lower edges, divided by the width."""
        return torch.arange(self.bins, device=self.first.device) + self.first

    def _inside(self, index: Tensor) -> Tensor:
        """Bins that exist: where NaN and Inf are counted does not matter, they are reported."""
        return index.clamp_(0, self.bins - 1)

    def _range(self, grid: Grid) -> tuple[Tensor, Tensor]:
        centres = (self._numbers() + 0.5).double() * self.width
        histogram = self.histogram.double()
        return best_range(histogram, centres, self.width, self.minimum, self.maximum, grid)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.histogram = torch.zeros_like(self.histogram)
        self.width = torch.zeros_like(self.width)
        self.first = torch.zeros_like(self.first)

    def _merge(self, other: Self) -> None:
        low = torch.minimum(self.minimum, other.minimum)
        high = torch.maximum(self.maximum, other.maximum)
        grown = HistogramObserver(self.bins)
        grown.histogram, grown.width, grown.first = other.histogram, other.width, other.first
        grown._grow(low, high)
        self._grow(low, high)
        self.histogram = self.histogram + grown.histogram

    def _options(self) -> dict[str, object]:
        return {"bins": self.bins, **super()._options()}


class AutoObserver(HistogramObserver):
    """Experimental: clips like the histogram observer where there are outliers, else spans all.

    There are outliers if the outlier ratio of the statistics exceeds 10.
    """

    def _range(self, grid: Grid) -> tuple[Tensor, Tensor]:
        if self.statistics().outlier_ratio > OUTLIER_RATIO:
            return super()._range(grid)
        return self.minimum, self.maximum
