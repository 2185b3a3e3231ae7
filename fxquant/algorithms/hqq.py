"""HQQ: half-quadratic quantization, which needs no data.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023: instead of
squared error, ‖W − Ŵ‖ₚ with p < 1 is minimised, which lets few weights be far off for the sake of
all others. In turns, the few are taken out by a shrinkage operator, and each group's zero point (of
symmetric weights the scale) is fitted to the rest.
"""

import torch
from torch import Tensor

from fxquant.algorithms.rtn import SEARCH_BLOCK_ELEMENTS
from fxquant.numerics.grouping import from_groups, group_mask, to_groups
from fxquant.numerics.integers import (
    IntegerType,
    dequantize_affine,
    quantize_affine,
    safe_scale,
)
from fxquant.numerics.quantized_weight import (
    SCALE_DTYPE,
    QuantizedWeight,
    rows_of_block,
)
from fxquant.numerics.weights import calculate_scale_zp_groupwise, stored_zero_points

NORM = 0.7  # p
STRENGTH = 10.0  # of the first shrinkage; a multiple of the inverse group magnitude
GROWTH = 1.01
ITERATIONS = 20


def half_quadratic(
    weight: Tensor,
    *,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    integer_zero_points: bool = False,
    code_book: str | None = None,
) -> QuantizedWeight:
    """Quantize a weight robustly against outliers.

    Args:
        weight: floating point [out, in].
        bits: of an integer.
        group_size: columns a group; the last group may be short. Without groups (-1, one for a
            whole row) the method is known to fail on models: use smaller ones.
        symmetric: one fixed zero point, or one for each group.
        integer_zero_points: these are whole numbers, 0 .. 2 ** bits - 1, not fractions.
        code_book: a name of `numerics.code_books.CODE_BOOKS`, or None for integers.

    Returns:
        The integers with their scales and zero points.

    Raises:
        WeightError: the weight is not a finite matrix.
        OptionError: `group_size` or `bits` is not usable, or not with the code book.
    """
    scales, zero_points = calculate_scale_zp_groupwise(
        weight, group_size, symmetric, bits=bits, integer_zero_points=integer_zero_points,
        code_book=code_book,
    )  # fmt: skip
    whole = integer_zero_points
    made = QuantizedWeight.empty(
        weight, bits=bits, group_size=group_size, symmetric=symmetric, code_book=code_book
    )
    group_size, integer = made.group_size, made.integer
    rows = rows_of_block(weight.shape[1], SEARCH_BLOCK_ELEMENTS)
    counts = group_mask(weight.shape[1], group_size)
    parts = [
        _solve(to_groups(block.float(), group_size), counts, scale, zero, symmetric, integer, whole)
        for block, scale, zero in zip(
            weight.detach().split(rows), scales.split(rows), zero_points.split(rows), strict=True
        )
    ]
    q, scales, zero_points = (torch.cat(part) for part in zip(*parts, strict=True))
    made.fill(from_groups(q, weight.shape[1]), scales, zero_points)
    return made


def _solve(
    groups: Tensor,
    counts: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    symmetric: bool,
    integer: IntegerType,
    whole: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Integers [rows, groups, size] and the grid [rows, groups] of a block of rows.

    `counts` [groups, size] is 1 for elements and 0 where a short group was filled up.
    """
    # In units of the group's step, so that the strength does not depend on the weight's unit.
    unit = scale.abs()[..., None]
    best_error = torch.full_like(scale, torch.inf)
    best_scale, best_zero = scale, zero_point
    strength = STRENGTH
    for _ in range(ITERATIONS):
        q = quantize_affine(groups, scale[..., None], zero_point[..., None], integer)
        residual = (groups - dequantize_affine(q, scale[..., None], zero_point[..., None])) / unit
        error = (residual.abs().pow(NORM) * counts).sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero_point, best_zero)
        rest = groups - _shrink(residual, strength) * unit  # without the few that are far off
        if symmetric:
            levels = (q - integer.middle) * counts
            fitted = (levels * rest).sum(-1) / levels.square().sum(-1)
            fitted = torch.where(torch.isfinite(fitted), fitted, scale)
            scale = safe_scale(fitted.to(SCALE_DTYPE).float())
        else:
            fitted = ((q - rest / scale[..., None]) * counts).sum(-1) / counts.sum(-1)
            zero_point = stored_zero_points(fitted, integer, whole)
        strength *= GROWTH
    q = quantize_affine(groups, best_scale[..., None], best_zero[..., None], integer)
    return q, best_scale, best_zero


def _shrink(x: Tensor, strength: float) -> Tensor:
    """The generalized soft threshold: what minimises |y|ᵖ + strength · (x − y)² / 2 over y."""
    magnitude = x.abs()
    pull = magnitude.clamp(min=1e-8).pow(NORM - 1) / strength
    return torch.sign(x) * (magnitude - pull).clamp(min=0)
