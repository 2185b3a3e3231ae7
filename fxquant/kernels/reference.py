"""The reference: what every backend must compute."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.kernels.interface import LinearSpec
from fxquant.numerics.grouping import from_groups, to_groups
from fxquant.numerics.integers import INT8, safe_scale
from fxquant.numerics.weights import Int4Weight, dequantize_weight_int4


class ReferenceBackend:
    """Unpacks the weight at each call: slow, and right on every device and shape."""

    name = "reference"

    def unsupported(self, spec: LinearSpec, device: torch.device) -> str | None:
        """Nothing is unsupported."""
        return None

    def pack(self, weight: Int4Weight, spec: LinearSpec) -> tuple[Tensor, ...]:
        """The saved layout itself."""
        return weight.packed, weight.scales, weight.zero_points

    def matmul(self, x: Tensor, tensors: tuple[Tensor, ...], spec: LinearSpec) -> Tensor:
        """Multiply in float32 with the dequantized weight."""
        packed, scales, zero_points = tensors
        weight = dequantize_weight_int4(
            packed, scales, zero_points, spec.group_size, spec.in_features
        )
        values = x.float()
        if spec.activation == "int8":
            values = quantize_tokens(values, spec.group_size)
        return F.linear(values, weight).to(x.dtype)


def quantize_tokens(x: Tensor, group_size: int) -> Tensor:
    """Round `x` [..., in] to int8 on the fly, one symmetric scale a token and group.

    Returns:
        The rounded values as floats, the shape of `x`.
    """
    groups = to_groups(x.reshape(-1, x.shape[-1]), group_size)  # [tokens, groups, group_size]
    scale = safe_scale(groups.abs().amax(-1, keepdim=True) / INT8.quant_max)
    rounded = (groups / scale).round() * scale
    return from_groups(rounded, x.shape[-1]).reshape(x.shape)
