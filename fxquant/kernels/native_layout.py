"""The layout that the C++ kernel reads: see `Weight` in csrc/linear.h.

Blocks of 64 outputs, cut into groups of inputs; a group holds its 64 scales, its 64 zero points
(asymmetric weights only) and its codes (see `code_fields`), so that a product reads one stream from
end to end.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.kernels.code_fields import BYTES, from_words, to_words, unit_inputs
from fxquant.kernels.eager import is_plain
from fxquant.kernels.interface import LinearSpec
from fxquant.kernels.large_pages import empty_bytes
from fxquant.numerics.grouping import activation_group, group_count
from fxquant.numerics.packing import pack_codes, packed_columns
from fxquant.numerics.quantized_weight import (
    SCALE_DTYPE,
    ZERO_POINT_DTYPE,
    QuantizedWeight,
    rows_of_block,
)

BLOCK = 64  # outputs
LARGEST_GROUP = 256  # inputs
NIBBLE = 4  # bits: the width with a way of its own, which never leaves the packed bytes
BLOCKS_ELEMENTS = 1 << 22  # of blocks that are rearranged together


def kernel_group(group_size: int, in_features: int, bits: int) -> int | None:
    """Inputs of a group in the layout; None where the layout cannot have such groups.

    Groups larger than the kernel's are cut into groups with the same scale, and a group that holds
    all inputs ends where they end, but for the rest of a unit.

    >>> kernel_group(64, 512, bits=3), kernel_group(20, 40, bits=4), kernel_group(999, 999, bits=8)
    (64, None, 128)
    """
    size, unit = activation_group(group_size, in_features), unit_inputs(bits)
    if size >= in_features:
        size = group_count(in_features, unit) * unit
    return None if size % unit or size > LARGEST_GROUP else size


def to_blocks(weight: QuantizedWeight) -> Tensor:
    """Rearrange a weight: uint8 [blocks, groups, bytes of a group].

    A weight takes its bits, and 0.125 (0.25 with zero points) for groups of 128.
    """
    size = _group_of(weight.group_size, weight.in_features, weight.bits)
    groups = group_count(weight.in_features, size)
    grid_bytes = 2 * BLOCK * (1 if weight.symmetric else 2)
    count = group_count(len(weight.packed), BLOCK)
    shape = (count, groups, grid_bytes + size * BLOCK * weight.bits // 8)
    packed = weight.packed
    blocks = empty_bytes(shape) if is_plain(packed) else packed.new_empty(shape)
    rows = _blocks_at_once(groups * size) * BLOCK
    for part, some in zip(blocks.split(rows // BLOCK), weight.split(rows), strict=True):
        _write_blocks(part, some, size)
    return blocks


def from_blocks(blocks: Tensor, spec: LinearSpec) -> QuantizedWeight:
    """Undo `to_blocks`."""
    out_features, in_features, bits = spec.out_features, spec.in_features, spec.bits
    packed = blocks.new_empty(out_features, packed_columns(in_features, bits))
    groups = group_count(in_features, spec.group_size)
    scales = blocks.new_empty(out_features, groups, dtype=torch.float32)
    weight = spec.weight(packed, scales, torch.full_like(scales, spec.middle))
    size = _group_of(spec.group_size, in_features, bits)
    count = _blocks_at_once(blocks.shape[1] * size)
    for part, some in zip(blocks.split(count), weight.split(count * BLOCK), strict=True):
        _read_blocks(part, some)
    return weight


def rows_of_blocks(blocks: Tensor, spec: LinearSpec, places: Tensor) -> QuantizedWeight:
    """Some rows of what `from_blocks` gives, without reading the others.

    Args:
        blocks: from `to_blocks`.
        spec: what `to_blocks` was given.
        places: whole numbers [n] in 0..out - 1.
    """
    in_features, bits, block, lane = spec.in_features, spec.bits, places // BLOCK, places % BLOCK
    first = _first_groups(blocks, spec.group_size, in_features, bits)
    scales = blocks.view(SCALE_DTYPE)[block, :, lane][:, first].float()
    zero_points, start = torch.full_like(scales, spec.middle), 2 * BLOCK
    if not spec.symmetric:
        zero_points = blocks.view(ZERO_POINT_DTYPE)[block, :, lane + BLOCK][:, first].float()
        start *= 2
    codes = blocks.view(torch.int32)[..., start // 4 :].unflatten(-1, (-1, BLOCK))
    packed = _packed_rows(codes[block, :, :, lane].flatten(1), in_features, bits)
    return spec.weight(packed, scales, zero_points)


def _first_groups(blocks: Tensor, group_size: int, in_features: int, bits: int) -> slice:
    """The layout's first group of each of the weight's."""
    count = 1 if group_size >= in_features else blocks.shape[1]
    return slice(0, count, max(1, group_size // _group_of(group_size, in_features, bits)))


def _group_of(group_size: int, in_features: int, bits: int) -> int:
    size = kernel_group(group_size, in_features, bits)
    assert size is not None  # a backend asks before it packs
    return size


def group_size_of(blocks: Tensor, bits: int, symmetric: bool) -> int:
    """Inputs of a group of the layout: its scales take 128 bytes, its zero points as many."""
    size = int(blocks.shape[2])  # a tracer fixes it
    return (size - 2 * BLOCK * (1 if symmetric else 2)) * 8 // (BLOCK * bits)


def _blocks_at_once(columns: int) -> int:
    """So many that what is made in between stays in the cache."""
    return rows_of_block(BLOCK * columns, BLOCKS_ELEMENTS)


def _write_blocks(blocks: Tensor, weight: QuantizedWeight, size: int) -> None:
    count, groups, _ = blocks.shape
    rows = count * BLOCK - len(weight.packed)
    of_group = _group_numbers(groups, size, weight.group_size)
    _write_grid(blocks[..., : 2 * BLOCK], weight.scales[:, of_group], SCALE_DTYPE, rows)
    start = 2 * BLOCK
    if not weight.symmetric:
        zero_points = weight.zero_points[:, of_group]
        _write_grid(blocks[..., start : 2 * start], zero_points, ZERO_POINT_DTYPE, rows)
        start *= 2
    if weight.bits == NIBBLE:
        columns = groups * size // 2 - weight.packed.shape[1]
        lanes = F.pad(weight.packed, (0, columns, 0, rows)).contiguous().view(torch.int32)
        words = _interleave(lanes).view(count, BLOCK, groups, -1)
    else:
        q = F.pad(weight.integers(), (0, groups * size - weight.in_features, 0, rows))
        words = to_words(q.view(count, BLOCK, groups, size), weight.bits).flatten(-3, -2)
        words = words.contiguous().view(torch.int32)[..., 0]
    codes = blocks.view(torch.int32)[..., start // 4 :].unflatten(-1, (-1, BLOCK))
    codes.copy_(words.permute(0, 2, 3, 1))


def _read_blocks(blocks: Tensor, weight: QuantizedWeight) -> None:
    first = _first_groups(blocks, weight.group_size, weight.in_features, weight.bits)
    _read_grid(weight.scales, blocks[:, first, : 2 * BLOCK], SCALE_DTYPE)
    start = 2 * BLOCK
    if not weight.symmetric:
        _read_grid(weight.zero_points, blocks[:, first, start : 2 * start], ZERO_POINT_DTYPE)
        start *= 2
    codes = blocks.view(torch.int32)[..., start // 4 :].unflatten(-1, (-1, BLOCK))
    lanes = codes.permute(0, 3, 1, 2).reshape(len(blocks) * BLOCK, -1)
    lanes = lanes.clone(memory_format=torch.contiguous_format)  # one column has any stride
    rows = len(weight.packed)
    weight.packed.copy_(_packed_rows(lanes[:rows], weight.in_features, weight.bits))


def _packed_rows(lanes: Tensor, in_features: int, bits: int) -> Tensor:
    """The packed rows, uint8 [rows, bytes], of their lanes int32 [rows, words], which change."""
    if bits == NIBBLE:
        return _separate(lanes).view(torch.uint8)[:, : packed_columns(in_features, bits)]
    unit_words = unit_inputs(bits) * bits // 32
    words = lanes.view(torch.uint8).unflatten(1, (-1, unit_words, BYTES))
    return pack_codes(from_words(words, bits)[:, :in_features], bits)


def _group_numbers(groups: int, size: int, group_size: int) -> Tensor:
    """The weight's group of each of the layout's."""
    return torch.arange(groups) * size // group_size


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
