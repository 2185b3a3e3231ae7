"""The INT8 op of torch itself, `aten._weight_int8pack_mm`, with one scale a row.

Activations go through bfloat16.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.kernels.gradient import checked_product
from fxquant.kernels.interface import LinearSpec
from fxquant.numerics.quantized_weight import SCALE_DTYPE, QuantizedWeight

INT8_BITS = 8
COLUMNS = 16  # torch 2.13's op reads beyond its input where columns are no multiple of this
_TOP_BIT = 0x80  # flips 0..255 to -128..127


class AtenInt8Backend:
    """Pads columns to what the op takes."""

    name = "aten_int8"

    def unsupported(self, spec: LinearSpec, device: torch.device) -> str | None:
        """The op is for CPUs, symmetric weights with a scale a row and float activations."""
        if device.type != "cpu":
            return f"it runs on CPUs, not on {device.type}"
        if spec.bits != INT8_BITS:
            return f"the weight has {spec.bits} bits, not {INT8_BITS}"
        if spec.group_size < spec.in_features or not spec.symmetric:
            return "it takes symmetric weights with one group a row only"
        if spec.activation != "float":
            return "it takes float activations only"
        return None

    def pack(self, weight: QuantizedWeight, spec: LinearSpec) -> tuple[Tensor, ...]:
        """The op's own layout: int8 [out, padded in] and bfloat16 [out]."""
        q = (weight.packed ^ _TOP_BIT).view(torch.int8)
        padded = F.pad(q, (0, -spec.in_features % COLUMNS)).contiguous()
        return padded, weight.scales.detach()[:, 0].to(SCALE_DTYPE).contiguous()

    def unpack(self, tensors: tuple[Tensor, ...], spec: LinearSpec) -> QuantizedWeight:
        """Leave the padding away."""
        q, scales = tensors[0][:, : spec.in_features].contiguous(), tensors[1].float()[:, None]
        packed = q.view(torch.uint8) ^ _TOP_BIT
        return spec.weight(packed, scales, torch.full_like(scales, spec.middle))

    def rows(
        self, tensors: tuple[Tensor, ...], spec: LinearSpec, places: Tensor
    ) -> QuantizedWeight:
        """Picks rows of the layout."""
        return self.unpack(tuple(tensor[places] for tensor in tensors), spec)

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
        q, scales = tensors
        rows = F.pad(x.reshape(-1, spec.in_features), (0, q.shape[1] - spec.in_features))
        y = torch.ops.aten._weight_int8pack_mm(rows.bfloat16().contiguous(), q, scales)
        y = y.reshape(*x.shape[:-1], spec.out_features).to(x.dtype)
        return y if bias is None else y + bias.to(y.dtype)
