"""The reference: what every backend must compute."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.kernels.interface import LinearSpec, check_input
from fxquant.numerics.grouping import activation_group
from fxquant.numerics.integers import INT8
from fxquant.numerics.quantized_weight import QuantizedWeight

LEAST_SCALE = torch.finfo(torch.float32).tiny  # a smaller one has no finite reciprocal


class ReferenceBackend:
    """Unpacks the weight at each call: slow, and right on every device and shape."""

    name = "reference"

    def unsupported(self, spec: LinearSpec, device: torch.device) -> str | None:
        """Nothing is unsupported."""
        return None

    def pack(self, weight: QuantizedWeight, spec: LinearSpec) -> tuple[Tensor, ...]:
        """The saved layout itself."""
        return weight.to_saved()

    def unpack(self, tensors: tuple[Tensor, ...], spec: LinearSpec) -> QuantizedWeight:
        """The saved layout itself."""
        packed, scales, zero_points = tensors
        return spec.weight(packed, scales.float(), zero_points.float())

    def rows(
        self, tensors: tuple[Tensor, ...], spec: LinearSpec, places: Tensor
    ) -> QuantizedWeight:
        """Picks rows of the saved layout."""
        packed, scales, zero_points = (tensor[places] for tensor in tensors)
        return self.unpack((packed, scales, zero_points), spec)

    def matmul(
        self,
        x: Tensor,
        tensors: tuple[Tensor, ...],
        spec: LinearSpec,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Multiply in float32 with the dequantized weight; gradients flow to `x`."""
        check_input(x, spec.in_features, spec.bits)
        weight = self.unpack(tensors, spec).dequantize()
        values = x.float()
        if spec.activation == "int8":
            size = activation_group(spec.group_size, spec.in_features)
            values = quantize_tokens(values, size)
        return F.linear(values, weight, None if bias is None else bias.float()).to(x.dtype)


REFERENCE = ReferenceBackend()


def quantize_tokens(x: Tensor, group_size: int) -> Tensor:
    """Round `x` [..., in] to int8 on the fly, one symmetric scale a token and group: max |x| / 127.

    A token with NaN or Inf in a group has NaN there. Gradients pass as if nothing was rounded.

    Returns:
        The rounded values as floats, the shape of `x`.
    """
    missing = -x.shape[-1] % group_size
    groups = F.pad(x.detach(), (0, missing)).unflatten(-1, (-1, group_size))
    scale = (groups.abs().amax(-1, keepdim=True) / INT8.quant_max).clamp_min(LEAST_SCALE)
    rounded = ((groups * scale.reciprocal()).round() * scale).flatten(-2)[..., : x.shape[-1]]
    return x + (rounded - x).detach() if x.requires_grad else rounded
