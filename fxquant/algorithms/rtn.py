"""Rounding to nearest, with a clip search: the range that minimises each group's squared error.

A few ranges are tried for every group, most of them shrunken; then the scale (and zero point) of
the best one is refitted by least squares to the integers it gave, as long as that helps. Never
worse than the full range, because that is the first candidate.

Where the C++ extension was built, it does this, in the same steps and many times faster.
"""

import torch
from torch import Tensor

from fxquant.errors import OptionError
from fxquant.kernels import rounding
from fxquant.numerics.grouping import from_groups, group_mask, to_groups
from fxquant.numerics.integers import IntegerType, quantize_affine, safe_scale
from fxquant.numerics.quantized_weight import (
    SCALE_DTYPE,
    QuantizedWeight,
    rows_of_block,
)
from fxquant.numerics.weights import (
    check_weight,
    scales_from_extreme,
    scales_from_range,
    stored_zero_points,
)

# Ratios of the clipping range to the full range. One above 1 helps symmetric groups: codes span
# -8..7, so the positive end clips; widening trades step size for less clipping. The fewer the
# levels, the more clipping pays.
_RATIOS = (1.0, 1.06, 0.95, 0.9, 0.85, 0.8, 0.72, 0.64)
CLIP_RATIOS = {
    2: (*_RATIOS, 1.3, 1.6, 0.56, 0.5, 0.44, 0.38),
    3: (*_RATIOS, 1.15, 1.3, 0.56, 0.5),
    **dict.fromkeys((4, 5, 6, 8), _RATIOS),
}
# No level of a code book clips at full range; its levels lie closer on the positive side, so both
# signs of the scale are tried.
BOOK_RATIOS = tuple(sign * r for r in (1.0, 0.95, 0.9, 0.85, 0.8, 0.72, 0.64) for sign in (1, -1))
REFITS = 8  # nearly always fewer are needed
# Of the weighted variance of the levels, whose mean is rounded. With less, all that count are at
# one level, and what is left is the rounding error of the mean: no scale can be fitted to it.
LEAST_VARIANCE = 1e-6
SEARCH_BLOCK_ELEMENTS = 1 << 19  # of a block of rows: its temporaries stay in the cache


def round_to_nearest(
    weight: Tensor,
    *,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    integer_zero_points: bool = False,
    code_book: str | None = None,
    importance: Tensor | None = None,
) -> QuantizedWeight:
    """Quantize a weight by rounding, with the best range for each group.

    Args:
        weight: floating point [out, in].
        bits: of an integer.
        group_size: columns a group; the last group may be short. -1: one group a row.
        symmetric: one fixed zero point, or one for each group.
        integer_zero_points: these are whole numbers, 0 .. 2 ** bits - 1, not fractions.
        code_book: a name of `numerics.code_books.CODE_BOOKS`, or None for integers.
        importance: [in], how much a column's squared error counts: the mean square of the layer's
            input. All columns count alike without it.

    Returns:
        The integers with their scales and zero points.

    Raises:
        WeightError: the weight is not a finite matrix.
        OptionError: `group_size` or `bits` is not usable, or not with the code book, or
            `importance` has another length.
    """
    check_weight(weight)
    importance = _checked_importance(importance, weight)
    made = QuantizedWeight.empty(
        weight, bits=bits, group_size=group_size, symmetric=symmetric, code_book=code_book
    )
    if rounding.unsupported(weight) is None:
        ratios = clip_ratios(made)
        rounding.round_groups(
            weight, made, clip_ratios=ratios, refits=REFITS,
            integer_zero_points=integer_zero_points, importance=importance,
        )  # fmt: skip
    else:
        _round_in_torch(weight.detach(), made, importance, integer_zero_points)
    return made


def clip_ratios(made: QuantizedWeight) -> tuple[float, ...]:
    """The ratios that are tried for a weight of this form."""
    return CLIP_RATIOS[made.bits] if made.code_book is None else BOOK_RATIOS


def _checked_importance(importance: Tensor | None, weight: Tensor) -> Tensor | None:
    if importance is None:
        return None
    if importance.shape != weight.shape[1:]:
        raise OptionError(
            "importance",
            found=f"shape {list(importance.shape)}",
            needed=f"one value for each of the {weight.shape[1]} columns",
            remedy="Pass the mean square of each input of the layer.",
        )
    return importance.detach().to(weight.device, torch.float32)


def _round_in_torch(
    weight: Tensor, made: QuantizedWeight, importance: Tensor | None, whole: bool = False
) -> None:
    """Fill the memory of `made`."""
    rows = rows_of_block(weight.shape[1], SEARCH_BLOCK_ELEMENTS)
    for block, part in zip(weight.split(rows), made.split(rows), strict=True):
        _round_block(block.float(), part, importance, whole)


