"""Group-wise INT4 weights: the integers, scales and zero points of a matrix [out, in].

Values are x ≈ scale · (q − zero_point) with q in 0..15. Scales are stored in bfloat16 and zero
points in float16, so both are rounded to these formats before the integers are chosen: what is
stored is exactly what the integers were fitted to.

- symmetric: the zero point is 8 everywhere. The scale carries a sign, so that the element of
  largest magnitude in a group sits on the outermost level, -8: all 16 levels are used
  (llama.cpp's Q4_0 does the same).
- asymmetric: 16 levels from the smallest to the largest element. The zero point is not whole:
  a weight needs no exact zero, and on Gaussian weights that is worth 0.4 dB after a clip search.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.errors import OptionError, WeightError, check_positive_int
from fxquant.numerics.grouping import from_groups, group_count, to_groups
from fxquant.numerics.integers import UINT4, quantize_affine, safe_scale
from fxquant.numerics.packing import pack_nibbles, unpack_nibbles

SCALE_DTYPE = torch.bfloat16  # float32's range: no weight is too small for it
ZERO_POINT_DTYPE = torch.float16
SYMMETRIC_ZERO_POINT = 8.0
BLOCK_ELEMENTS = 1 << 20  # of a block of rows: its temporaries stay in the cache
FARTHEST_ZERO_POINT = 64.0  # beyond, float16 would round it by more than 1/32 of a level


def check_weight(weight: Tensor, where: str = "weight") -> None:
    """Raise a `WeightError` unless `weight` is a finite floating-point matrix."""
    if weight.ndim != 2 or not weight.is_floating_point() or 0 in weight.shape:
        raise WeightError(
            where,
            found=f"{weight.dtype} of shape {list(weight.shape)}",
            needed="a floating-point matrix [out, in] that is not empty",
            remedy="Pass the weight of a Linear layer.",
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


def scales_from_extreme(extreme: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric scales and zero points, float32, that map signed `extreme` values to level -8."""
    scale = safe_scale((extreme.float() / -SYMMETRIC_ZERO_POINT).to(SCALE_DTYPE).float())
    return scale, torch.full_like(scale, SYMMETRIC_ZERO_POINT)


