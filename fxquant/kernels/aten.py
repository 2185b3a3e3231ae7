"""The INT4 op of torch itself, `aten._weight_int4pack_mm_for_cpu`.

It is fast with bfloat16 activations only (fifty times slower with float32), so activations go
through bfloat16. It computes w = (q − 8) · scale + zero with a bfloat16 zero; what that rounds off
is added by a small product over group sums.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.kernels.interface import LinearSpec
from fxquant.numerics.grouping import group_count
from fxquant.numerics.packing import unpack_nibbles
from fxquant.numerics.weights import SYMMETRIC_ZERO_POINT, Int4Weight

GROUP_SIZES = (32, 64, 128, 256)
ROWS = 16  # the op takes multiples of this


class AtenBackend:
    """Pads rows and columns to what the op takes."""

    name = "aten"

    def unsupported(self, spec: LinearSpec, device: torch.device) -> str | None:
        """The op is for CPUs, a few group sizes and float activations."""
        if device.type != "cpu":
            return f"it runs on CPUs, not on {device.type}"
        if spec.group_size not in GROUP_SIZES:
            return f"group_size is {spec.group_size}, not one of {GROUP_SIZES}"
        if spec.activation != "float":
            return "it takes float activations only"
        return None

    def pack(self, weight: Int4Weight, spec: LinearSpec) -> tuple[Tensor, ...]:
        """Packed integers, scales and zeros [groups, rows, 2], rounded-off zeros [rows, groups]."""
        rows = -(-spec.out_features // ROWS) * ROWS - spec.out_features
        columns = _padded_columns(spec) - spec.in_features
        q = unpack_nibbles(weight.packed, spec.in_features)
        q = F.pad(q, (0, columns, 0, rows)).to(torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
        scales = F.pad(weight.scales.float(), (0, 0, 0, rows))
        zero = F.pad(
            (SYMMETRIC_ZERO_POINT - weight.zero_points.float()) * weight.scales.float(),
            (0, 0, 0, rows),
        )
        grid = torch.stack((scales.bfloat16(), zero.bfloat16()), dim=-1).transpose(0, 1)
        if spec.symmetric:
            return packed, grid.contiguous()
        rest = (zero - zero.bfloat16().float())[: spec.out_features]
        return packed, grid.contiguous(), rest.bfloat16()

    def matmul(self, x: Tensor, tensors: tuple[Tensor, ...], spec: LinearSpec) -> Tensor:
        """Multiply through bfloat16 activations."""
        packed, grid, *rest = tensors
        rows = x.reshape(-1, spec.in_features).bfloat16()
        rows = F.pad(rows, (0, _padded_columns(spec) - spec.in_features)).contiguous()
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, spec.group_size, grid)
        y = y[:, : spec.out_features]
        if rest:
            sums = rows.unflatten(1, (-1, spec.group_size)).sum(-1)
            y = y + F.linear(sums, rest[0])
        return y.reshape(*x.shape[:-1], spec.out_features).to(x.dtype)


def _padded_columns(spec: LinearSpec) -> int:
    return group_count(spec.in_features, spec.group_size) * spec.group_size
