"""Weights by rounding to nearest over the full range of each group.

See `quantized_weight` for what a quantized weight is.
"""

from dataclasses import replace

import torch
from torch import Tensor

from fxquant.errors import WeightError, check_type
from fxquant.numerics.code_books import integer_type
from fxquant.numerics.grouping import from_groups, to_groups
from fxquant.numerics.integers import (
    INT8,
    UINT4,
    UINT8,
    IntegerType,
    quantize_affine,
    safe_scale,
)
from fxquant.numerics.quantized_weight import (
    SCALE_DTYPE,
    ZERO_POINT_DTYPE,
    QuantizedWeight,
    check_symmetric,
    resolved_group_size,
    rows_of_block,
)

# The most half ranges that a range may be away from zero. Then zero points are at most 60 at 4 bits
# and 1020 at 8, which float16 rounds by up to 1/64 and 1/4 of a level.
FARTHEST = 8.0
MOST_ZERO_POINT = 1024.0  # that a fit may give: beyond, float16 has no fractions


def check_weight(weight: Tensor, where: str = "weight") -> None:
    """Raise a `WeightError` unless `weight` is a dense, finite floating-point matrix."""
    check_type(where, weight, Tensor, "Pass the weight of a Linear layer.", WeightError)
    if weight.ndim != 2 or not weight.is_floating_point() or 0 in weight.shape:
        raise WeightError(
            where,
            found=f"{weight.dtype} of shape {list(weight.shape)}",
            needed="a floating-point matrix [out, in] that is not empty",
            remedy="Pass the weight of a Linear layer.",
        )
    if weight.is_meta or weight.layout is not torch.strided:
        raise WeightError(
            where,
            found="a tensor on the meta device" if weight.is_meta else f"{weight.layout}",
            needed="a dense matrix with values",
            remedy="Load the values first, or make it dense with to_dense().",
        )
    # A finite sum has finite terms, and needs no boolean copy; an infinite one may have them too.
    if not torch.isfinite(weight.sum(dtype=torch.float32)):
        bad = int((~torch.isfinite(weight)).sum())
        if not bad:
            return
        raise WeightError(
            where,
            found=f"{bad} of {weight.numel()} elements NaN or Inf",
            needed="finite weights",
            remedy="Repair the checkpoint, or leave this layer float with modules_to_not_convert.",
        )


def scales_from_extreme(extreme: Tensor, integer: IntegerType = UINT4) -> tuple[Tensor, Tensor]:
    """Symmetric scales and zero points, float32, that map `extreme` values to the lowest level."""
    zero_point = integer.middle
    lowest = integer.quant_min - zero_point
    scale = safe_scale((extreme.float() / lowest).to(SCALE_DTYPE).float())
    return scale, torch.full_like(scale, zero_point)


def scales_from_range(
    low: Tensor,
    high: Tensor,
    integer: IntegerType = UINT4,
    *,
    integer_zero_points: bool = False,
) -> tuple[Tensor, Tensor]:
    """Asymmetric scales and zero points, float32, for the ranges `low`..`high` (same shapes).

    A range much narrower than its distance from zero is widened to include zero: its zero point
    would be too far away for float16. With `integer_zero_points`, every range is.
    """
    low, high = low.float(), high.float()
    # Half the extent is a float32 even if the extent, of weights near 3e38, is none.
    half = high / 2 - low / 2
    far = torch.maximum(low.abs(), high.abs()) > half * FARTHEST
    far |= integer_zero_points
    low = torch.where(far, low.clamp(max=0), low)
    high = torch.where(far, high.clamp(min=0), high)
    half = high / 2 - low / 2
    scale = safe_scale((half / (integer.quant_max / 2)).to(SCALE_DTYPE).float())
    return scale, stored_zero_points(0 - low / scale, integer, integer_zero_points)


def stored_zero_points(zero_points: Tensor, integer: IntegerType, whole: bool) -> Tensor:
    """The nearest zero points that can be stored, float32: levels if `whole`, else in float16."""
    if whole:
        return zero_points.round().clamp(integer.quant_min, integer.quant_max) + 0.0  # never -0.0
    farthest = MOST_ZERO_POINT
    return zero_points.clamp(-farthest, farthest).to(ZERO_POINT_DTYPE).float()