def scales_from_range(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Asymmetric scales and zero points, float32, for the ranges `low`..`high` (same shapes).

    A range much narrower than its distance from zero is widened to include zero: its zero point
    would be too far away for float16.
    """
    low, high = low.float(), high.float()
    # Half the extent is a float32 even if the extent, of weights near 3e38, is none.
    half = high / 2 - low / 2
    far = torch.maximum(low.abs(), high.abs()) > half * (FARTHEST_ZERO_POINT / 8)
    low = torch.where(far, low.clamp(max=0), low)
    high = torch.where(far, high.clamp(min=0), high)
    half = high / 2 - low / 2
    scale = safe_scale((half / (UINT4.quant_max / 2)).to(SCALE_DTYPE).float())
    return scale, (0 - low / scale).to(ZERO_POINT_DTYPE).float()  # never -0.0


def calculate_scale_zp_groupwise(
    weight: Tensor, group_size: int = 128, symmetric: bool = True
) -> tuple[Tensor, Tensor]:
    """Scales and zero points that cover each group's full range.

    Args:
        weight: floating point [out, in].
        group_size: columns a group; the last group may be short.
        symmetric: one fixed zero point (8) and signed scales, or a zero point for each group.

    Returns:
        `(scales, zero_points)`, each float32 [out, ceil(in / group_size)] and exactly
        representable in the stored formats (bfloat16 and float16).

    Raises:
        WeightError: the weight is not a finite matrix.
        OptionError: `group_size` is not positive.
    """
    check_positive_int("group_size", group_size)
    check_weight(weight)
    return _full_range(to_groups(weight, group_size), symmetric)


def _full_range(groups: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales and zero points of groups [rows, groups, group_size]."""
    low, high = groups.amin(-1), groups.amax(-1)
    if symmetric:
        return scales_from_extreme(torch.where(high > -low, high, low))
    return scales_from_range(low, high)


def round_to_groups(weight: Tensor, scales: Tensor, zero_points: Tensor, group_size: int) -> Tensor:
    """The nearest integers, uint8 [out, in], for given `scales` and `zero_points` [out, groups]."""
    groups = to_groups(weight.float(), group_size)
    q = quantize_affine(groups, scales.float()[..., None], zero_points.float()[..., None], UINT4)
    return from_groups(q, weight.shape[1]).to(torch.uint8)


def quantize_weight_int4(
    weight: Tensor, group_size: int = 128, symmetric: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a weight to packed group-wise INT4 by rounding to nearest over the full range.

    Args:
        weight: floating point [out, in].
        group_size: columns a group, along `in`; the last group may be short.
        symmetric: one fixed zero point (8) and signed scales, or a zero point for each group.

    Returns:
        `(packed, scales, zero_points)`: uint8 [out, ceil(in / 2)], low nibble first, and two
        float32 [out, ceil(in / group_size)].

    Raises:
        WeightError: the weight is not a finite matrix.
        OptionError: `group_size` is not positive.
    """
    check_positive_int("group_size", group_size)
    check_weight(weight)
    weight = weight.detach()
    result = empty_int4(weight, group_size)
    rows = rows_of_block(weight.shape[1])
    for block, *parts in zip(weight.split(rows), *(t.split(rows) for t in result), strict=True):
        grid = _full_range(to_groups(block, group_size), symmetric)
        q = round_to_groups(block, *grid, group_size)
        for part, values in zip(parts, (pack_nibbles(q), *grid), strict=True):
            part.copy_(values)
    return result


def rows_of_block(columns: int, elements: int = BLOCK_ELEMENTS) -> int:
    """How many rows of a matrix to work on at a time, so that temporaries stay in the cache."""
    return max(1, elements // max(columns, 1))


def empty_int4(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the packed integers, scales and zero points of `weight` [out, in].

    Results are written there block by block: small blocks that stay would cut memory to pieces.
    """
    out_features, in_features = weight.shape
    packed = torch.empty(
        out_features, -(-in_features // 2), dtype=torch.uint8, device=weight.device
    )
    groups = group_count(in_features, group_size)
    scales, zero_points = torch.empty(
        2, out_features, groups, dtype=torch.float32, device=weight.device
    )
    return packed, scales, zero_points


def dequantize_weight_int4(
    packed: Tensor, scales: Tensor, zero_points: Tensor, group_size: int, in_features: int
) -> Tensor:
    """The float32 weight [out, in] of packed INT4.

    Args:
        packed: uint8 [out, ceil(in / 2)].
        scales: [out, ceil(in / group_size)].
        zero_points: the same shape.
        group_size: columns a group.
        in_features: the number of columns.

    Raises:
        OptionError: the shapes do not belong together.
    """
    check_positive_int("group_size", group_size)
    out_features = packed.shape[0]
    expected = [out_features, group_count(in_features, group_size)]
    shapes = [list(packed.shape), list(scales.shape), list(zero_points.shape)]
    if shapes != [[out_features, -(-in_features // 2)], expected, expected]:
        raise OptionError(
            "dequantize_weight_int4",
            found=f"packed, scales and zero_points of shapes {shapes}",
            needed=f"[out, {-(-in_features // 2)}] and twice {expected}",
            remedy="Pass the group_size and in_features the weight was quantized with.",
        )
    weight = torch.empty(out_features, in_features, dtype=torch.float32, device=packed.device)
    rows = rows_of_block(in_features)
    missing = expected[1] * group_size - in_features
    parts = (t.split(rows) for t in (weight, packed, scales.float(), zero_points.float()))
    for block, bytes_, scale, zero in zip(*parts, strict=True):
        q = F.pad(unpack_nibbles(bytes_, in_features), (0, missing))
        groups = torch.sub(q.unflatten(1, (-1, group_size)), zero[..., None])
        block.copy_(from_groups(groups.mul_(scale[..., None]), in_features))
    return weight


@dataclass(frozen=True)
class Int4Weight:
    """A quantized matrix: what every algorithm returns and `QuantizedLinearInt4` holds.

    Attributes:
        packed: uint8 [out, ceil(in / 2)], low nibble first.
        scales: float32 [out, groups], representable in bfloat16.
        zero_points: float32 [out, groups], representable in float16.
        group_size: columns a group.
        in_features: the number of columns.
        symmetric: whether every zero point is 8.
    """

    packed: Tensor
    scales: Tensor
    zero_points: Tensor
    group_size: int
    in_features: int
    symmetric: bool

    @classmethod
    def from_integers(
        cls, q: Tensor, scales: Tensor, zero_points: Tensor, group_size: int, symmetric: bool
    ) -> "Int4Weight":
        """Pack integers `q` uint8 [out, in] with their scales and zero points [out, groups]."""
        packed = pack_nibbles(q)
        return cls(packed, scales, zero_points, group_size, q.shape[1], symmetric)

    def split(self, rows: int) -> list["Int4Weight"]:
        """The weight in parts of `rows` rows, which share its memory; the last may be shorter."""
        return [
            replace(self, packed=packed, scales=scales, zero_points=zero_points)
            for packed, scales, zero_points in zip(
                self.packed.split(rows),
                self.scales.split(rows),
                self.zero_points.split(rows),
                strict=True,
            )
        ]

    def to_saved(self) -> tuple[Tensor, Tensor, Tensor]:
        """What a file holds, from which the fields come back exactly.

        Returns:
            `(packed, scales, zero_points)`: uint8 [out, ceil(in / 2)], bfloat16 [out, groups] and
            float16 [out, groups]; the zero points of symmetric weights share one element in memory.
        """
        zero_points = self.zero_points.detach()
        if self.symmetric:
            one = zero_points.new_full((1, 1), SYMMETRIC_ZERO_POINT)
            zero_points = one.to(ZERO_POINT_DTYPE).expand(self.scales.shape)
        else:
            zero_points = zero_points.to(ZERO_POINT_DTYPE).contiguous()
        scales = self.scales.detach().to(SCALE_DTYPE)
        return self.packed.contiguous(), scales.contiguous(), zero_points

    def dequantize(self) -> Tensor:
        """The float32 weight [out, in]."""
        return dequantize_weight_int4(
            self.packed, self.scales, self.zero_points, self.group_size, self.in_features
        )
