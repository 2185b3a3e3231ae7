"""The layout that the C++ kernel reads: see `Weight` in csrc/linear.h.

Blocks of 64 outputs, cut into groups of inputs; a group holds its 64 scales, its 64 zero points
(asymmetric weights only) and its codes, so that a product reads one stream from end to end.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.kernels.interface import LinearSpec
from fxquant.numerics.grouping import group_count
from fxquant.numerics.weights import (
    SCALE_DTYPE,
    SYMMETRIC_ZERO_POINT,
    ZERO_POINT_DTYPE,
    Int4Weight,
)

BLOCK = 64  # outputs
STEP = 8  # inputs whose codes share 32 bits


def to_blocks(weight: Int4Weight) -> Tensor:
    """Rearrange a weight: uint8 [blocks, groups, bytes of a group], 4.125 or 4.25 bits a weight."""
    out_features, size = len(weight.packed), weight.group_size
    blocks, groups = group_count(out_features, BLOCK), group_count(weight.in_features, size)
    rows = blocks * BLOCK - out_features
    packed = F.pad(weight.packed, (0, groups * size // 2 - weight.packed.shape[1], 0, rows))
    lanes = _interleave(packed.view(torch.int32)).view(blocks, BLOCK, groups, size // STEP)
    parts = [_grid_to_blocks(weight.scales, SCALE_DTYPE, rows)]
    if not weight.symmetric:
        parts.append(_grid_to_blocks(weight.zero_points, ZERO_POINT_DTYPE, rows))
    codes = lanes.permute(0, 2, 3, 1).reshape(blocks, groups, -1).contiguous()
    parts.append(codes.view(torch.uint8))
    return torch.cat(parts, dim=-1)


def from_blocks(blocks: Tensor, spec: LinearSpec) -> Int4Weight:
    """Undo `to_blocks`."""
    scales = _grid_from_blocks(blocks, SCALE_DTYPE, 0, spec)
    zero_points = torch.full_like(scales, SYMMETRIC_ZERO_POINT)
    if not spec.symmetric:
        zero_points = _grid_from_blocks(blocks, ZERO_POINT_DTYPE, 2 * BLOCK, spec)
    codes = blocks[..., 2 * BLOCK * (1 if spec.symmetric else 2) :].contiguous()
    lanes = codes.view(torch.int32).unflatten(-1, (-1, BLOCK)).permute(0, 3, 1, 2)
    lanes = _separate(lanes.reshape(len(blocks) * BLOCK, -1).contiguous())
    packed = lanes.view(torch.uint8)[: spec.out_features, : -(-spec.in_features // 2)].contiguous()
    return Int4Weight(
        packed, scales, zero_points, spec.group_size, spec.in_features, spec.symmetric
    )


def spec_of_blocks(
    blocks: Tensor, in_features: int, out_features: int, int8_activations: bool
) -> LinearSpec:
    """What `to_blocks` was given: a group has 128 bytes of scales and 32 for each input."""
    size = int(blocks.shape[2])  # a tracer fixes it
    symmetric = size % (4 * BLOCK) != 0
    group_size = (size - 2 * BLOCK * (1 if symmetric else 2)) // (BLOCK // 2)
    activation = "int8" if int8_activations else "float"
    return LinearSpec(out_features, in_features, group_size, symmetric, activation)


def _grid_to_blocks(values: Tensor, dtype: torch.dtype, rows: int) -> Tensor:
    grid = F.pad(values, (0, 0, 0, rows)).to(dtype).unflatten(0, (-1, BLOCK)).transpose(1, 2)
    return grid.contiguous().view(torch.uint8)


def _grid_from_blocks(blocks: Tensor, dtype: torch.dtype, start: int, spec: LinearSpec) -> Tensor:
    values = blocks[..., start : start + 2 * BLOCK].contiguous().view(dtype)
    return values.transpose(1, 2).flatten(0, 1)[: spec.out_features].float().contiguous()


def _interleave(lanes: Tensor) -> Tensor:
    """Nibbles 01234567 to 04152637 in each int32: four inputs low, the next four high."""
    return _swap(_swap(lanes, 8, 0x0000FF00), 4, 0x00F000F0)


def _separate(lanes: Tensor) -> Tensor:
    """Undo `_interleave`."""
    return _swap(_swap(lanes, 4, 0x00F000F0), 8, 0x0000FF00)


def _swap(lanes: Tensor, distance: int, mask: int) -> Tensor:
    """Exchange the bits under `mask` with those `distance` higher."""
    difference = (lanes ^ (lanes >> distance)) & mask
    return lanes ^ difference ^ (difference << distance)
