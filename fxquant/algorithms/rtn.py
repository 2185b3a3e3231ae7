"""Rounding to nearest, with a clip search: the range that minimises each group's squared error.

A few ranges are tried for every group, most of them shrunken; then the scale (and zero point) of
the best one is refitted by least squares to the integers it gave, as long as that helps. Never
worse than the full range, because that is the first candidate.

Where the C++ extension was built, it does this, in the same steps and many times faster.
"""

import torch
from torch import Tensor

from fxquant.errors import OptionError, check_positive_int
from fxquant.kernels import rounding
from fxquant.numerics.grouping import from_groups, group_mask, to_groups
from fxquant.numerics.integers import UINT4, quantize_affine, safe_scale
from fxquant.numerics.packing import pack_nibbles
from fxquant.numerics.weights import (
    SCALE_DTYPE,
    SYMMETRIC_ZERO_POINT,
    ZERO_POINT_DTYPE,
    Int4Weight,
    check_weight,
    empty_int4,
    rows_of_block,
    scales_from_extreme,
    scales_from_range,
)

# Of the full range. Widening helps small symmetric groups, whose other end has a level to spare.
SHRINKS = (1.0, 1.06, 0.95, 0.9, 0.85, 0.8, 0.72, 0.64)
REFITS = 8  # nearly always fewer are needed
BLOCK_ELEMENTS = 1 << 19  # of a block of rows: its temporaries stay in the cache


def round_to_nearest(
    weight: Tensor,
    *,
    group_size: int = 128,
    symmetric: bool = True,
    importance: Tensor | None = None,
) -> Int4Weight:
    """Quantize a weight to INT4 by rounding, with the best range for each group.

    Args:
        weight: floating point [out, in].
        group_size: columns a group; the last group may be short.
        symmetric: one fixed zero point (8), or one for each group.
        importance: [in], how much a column's squared error counts: the mean square of the layer's
            input. All columns count alike without it.

    Returns:
        The integers with their scales and zero points.

    Raises:
        WeightError: the weight is not a finite matrix.
        OptionError: `group_size` is not positive, or `importance` has another length.
    """
    check_positive_int("group_size", group_size)
    check_weight(weight)
    importance = _checked_importance(importance, weight)
    if rounding.unsupported(weight) is None:
        result = rounding.round_groups(
            weight, group_size, symmetric, shrinks=SHRINKS, refits=REFITS, importance=importance
        )
    else:
        result = _round_in_torch(weight.detach(), group_size, symmetric, importance)
    return Int4Weight(*result, group_size, weight.shape[1], symmetric)


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
    weight: Tensor, group_size: int, symmetric: bool, importance: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    result = empty_int4(weight, group_size)
    rows = rows_of_block(weight.shape[1], BLOCK_ELEMENTS)
    for block, *parts in zip(weight.split(rows), *(t.split(rows) for t in result), strict=True):
        q, *grid = _round_block(block.float(), group_size, symmetric, importance)
        for part, values in zip(parts, (pack_nibbles(q), *grid), strict=True):
            part.copy_(values)
    return result


def _round_block(
    block: Tensor, group_size: int, symmetric: bool, importance: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    groups = to_groups(block, group_size)  # [rows, groups, group_size]
    weights = _column_weights(block, group_size, importance)  # [1, groups, group_size]
    fit = _Fit(groups, weights)
    low, high = groups.amin(-1), groups.amax(-1)
    for shrink in SHRINKS:
        if symmetric:
            fit.offer(*scales_from_extreme(torch.where(high > -low, high, low) * shrink))
        else:
            fit.offer(*scales_from_range(low * shrink, high * shrink))
    for _ in range(REFITS):
        if not fit.offer(*_refit(groups, fit.integers(), weights, fit.scale, symmetric)):
            break
    return from_groups(fit.integers(), block.shape[1]).to(torch.uint8), fit.scale, fit.zero_point


class _Fit:
    """The best grid so far for each group."""

    def __init__(self, groups: Tensor, weights: Tensor) -> None:
        self.groups = groups
        self.root = None if bool((weights == 1).all()) else weights.sqrt()
        self.exact, self.q = torch.empty_like(groups), torch.empty_like(groups)
        self.error = groups.new_full(groups.shape[:2], torch.inf)
        self.scale = self.zero_point = torch.empty(0)

    def offer(self, scale: Tensor, zero_point: Tensor) -> bool:
        """Keep this grid where it has the smaller error; whether it has anywhere."""
        # In steps of the grid: the distance to the nearest level is found before it is scaled.
        reciprocal = scale.reciprocal()[..., None]
        torch.mul(self.groups, reciprocal, out=self.exact).add_(zero_point[..., None])
        torch.round(self.exact, out=self.q).clamp_(UINT4.quant_min, UINT4.quant_max)
        distance = self.q.sub_(self.exact)
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
        """The nearest integers on the best grid, as floats [rows, groups, group_size]."""
        return quantize_affine(
            self.groups, self.scale[..., None], self.zero_point[..., None], UINT4
        )


def _refit(
    groups: Tensor, q: Tensor, weights: Tensor, scale: Tensor, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """The least-squares scale and zero point for given integers; `scale` where it is undefined."""
    if symmetric:
        levels = q - SYMMETRIC_ZERO_POINT
        fitted = (weights * levels * groups).sum(-1) / (weights * levels * levels).sum(-1)
        fitted = torch.where(torch.isfinite(fitted) & (fitted != 0), fitted, scale)
        fitted = safe_scale(fitted.to(SCALE_DTYPE).float())
        return fitted, torch.full_like(fitted, SYMMETRIC_ZERO_POINT)
    total = weights.sum(-1)
    mean_q = (weights * q).sum(-1) / total
    mean_x = (weights * groups).sum(-1) / total
    centred = weights * (q - mean_q[..., None])
    fitted = (centred * groups).sum(-1) / (centred * q).sum(-1)
    fitted = torch.where(torch.isfinite(fitted) & (fitted != 0), fitted, scale)
    fitted = safe_scale(fitted.to(SCALE_DTYPE).float())
    zero_point = (mean_q - mean_x / fitted).clamp(-1024, 1024)
    return fitted, zero_point.to(ZERO_POINT_DTYPE).float()


def _column_weights(block: Tensor, group_size: int, importance: Tensor | None) -> Tensor:
    columns = torch.ones_like(block[:1]) if importance is None else importance[None]
    mask = group_mask(block.shape[1], group_size).to(block.device)
    weights = to_groups(columns, group_size) * mask
    # A layer no token reached, or a dead group: every column counts alike.
    dead = ~(weights.sum(-1, keepdim=True) > 0)
    return torch.where(dead, mask, weights)
