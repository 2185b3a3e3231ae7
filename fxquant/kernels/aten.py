"""The INT4 op of torch itself, `aten._weight_int4pack_mm_for_cpu`.

It is fast with bfloat16 activations only (fifty times slower with float32), so activations go
through bfloat16. It computes w = (q − 8) · scale + zero with a bfloat16 zero; what that rounds off
is added by a small product over group sums. On activations whose mean is two standard deviations,
group size 128, that is worth 44 -> 51 dB against float64 (symmetric weights have 52 dB).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.kernels.gradient import checked_product
from fxquant.kernels.interface import LinearSpec
from fxquant.numerics.grouping import group_count
from fxquant.numerics.integers import unsigned
from fxquant.numerics.quantized_weight import ZERO_POINT_DTYPE, QuantizedWeight

GROUP_SIZES = (32, 64, 128, 256)
ROW_MULTIPLE = 16  # the op takes multiples of this
INT4_BITS = 4
ZERO_POINT = unsigned(INT4_BITS).middle


class AtenBackend:
    """Pads rows and columns to what the op takes."""

    name = "aten"

    def unsupported(self, spec: LinearSpec, device: torch.device) -> str | None:
        """The op is for CPUs, a few group sizes and float activations."""
        if device.type != "cpu":
            return f"it runs on CPUs, not on {device.type}"
        if spec.bits != INT4_BITS:
            return f"the weight has {spec.bits} bits, not {INT4_BITS}"
        if spec.code_book is not None:
            return f"the weight has the levels of {spec.code_book}, not integers"
        if spec.group_size not in GROUP_SIZES:
            return f"group_size is {spec.group_size}, not one of {GROUP_SIZES}"
        if spec.activation != "float":
            return "it takes float activations only"
        return None

    def pack(self, weight: QuantizedWeight, spec: LinearSpec) -> tuple[Tensor, ...]:
        """The op's own layout: packed integers, then the grid [groups, rows, (scale, zero)].

        Asymmetric weights add the rounded-off zeros, bfloat16 [out, groups], and the zero points,
        float16 [out, groups], which only `unpack` reads.
        """
        rows = _padded_rows(spec) - spec.out_features
        columns = _padded_columns(spec) - spec.in_features
        q = weight.integers()
        q = F.pad(q, (0, columns, 0, rows)).to(torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
        scales = weight.scales.float()
        zero = (ZERO_POINT - weight.zero_points.float()) * scales
        grid = F.pad(torch.stack((scales, zero), dim=-1), (0, 0, 0, 0, 0, rows))
        grid = grid.bfloat16().transpose(0, 1).contiguous()
        if spec.symmetric:
            return packed, grid
        rest = (zero - zero.bfloat16().float()).bfloat16()
        return packed, grid, rest, weight.zero_points.to(ZERO_POINT_DTYPE)

    def unpack(self, tensors: tuple[Tensor, ...], spec: LinearSpec) -> QuantizedWeight:
        """Read the integers back through the op itself, whose layout depends on the CPU."""
        packed, grid, *asymmetric = tensors
        identity = torch.zeros_like(grid)
        identity[..., 0], identity[..., 1] = 1, ZERO_POINT  # the op's w is q itself
        columns = torch.arange(_padded_columns(spec))
        pairs = torch.zeros(len(columns) // 2, len(columns), dtype=torch.bfloat16)
        pairs[columns // 2, columns] = torch.tensor([1.0, 16.0], dtype=torch.bfloat16).repeat(
            len(columns) // 2
        )  # low nibble + 16 · high nibble is a byte, and bfloat16 has room for one
        product = torch.ops.aten._weight_int4pack_mm_for_cpu(
            pairs, packed, spec.group_size, identity
        )
        data = product[: -(-spec.in_features // 2), : spec.out_features].T.to(torch.uint8)
        scales = grid[:, : spec.out_features, 0].T.float()
        zero_points = torch.full_like(scales, ZERO_POINT)
        if asymmetric:
            zero_points = asymmetric[1].float()
        return spec.weight(data.contiguous(), scales.contiguous(), zero_points)

    def rows(
        self, tensors: tuple[Tensor, ...], spec: LinearSpec, places: Tensor
    ) -> QuantizedWeight:
        """Picks rows after unpacking all: nobody but the op knows where a row lies."""
        return self.unpack(tensors, spec).rows(places)

    def matmul(
        self,
        x: Tensor,
        tensors: tuple[Tensor, ...],
        spec: LinearSpec,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Multiply through bfloat16 activations; a gradient does not change the bits."""
        return checked_product(self, x, tensors, spec, bias)

    def product(
        self, x: Tensor, tensors: tuple[Tensor, ...], spec: LinearSpec, bias: Tensor | None
    ) -> Tensor:
        """The product without a gradient."""
        packed, grid, *asymmetric = tensors
        rows = x.reshape(-1, spec.in_features).bfloat16()
        rows = F.pad(rows, (0, _padded_columns(spec) - spec.in_features)).contiguous()
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, spec.group_size, grid)
        y = y[:, : spec.out_features]
        if asymmetric:
            sums = rows.unflatten(1, (-1, spec.group_size)).sum(-1)
            y = y + F.linear(sums, asymmetric[0])
        y = y.reshape(*x.shape[:-1], spec.out_features).to(x.dtype)
        return y if bias is None else y + bias.to(y.dtype)


def _padded_rows(spec: LinearSpec) -> int:
    return group_count(spec.out_features, ROW_MULTIPLE) * ROW_MULTIPLE


def _padded_columns(spec: LinearSpec) -> int:
    return group_count(spec.in_features, spec.group_size) * spec.group_size