def _round_block(
    block: Tensor, made: QuantizedWeight, importance: Tensor | None, whole: bool
) -> None:
    groups = to_groups(block, made.group_size)  # [rows, groups, group_size]
    weights = _column_weights(block, made.group_size, importance)  # [1, groups, group_size]
    fit = _Fit(groups, weights, made.integer)
    low, high = groups.amin(-1), groups.amax(-1)
    for ratio in clip_ratios(made):
        if made.symmetric:
            extreme = torch.where(high > -low, high, low) * ratio
            fit.offer(*scales_from_extreme(extreme, made.integer))
        else:
            ends = low * ratio, high * ratio
            fit.offer(*scales_from_range(*ends, made.integer, integer_zero_points=whole))
    for _ in range(REFITS):
        if not fit.offer(*_refit(fit, made.symmetric, whole)):
            break
    made.fill(from_groups(fit.integers(), block.shape[1]), fit.scale, fit.zero_point)


class _Fit:
    """The best scale and zero point so far for each group."""

    def __init__(self, groups: Tensor, weights: Tensor, integer: IntegerType) -> None:
        self.groups, self.weights, self.integer = groups, weights, integer
        self.root = None if bool((weights == 1).all()) else weights.sqrt()
        self.exact, self.q = torch.empty_like(groups), torch.empty_like(groups)
        self.error = groups.new_full(groups.shape[:2], torch.inf)
        self.scale = self.zero_point = torch.empty(0)

    def offer(self, scale: Tensor, zero_point: Tensor) -> bool:
        """Take these where they give a smaller error; returns whether they do for any group."""
        # In units of the scale: the distance to the nearest level is found before it is scaled.
        reciprocal = scale.reciprocal()[..., None]
        torch.mul(self.groups, reciprocal, out=self.exact).add_(zero_point[..., None])
        distance = self.integer.nearest_(self.q.copy_(self.exact)).sub_(self.exact)
        if self.root is not None:
            distance.mul_(self.root)
        error = torch.linalg.vector_norm(distance, dim=-1).mul_(scale.abs())
        if not self.scale.numel():
            self.error, self.scale, self.zero_point = error, scale, zero_point
            return True
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale, self.scale)
        self.zero_point = torch.where(better, zero_point, self.zero_point)
        return bool(better.any())

    def integers(self) -> Tensor:
        """The nearest integers for the best scales, as floats [rows, groups, group_size]."""
        return quantize_affine(
            self.groups, self.scale[..., None], self.zero_point[..., None], self.integer
        )


def _refit(fit: _Fit, symmetric: bool, whole: bool) -> tuple[Tensor, Tensor]:
    """The least-squares scale and zero point for the integers; the scale stays if undefined.

    If zero points are `whole`, the scale is fitted once more to the rounded one.
    """
    groups, weights, q = fit.groups, fit.weights, fit.integers()
    if symmetric:
        return _refit_scale(fit, q, fit.zero_point), fit.zero_point
    total = weights.sum(-1)
    mean_q = (weights * q).sum(-1) / total
    mean_x = (weights * groups).sum(-1) / total
    scale = _refit_scale(fit, q, mean_q, LEAST_VARIANCE * total)
    zero_point = stored_zero_points(mean_q - mean_x / scale, fit.integer, whole)
    return (_refit_scale(fit, q, zero_point) if whole else scale), zero_point


def _refit_scale(fit: _Fit, q: Tensor, origin: Tensor, least: Tensor | float = 0.0) -> Tensor:
    """The least-squares scale for levels counted from `origin` [rows, groups].

    The scale stays where the levels' weighted sum of squares is not above `least`.
    """
    levels = q - origin[..., None]
    squares = (fit.weights * levels * levels).sum(-1)
    fitted = (fit.weights * levels * fit.groups).sum(-1) / squares
    usable = (squares > least) & torch.isfinite(fitted) & (fitted != 0)
    fitted = torch.where(usable, fitted, fit.scale)
    return safe_scale(fitted.to(SCALE_DTYPE).float())


def _column_weights(block: Tensor, group_size: int, importance: Tensor | None) -> Tensor:
    columns = torch.ones_like(block[:1]) if importance is None else importance[None]
    mask = group_mask(block.shape[1], group_size).to(block.device)
    weights = to_groups(columns, group_size) * mask
    # A layer no token reached, or a dead group: every column counts alike.
    dead = ~(weights.sum(-1, keepdim=True) > 0)
    return torch.where(dead, mask, weights)
