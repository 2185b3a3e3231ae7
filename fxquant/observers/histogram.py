"""An observer that keeps a histogram and clips where KL(P ‖ Q) is smallest."""

from typing import Self

import torch
from torch import Tensor

from fxquant.errors import check_positive_int
from fxquant.observers.base import Observer
from fxquant.observers.kl import best_range

FINEST = 2.0**-24  # of the largest magnitude: float32 tells no finer bins apart
OUTLIER_RATIO = 10.0  # above it, `AutoObserver` clips


class HistogramObserver(Observer):
    """Counts values in bins of one common grid that grows with the batches.

    The bin width is a power of two and bin edges are multiples of it, so when the range grows, old
    bins fall whole into new ones and nothing is approximated. Exact zeros are counted apart: the
    integer grid represents them exactly.

    Args:
        bins: how many bins.
    """

    histogram: Tensor
    width: Tensor
    first: Tensor

    def __init__(self, bins: int = 2048) -> None:
        super().__init__()
        check_positive_int("bins", bins)
        self.bins = bins
        self.register_buffer("histogram", torch.zeros(bins, dtype=torch.int64))
        self.register_buffer("width", torch.zeros((), dtype=torch.float64))
        self.register_buffer("first", torch.zeros((), dtype=torch.int64))  # first edge / width

    def _observe(self, values: Tensor, low: Tensor, high: Tensor) -> None:
        super()._observe(values, low, high)
        self._grow(self.minimum, self.maximum)
        # Dividing by a power of two is exact; NaN and Inf are reported later, their bin is moot.
        index = values.flatten().div(self.width.float()).floor_()
        index = index.sub_(self.first.float()).nan_to_num_(0).clamp_(0, self.bins - 1)
        weights = (values != 0).flatten().double()
        counts = torch.bincount(index.long(), weights, minlength=self.bins)
        self.histogram += counts.long()

    def _grow(self, low: Tensor, high: Tensor) -> None:
        """Widen the grid so that it covers `low`..`high`."""
        low, high = low.double(), high.double()
        needed = torch.maximum((high - low) / max(self.bins - 1, 1), _finest(low, high))
        width = torch.maximum(self.width, torch.exp2(needed.log2().ceil()))
        first = (low / width).floor()
        old = torch.arange(self.bins, device=low.device) + self.first
        moved = (old * (self.width / width)).floor() - first
        moved = moved.nan_to_num(0).clamp(0, self.bins - 1).long()
        self.histogram = torch.zeros_like(self.histogram).scatter_add_(0, moved, self.histogram)
        self.width, self.first = width, first.nan_to_num(0).long()

    def _range(self) -> tuple[Tensor, Tensor]:
        centres = (torch.arange(self.bins, device=self.width.device) + self.first + 0.5).double()
        return best_range(self.histogram.double(), centres * self.width, self.minimum, self.maximum)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.histogram = torch.zeros_like(self.histogram)
        self.width = torch.zeros_like(self.width)
        self.first = torch.zeros_like(self.first)

    def _merge(self, other: Self) -> None:
        if not other.has_seen_values:
            return
        low = torch.minimum(self.minimum, other.minimum)
        high = torch.maximum(self.maximum, other.maximum)
        copy = HistogramObserver(self.bins).to(self.width.device)
        copy.histogram, copy.width, copy.first = other.histogram, other.width, other.first
        copy._grow(low, high)
        self._grow(low, high)
        self.histogram = self.histogram + copy.histogram

    def _options(self) -> tuple[object, ...]:
        return (self.bins,)


class AutoObserver(HistogramObserver):
    """Experimental: clips like the histogram observer where there are outliers, else spans all."""

    def _range(self) -> tuple[Tensor, Tensor]:
        if self.statistics().outlier_ratio > OUTLIER_RATIO:
            return super()._range()
        return self.minimum, self.maximum


def _finest(low: Tensor, high: Tensor) -> Tensor:
    largest = torch.maximum(low.abs(), high.abs())
    return (largest * FINEST).clamp(min=torch.finfo(torch.float32).tiny)
