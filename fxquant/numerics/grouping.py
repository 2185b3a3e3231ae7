"""Cutting a weight into groups along its input dimension."""

import torch
import torch.nn.functional as F
from torch import Tensor


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
