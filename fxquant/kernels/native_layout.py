"""The layout that the C++ kernel reads: see `Weight` in csrc/linear.h.

Blocks of 64 outputs, cut into groups of inputs; a group holds its 64 scales, its 64 zero points
(asymmetric weights only) and its codes, so that a product reads one stream from end to end.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.kernels.interface import LinearSpec
from fxquant.numerics.grouping import group_count
from fxquant.numerics.quantized_weight import (
    SCALE_DTYPE,
    ZERO_POINT_DTYPE,
    QuantizedWeight,
    rows_of_block,
    symmetric_zero_point,
)

BLOCK = 64  # outputs
BITS = 4  # of an integer
BLOCKS_ELEMENTS = 1 << 22  # of blocks that are rearranged together


def to_blocks(weight: QuantizedWeight) -> Tensor:
    """Rearrange a weight: uint8 [blocks, groups, bytes of a group], 4.125 or 4.25 bits a weight."""
    groups = group_count(weight.in_features, weight.group_size)
    grid_bytes = 2 * BLOCK * (1 if weight.symmetric else 2)
    blocks = weight.packed.new_empty(
        group_count(len(weight.packed), BLOCK), groups, grid_bytes + weight.group_size * BLOCK // 2
    )
    rows = _blocks_at_once(groups * weight.group_size) * BLOCK
    for part, some in zip(blocks.split(rows // BLOCK), weight.split(rows), strict=True):
        _write_blocks(part, some)
    return blocks


def from_blocks(blocks: Tensor, spec: LinearSpec) -> QuantizedWeight:
    """Undo `to_blocks`."""
    size, groups = spec.in_features, blocks.shape[1]
    packed = blocks.new_empty(spec.out_features, -(-size // 2))
    scales = blocks.new_empty(spec.out_features, groups, dtype=torch.float32)
    zero_points = torch.full_like(scales, symmetric_zero_point(BITS))
    weight = QuantizedWeight(
        packed, scales, zero_points, spec.group_size, size, spec.symmetric, BITS
    )
    count = _blocks_at_once(groups * spec.group_size)
    for part, some in zip(blocks.split(count), weight.split(count * BLOCK), strict=True):
        _read_blocks(part, some)
    return weight


def _blocks_at_once(columns: int) -> int:
    """So many that what is made in between stays in the cache."""
    return rows_of_block(BLOCK * columns, BLOCKS_ELEMENTS)


def _write_blocks(blocks: Tensor, weight: QuantizedWeight) -> None:
    count, groups, _ = blocks.shape
    rows = count * BLOCK - len(weight.packed)
    _write_grid(blocks[..., : 2 * BLOCK], weight.scales, SCALE_DTYPE, rows)
    start = 2 * BLOCK
    if not weight.symmetric:
        _write_grid(blocks[..., start : 2 * start], weight.zero_points, ZERO_POINT_DTYPE, rows)
        start *= 2
    columns = groups * weight.group_size // 2 - weight.packed.shape[1]
    lanes = F.pad(weight.packed, (0, columns, 0, rows)).contiguous().view(torch.int32)
    codes = blocks.view(torch.int32)[..., start // 4 :].unflatten(-1, (-1, BLOCK))
    codes.copy_(_interleave(lanes).view(count, BLOCK, groups, -1).permute(0, 2, 3, 1))


def _read_blocks(blocks: Tensor, weight: QuantizedWeight) -> None:
    _read_grid(weight.scales, blocks[..., : 2 * BLOCK], SCALE_DTYPE)
    start = 2 * BLOCK
    if not weight.symmetric:
        _read_grid(weight.zero_points, blocks[..., start : 2 * start], ZERO_POINT_DTYPE)
        start *= 2
    codes = blocks.view(torch.int32)[..., start // 4 :].unflatten(-1, (-1, BLOCK))
    lanes = codes.permute(0, 3, 1, 2).reshape(len(blocks) * BLOCK, -1).contiguous()
    rows, columns = weight.packed.shape
    weight.packed.copy_(_separate(lanes).view(torch.uint8)[:rows, :columns])


def spec_of_blocks(
    blocks: Tensor, in_features: int, out_features: int, int8_activations: bool
) -> LinearSpec:
    """What `to_blocks` was given: a group has 128 bytes of scales and 32 for each input."""
    size = int(blocks.shape[2])  # a tracer fixes it
    symmetric = size % (4 * BLOCK) != 0
    group_size = (size - 2 * BLOCK * (1 if symmetric else 2)) // (BLOCK // 2)
    activation = "int8" if int8_activations else "float"
    return LinearSpec(out_features, in_features, group_size, symmetric, activation)


def _write_grid(blocks: Tensor, values: Tensor, dtype: torch.dtype, rows: int) -> None:
    grid = F.pad(values, (0, 0, 0, rows)).to(dtype).unflatten(0, (-1, BLOCK)).transpose(1, 2)
    blocks.copy_(grid.contiguous().view(torch.uint8))


def _read_grid(values: Tensor, blocks: Tensor, dtype: torch.dtype) -> None:
    grid = blocks.contiguous().view(dtype).transpose(1, 2).flatten(0, 1)
    values.copy_(grid[: len(values)])


def _interleave(lanes: Tensor) -> Tensor:
    """Nibbles 01234567 to 04152637 in each int32: four inputs low, the next four high."""
    return _swap(_swap(lanes, 8, 0x0000FF00), 4, 0x00F000F0)


def _separate(lanes: Tensor) -> Tensor:
    """Undo `_interleave`."""
    return _swap(_swap(lanes, 4, 0x00F000F0), 8, 0x0000FF00)


def _swap(lanes: Tensor, distance: int, mask: int) -> Tensor:
    """Exchange the bits under `mask` with those `distance` higher."""
    difference = lanes >> distance
    difference.bitwise_xor_(lanes).bitwise_and_(mask)
    return (lanes ^ difference).bitwise_xor_(difference << distance)
