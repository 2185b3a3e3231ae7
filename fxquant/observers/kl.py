"""The clipping range that minimises KL(P ‖ Q) of a histogram.

P is the histogram with clipped values moved to its outermost bins; Q is P re-quantized to the 256
levels of the range and spread back over the bins (Migacz, "8-bit inference with TensorRT", 2017).
KL alone is blind to how far a clipped value lies, so it chooses only among ranges that cost the
bulk of the data at most `TOLERANCE_DB` against the full range.
"""

import torch
from torch import Tensor

from fxquant.numerics.integers import UINT8

STEPS = 96  # candidates of each search
SMALLEST = 0.02  # of the full range
TOLERANCE_DB = 1.0
BULK = 0.99  # share of the data that certainly is no outlier
FENCE = 8.0  # how many times as far from the median the bulk may reach


def best_range(
    histogram: Tensor, centres: Tensor, minimum: Tensor, maximum: Tensor
) -> tuple[Tensor, Tensor]:
    """Search the range to span with uint8.

    Args:
        histogram: counts of values other than zero, float64 [bins].
        centres: the bins' centres, float64 [bins].
        minimum: the smallest value seen, a scalar.
        maximum: the largest.

    Returns:
        `(low, high)`, float64 scalars; the range includes zero.
    """
    low, high = minimum.double().clamp(max=0), maximum.double().clamp(min=0)
    if not bool(histogram.sum() > 0):
        return low, high
    shrinks = torch.linspace(1, SMALLEST, STEPS, dtype=torch.float64, device=centres.device)
    scorer = _Scorer(histogram, centres, low, high)
    low, high = scorer.best(low * shrinks, high * shrinks)
    for _ in range(2):  # then each end on its own, twice
        low, high = scorer.best(low.expand(STEPS), high * shrinks)
        low, high = scorer.best(low * shrinks, high.expand(STEPS))
    return low, high


class _Scorer:
    def __init__(self, histogram: Tensor, centres: Tensor, low: Tensor, high: Tensor) -> None:
        self.histogram, self.centres = histogram, centres
        self.bulk = histogram * _is_bulk(histogram, centres)
        self.limit = self._error(low[None], high[None]) * 10 ** (TOLERANCE_DB / 10)

    def best(self, lows: Tensor, highs: Tensor) -> tuple[Tensor, Tensor]:
        """The candidate of `lows`, `highs` [candidates] with the smallest divergence."""
        divergence = self._divergence(lows, highs)
        divergence[self._error(lows, highs) > self.limit] = torch.inf
        best = divergence.argmin()
        return lows[best], highs[best]

    def _levels(self, lows: Tensor, highs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale = ((highs - lows) / UINT8.quant_max)[:, None].clamp(min=1e-300)
        zero_point = (-lows[:, None] / scale).round()
        exact = (self.centres / scale + zero_point).round()
        return exact, scale, zero_point

    def _error(self, lows: Tensor, highs: Tensor) -> Tensor:
        """Squared error of the bulk, [candidates], with each bin's values at its centre."""
        exact, scale, zero_point = self._levels(lows, highs)
        clipped = exact.clamp(UINT8.quant_min, UINT8.quant_max)
        distance = (clipped - zero_point) * scale - self.centres
        # Values inside a level are spread evenly, whatever the bins' resolution says.
        within = torch.where(exact == clipped, scale**2 / 12, distance**2)
        return (within * self.bulk).sum(-1)

    def _divergence(self, lows: Tensor, highs: Tensor) -> Tensor:
        """KL(P ‖ Q) in nats, [candidates]."""
        exact, _, _ = self._levels(lows, highs)
        levels = exact.clamp(UINT8.quant_min, UINT8.quant_max).long()
        inside = (levels == exact) * self.histogram  # [candidates, bins]
        filled = inside > 0
        shape = (len(lows), UINT8.levels)
        mass = inside.new_zeros(shape).scatter_add_(1, levels, inside)
        spread = inside.new_zeros(shape).scatter_add_(1, levels, filled.to(inside.dtype))
        q = torch.where(filled, (mass / spread.clamp(min=1)).gather(1, levels), 0)
        p = inside.clone()
        below = self.histogram.expand_as(p) * (exact < UINT8.quant_min)
        above = self.histogram.expand_as(p) * (exact > UINT8.quant_max)
        order = torch.arange(p.shape[1], device=p.device).expand_as(p)
        first = torch.where(filled, order, p.shape[1] - 1).amin(1, keepdim=True)
        last = torch.where(filled, order, 0).amax(1, keepdim=True)
        p.scatter_add_(1, first, below.sum(1, keepdim=True))
        p.scatter_add_(1, last, above.sum(1, keepdim=True))
        p = p / p.sum(1, keepdim=True)
        q = q / q.sum(1, keepdim=True).clamp(min=1)
        divergence = torch.where(p > 0, p * (p / q.clamp(min=1e-12)).log(), 0).sum(1)
        return torch.where(filled.any(1), divergence, torch.inf)


def _is_bulk(histogram: Tensor, centres: Tensor) -> Tensor:
    """Which bins [bins] hold no far outliers."""
    cumulative = histogram.cumsum(0) / histogram.sum()
    edge = (1 - BULK) / 2
    points = torch.tensor([edge, 0.5, 1 - edge], dtype=cumulative.dtype, device=centres.device)
    index = torch.searchsorted(cumulative, points).clamp(max=len(centres) - 1)
    low, median, high = centres[index]
    reach = FENCE * torch.maximum(high - median, median - low)
    return (centres - median).abs() <= reach.clamp(min=torch.finfo(torch.float32).tiny)
