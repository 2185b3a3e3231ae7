"""The clipping range that minimises KL(P ‖ Q) of a histogram.

P is the histogram with clipped values moved to its outermost bins; Q is P re-quantized to the
levels of the range and spread back over the bins (Migacz, "8-bit inference with TensorRT", 2017).
KL alone is blind to how far a clipped value lies and to levels finer than a bin, so it chooses only
among ranges whose squared error on the bulk of the data is within `TOLERANCE_DB` of the smallest.

The bulk is all but a few far outliers. How far is far, the data tell: a power-law tail through two
quantiles of the distance from the median is extended to the farthest of n values (Weissman, JASA
73, 1978), and outliers lie well beyond it. So a heavy tail is kept and a stray value is not.
"""

import torch
from torch import Tensor

from fxquant.numerics.integers import IntegerType
from fxquant.observers.grid import Grid

CANDIDATES = 48  # candidates of each search
LEAST_CLIP_RATIO = 0.05  # of the bulk's range
TOLERANCE_DB = 0.5
MOST_OUTLIERS = 0.002  # the largest share of values that may be outliers
OUTLIER_DISTANCE = 3.0  # times the expected farthest distance is far
LEAST_OUTLIER_SPREAD = (
    3.0  # times the bulk's range: outliers inside cost it less than 10 dB and are kept
)


def best_range(
    histogram: Tensor, centres: Tensor, width: Tensor, minimum: Tensor, maximum: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """Search the range that the grid spans.

    Args:
        histogram: counts of values other than zero, float64 [bins].
        centres: the bins' centres, float64 [bins].
        width: of a bin, a scalar.
        minimum: the smallest value seen, a scalar.
        maximum: the largest.
        grid: the integers to quantize to.

    Returns:
        `(low, high)`, float64 scalars; the range includes zero.
    """
    low, high = minimum.double().clamp(max=0), maximum.double().clamp(min=0)
    filled = histogram > 0
    if not bool(filled.any()):
        return low, high
    histogram, centres = histogram[filled], centres[filled]
    bulk = histogram * ~_is_outlier(histogram, centres)
    bulk_low = torch.maximum(low, centres[bulk > 0].min() - width / 2).clamp(max=0)
    bulk_high = torch.minimum(high, centres[bulk > 0].max() + width / 2).clamp(min=0)
    if high - low < LEAST_OUTLIER_SPREAD * (bulk_high - bulk_low):
        bulk, bulk_low, bulk_high = histogram, low, high
    search = _ThresholdSearch(histogram, bulk, centres, width, grid)
    clip_ratios = torch.linspace(
        1, LEAST_CLIP_RATIO, CANDIDATES, dtype=torch.float64, device=centres.device
    )
    low, high = search.best(bulk_low * clip_ratios, bulk_high * clip_ratios)
    for _ in range(2):  # then each end on its own, twice
        low, high = search.best(low.expand(CANDIDATES), high * clip_ratios)
        low, high = search.best(low * clip_ratios, high.expand(CANDIDATES))
    return low, high


def squared_error(
    centres: Tensor, width: Tensor, histogram: Tensor, integer: IntegerType
) -> Tensor:
    """The squared error of rounding and clipping to the integers, by candidate.

    Args:
        centres: the bins' centres as each candidate maps them to the integers, [candidates, bins].
        width: of a bin, mapped likewise, [candidates, 1].
        histogram: counts [bins]; the values of a bin are taken as spread evenly over it.
        integer: the integers there are.

    Returns:
        Sums over all values, in squared steps of the integers, [candidates].
    """

    def integral(x: Tensor) -> Tensor:  # the antiderivative of the squared distance to the nearest
        nearest = x.round().clamp_(integer.quant_min, integer.quant_max)
        return nearest / 12 + (x - nearest) ** 3 / 3

    means = (integral(centres + width / 2) - integral(centres - width / 2)) / width
    return (means * histogram).sum(1).clamp(min=0)


def divergence(centres: Tensor, histogram: Tensor, integer: IntegerType) -> Tensor:
    """KL(P ‖ Q) in nats, by candidate; infinite where every bin is clipped.

    Args:
        centres: the bins' centres as each candidate maps them to the integers, [candidates, bins].
        histogram: counts [bins], none of them 0.
        integer: the integers there are.
    """
    exact = centres.round()
    levels = exact.clamp(integer.quant_min, integer.quant_max)
    is_inside = exact == levels
    index = levels.long() - integer.quant_min
    inside = is_inside * histogram  # [candidates, bins]
    per_level = inside.new_zeros(len(exact), integer.levels)
    mass = per_level.scatter_add(1, index, inside)
    spread = per_level.scatter_add(1, index, is_inside.to(inside.dtype))
    q = (mass / spread.clamp(min=1)).gather(1, index) * is_inside
    p = inside
    for is_clipped, outermost in (
        (exact < levels, is_inside.int().argmax(1)),
        (exact > levels, exact.shape[1] - 1 - is_inside.flip(1).int().argmax(1)),
    ):
        moved = (is_clipped * histogram).sum(1, keepdim=True)
        p = p.scatter_add(1, outermost[:, None], moved)
    p = p / histogram.sum()
    q = q / q.sum(1, keepdim=True)
    ratio = torch.where(is_inside, p / q, 1)
    return torch.where(is_inside.any(1), torch.special.xlogy(p, ratio).sum(1), torch.inf)


class _ThresholdSearch:
    """Chooses among candidates and remembers the smallest error of all it saw."""

    def __init__(
        self, histogram: Tensor, bulk: Tensor, centres: Tensor, width: Tensor, grid: Grid
    ) -> None:
        self.histogram, self.bulk = histogram, bulk
        self.centres, self.width, self.grid = centres, width, grid
        self.smallest_error = centres.new_full((), torch.inf)

    def best(self, lows: Tensor, highs: Tensor) -> tuple[Tensor, Tensor]:
        """The candidate of `lows`, `highs` [candidates] to choose."""
        integer = self.grid.integer
        scale, zero_point = (p[:, None] for p in self.grid.qparams(lows, highs))
        centres = self.centres / scale + zero_point
        errors = squared_error(centres, self.width / scale, self.bulk, integer) * scale[:, 0] ** 2
        self.smallest_error = torch.minimum(self.smallest_error, errors.min())
        divergences = divergence(centres, self.histogram, integer)
        divergences[errors > self.smallest_error * 10 ** (TOLERANCE_DB / 10)] = torch.inf
        best = divergences.argmin()
        return lows[best], highs[best]


def _is_outlier(histogram: Tensor, centres: Tensor) -> Tensor:
    """Which bins [bins] lie far beyond the tail that the data have."""
    count = histogram.sum()
    median = centres[_quantile(histogram, 0.5)]
    distance, order = (centres - median).abs().sort()
    nearer, farther = (
        distance[_quantile(histogram[order], 1 - share)]
        for share in (10 * MOST_OUTLIERS, MOST_OUTLIERS)
    )
    growth = (farther / nearer).nan_to_num(1, posinf=1e6)  # per decade of values
    decades = (count * MOST_OUTLIERS).log10().clamp(min=0)
    return (centres - median).abs() > OUTLIER_DISTANCE * farther * growth**decades


def _quantile(counts: Tensor, share: float) -> Tensor:
    """The index of the bin up to which `share` of the counts lie."""
    cumulative = counts.cumsum(0) / counts.sum()
    return (cumulative < share - 1e-12).sum().clamp(max=len(counts) - 1)
