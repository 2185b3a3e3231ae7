"""Cutting a weight into groups along its input dimension."""

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_ACTIVATION_GROUP = 256
ACTIVATION_GROUP = 128  # of weights with one group a row


def group_count(in_features: int, group_size: int) -> int:
    """How many groups cover `in_features` columns; the last one may be short."""
    return -(-in_features // group_size)


def to_groups(matrix: Tensor, group_size: int) -> Tensor:
    """View `matrix` [rows, columns] as [rows, groups, group_size].

    A short last group is filled with copies of its last column, which leaves its minimum and
    maximum as they are.
    """
    rows, columns = matrix.shape
    groups = group_count(columns, group_size)
    missing = groups * group_size - columns
    if missing:
        filled = F.pad(matrix[None], (0, missing), mode="replicate")[0]
        return filled.view(rows, groups, group_size)
    return matrix.reshape(rows, groups, group_size)


def from_groups(groups: Tensor, columns: int) -> Tensor:
    """Undo `to_groups`: [rows, groups, group_size] back to [rows, columns]."""
    return groups.flatten(1)[:, :columns]


def group_mask(columns: int, group_size: int) -> Tensor:
    """Where `to_groups` has elements of the matrix: 1.0, else 0.0; [groups, group_size]."""
    groups = group_count(columns, group_size)
    return (torch.arange(groups * group_size) < columns).float().view(groups, group_size)


def expand_groups(values: Tensor, group_size: int, columns: int) -> Tensor:
    """Repeat one value a group [rows, groups] for every column: [rows, columns]."""
    return values.repeat_interleave(group_size, dim=1)[:, :columns]


def activation_group(group_size: int, in_features: int) -> int:
    """Inputs of a token that share a scale, where activations are rounded on the fly.

    They are those of a group of the weight. A larger group is cut into equal parts, the largest of
    256, 128, 64 and 32 that fit; a group that holds all of many inputs into parts of 128.

    >>> activation_group(64, 512), activation_group(768, 3072), activation_group(3072, 3072)
    (64, 256, 128)
    """
    if min(group_size, in_features) <= LARGEST_ACTIVATION_GROUP:
        return group_size
    if group_size >= in_features:
        return ACTIVATION_GROUP
    sizes = (LARGEST_ACTIVATION_GROUP, ACTIVATION_GROUP, 64, 32)
    return next((size for size in sizes if group_size % size == 0), group_size)