def calculate_scale_zp_groupwise(
    weight: Tensor,
    group_size: int = 128,
    symmetric: bool = True,
    *,
    bits: int = 4,
    integer_zero_points: bool = False,
    code_book: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Scales and zero points that cover each group's full range.

    Args:
        weight: floating point [out, in].
        group_size: columns a group; the last group may be short. -1: one group a row.
        symmetric: one fixed zero point, 2 ** (bits - 1), and signed scales, or a zero point for
            each group.
        bits: of an integer.
        integer_zero_points: zero points are whole numbers, 0 .. 2 ** bits - 1.
        code_book: a name of `code_books.CODE_BOOKS`, or None for integers.

    Returns:
        `(scales, zero_points)`, each float32 [out, ceil(in / group_size)] and exactly
        representable in the stored formats (bfloat16 and float16).

    Raises:
        WeightError: the weight is not a finite matrix.
        OptionError: `group_size` or `bits` is not usable, or not with the code book.
    """
    integer = integer_type(bits, code_book)
    check_symmetric(code_book, symmetric)
    check_weight(weight)
    group_size = resolved_group_size(group_size, weight.shape[1])
    groups = to_groups(weight, min(group_size, weight.shape[1]))
    return _full_range(groups, symmetric, integer, integer_zero_points)


def _full_range(
    groups: Tensor, symmetric: bool, integer: IntegerType, integer_zero_points: bool
) -> tuple[Tensor, Tensor]:
    """Scales and zero points of groups [rows, groups, group_size]."""
    low, high = groups.amin(-1), groups.amax(-1)
    if symmetric:
        return scales_from_extreme(torch.where(high > -low, high, low), integer)
    return scales_from_range(low, high, integer, integer_zero_points=integer_zero_points)


def quantize_weight(
    weight: Tensor,
    bits: int,
    group_size: int = 128,
    symmetric: bool = True,
    *,
    integer_zero_points: bool = False,
    code_book: str | None = None,
) -> QuantizedWeight:
    """Quantize a weight by rounding to nearest over the full range of each group.

    Args:
        weight: floating point [out, in].
        bits: of an integer: 2, 3, 4, 5, 6 or 8.
        group_size: columns a group, along `in`; the last group may be short. -1: one group a row.
        symmetric: one fixed zero point, 2 ** (bits - 1), and signed scales, or a zero point for
            each group.
        integer_zero_points: zero points are whole numbers, 0 .. 2 ** bits - 1.
        code_book: a name of `code_books.CODE_BOOKS`, or None for integers.

    Raises:
        WeightError: the weight is not a finite matrix.
        OptionError: `group_size` or `bits` is not usable, or not with the code book.
    """
    integer = integer_type(bits, code_book)
    check_weight(weight)
    weight = weight.detach()
    made = QuantizedWeight.empty(
        weight, bits=bits, group_size=group_size, symmetric=symmetric, code_book=code_book
    )
    rows = rows_of_block(weight.shape[1])
    for block, part in zip(weight.split(rows), made.split(rows), strict=True):
        groups = to_groups(block, min(made.group_size, made.in_features))
        scales, zeros = _full_range(groups, symmetric, integer, integer_zero_points)
        q = quantize_affine(groups.float(), scales[..., None], zeros[..., None], integer)
        part.fill(from_groups(q, block.shape[1]), scales, zeros)
    return made


def with_exact_scales(made: QuantizedWeight, weight: Tensor, dtype: torch.dtype) -> QuantizedWeight:
    """`made` with scales that are the same numbers in `dtype`, if they are in its range.

    Args:
        made: a quantized `weight`.
        weight: floating point [out, in].
        dtype: in which another format stores scales.

    Returns:
        `made` itself if its scales are exact. Otherwise rows with a scale that is too fine (smaller
        than 2⁻¹⁷ in float16) are rounded again, on the nearest such scales.
    """
    stored = made.scales.to(dtype).float()
    finest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the first above 0
    stored = torch.where(stored == 0, made.scales.sign() * finest, stored)
    stored = torch.where(torch.isfinite(stored), stored, made.scales)
    changed = (stored != made.scales).any(1)
    if not changed.any():
        return made
    groups = to_groups(weight.detach()[changed].float(), min(made.group_size, made.in_features))
    scales, zeros = stored[changed], made.zero_points[changed]
    q = quantize_affine(groups, scales[..., None], zeros[..., None], made.integer)
    packed = made.packed.clone()
    packed[changed] = made.with_integers(from_groups(q, made.in_features), scales, zeros).packed
    return replace(made, packed=packed, scales=stored)


def quantize_weight_int4(
    weight: Tensor, group_size: int = 128, symmetric: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a weight to packed group-wise INT4 by rounding to nearest over the full range.

    Args:
        weight: floating point [out, in].
        group_size: columns a group, along `in`; the last group may be short. -1: one group a row.
        symmetric: one fixed zero point (8) and signed scales, or a zero point for each group.

    Returns:
        `(packed, scales, zero_points)`: uint8 [out, ceil(in / 2)], low nibble first, and two
        float32 [out, ceil(in / group_size)].

    Raises:
        WeightError: the weight is not a finite matrix.
        OptionError: `group_size` is neither positive nor -1.
    """
    made = quantize_weight(weight, UINT4.bits, group_size, symmetric)
    return made.packed, made.scales, made.zero_points


def dequantize_weight_int4(
    packed: Tensor, scales: Tensor, zero_points: Tensor, group_size: int, in_features: int
) -> Tensor:
    """The float32 weight [out, in] of packed INT4.

    Args:
        packed: uint8 [out, ceil(in / 2)].
        scales: [out, ceil(in / group_size)].
        zero_points: the same shape.
        group_size: columns a group; -1: one group a row.
        in_features: the number of columns.

    Raises:
        OptionError: the shapes do not belong together.
    """
    group_size = resolved_group_size(group_size, in_features)
    grid = scales, zero_points
    return QuantizedWeight(packed, *grid, group_size, in_features, False, UINT4.bits).dequantize()


def quantize_weight_int8(weight: Tensor) -> QuantizedWeight:
    """Round `weight` [out, in] to nearest, each row's largest magnitude on level 127 of -127..127.

    One group a row, with positive scales; the integers are stored plus 128, as all others.

    Raises:
        WeightError: the weight is not a finite matrix.
    """
    check_weight(weight)
    largest = weight.abs().amax(dim=1, keepdim=True).float()
    scales = safe_scale((largest / INT8.quant_max).to(SCALE_DTYPE).float())
    zeros = torch.full_like(scales, UINT8.middle)
    q = quantize_affine(weight.float(), scales, zeros, UINT8).to(torch.uint8)
    return QuantizedWeight.from_integers(
        q, scales, zeros, bits=INT8.bits, group_size=weight.shape[1], symmetric=True
    )
