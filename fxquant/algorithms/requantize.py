"""A quantized weight that was changed a little: rounded again, in the form it has.

Where the change is small beside the step between two levels, the old scales serve best: a level
moves only where the change carries the weight past the middle to the next one, so that no element
is farther from the changed weight than before. Where it is large, scales of its own do. Each group
gets the better of the two.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.algorithms.rtn import round_to_nearest
from fxquant.numerics.grouping import expand_groups
from fxquant.numerics.integers import quantize_affine
from fxquant.numerics.quantized_weight import QuantizedWeight, rows_of_block
from fxquant.numerics.weights import quantize_weight_int8


def requantize(weight: Tensor, like: QuantizedWeight) -> QuantizedWeight:
    """Round a weight that is near a quantized one, with the bits, groups and symmetry of that.

    Args:
        weight: float32 [out, in].
        like: the quantized weight [out, in] before the change. Whole zero points stay whole.

    Returns:
        The integers with their scales and zero points, on memory of their own. The squared error
        of no group is larger than that of `like`.

    Raises:
        WeightError: the weight is not a finite matrix.
    """
    is_int8 = like.bits == 8 and like.symmetric and like.scales.shape[1] == 1
    if is_int8:  # as such layers have it: without -128
        fresh, lowest = quantize_weight_int8(weight), 1
    else:
        whole = bool((like.zero_points == like.zero_points.round()).all())
        fresh, lowest = round_to_nearest(
            weight, bits=like.bits, group_size=like.group_size, symmetric=like.symmetric,
            integer_zero_points=whole and not like.symmetric, code_book=like.code_book,
        ), 0  # fmt: skip
    rows = rows_of_block(like.in_features)
    blocks = zip(weight.split(rows), like.split(rows), fresh.split(rows), strict=True)
    for block, old, new in blocks:
        new.copy_(_better(block, _on_grid_of(block, old, lowest), new))
    return fresh


def _on_grid_of(block: Tensor, old: QuantizedWeight, lowest: int) -> QuantizedWeight:
    """The nearest integers from `lowest` on with the scales and zero points of `old`."""
    size, columns = min(old.group_size, old.in_features), old.in_features
    scales, zeros = (expand_groups(t.float(), size, columns) for t in (old.scales, old.zero_points))
    q = quantize_affine(block, scales, zeros, old.integer).clamp_(min=lowest)
    return old.with_integers(q, old.scales, old.zero_points)


def _better(block: Tensor, kept: QuantizedWeight, new: QuantizedWeight) -> QuantizedWeight:
    """Each group of the one that is nearer to `block`."""
    size, columns = min(kept.group_size, kept.in_features), kept.in_features
    is_kept = _squared_error(block, kept, size) <= _squared_error(block, new, size)
    columns_kept = expand_groups(is_kept, size, columns)
    return kept.with_integers(
        torch.where(columns_kept, kept.integers(), new.integers()),
        torch.where(is_kept, kept.scales, new.scales),
        torch.where(is_kept, kept.zero_points, new.zero_points),
    )


def _squared_error(block: Tensor, quantized: QuantizedWeight, size: int) -> Tensor:
    """Of each group, [rows, groups]."""
    error = block - quantized.values()
    return F.pad(error, (0, -block.shape[1] % size)).unflatten(1, (-1, size)).square().sum(-1)
