"""One quantized layer as plain integers: what every format is written from."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.modules.linear import QuantizedLinear
from fxquant.modules.linear_int4 import QuantizedLinearInt4
from fxquant.modules.linear_int8 import QuantizedLinearInt8
from fxquant.numerics.packing import unpack_nibbles

INT8_ZERO_POINT = 128.0


@dataclass(frozen=True)
class IntegerLayer:
    """A weight x ≈ scale · (q − zero_point), with unsigned integers whatever its width.

    Attributes:
        q: uint8 [out, in], values 0..2^bits − 1.
        scales: float32 [out, groups], of either sign.
        zero_points: float32 [out, groups].
        group_size: columns a group; all of them where a row has one scale.
        bits: of an integer.
        symmetric: whether every zero point is 2^(bits − 1).
        bias: float [out] or None.
    """

    q: Tensor
    scales: Tensor
    zero_points: Tensor
    group_size: int
    bits: int
    symmetric: bool
    bias: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        return self.q.shape[0], self.q.shape[1]

    @property
    def is_per_row(self) -> bool:
        """Whether a row has one scale."""
        return self.group_size >= self.shape[1]


def integer_layer(layer: QuantizedLinear) -> IntegerLayer | None:
    """The integers of `layer`, on the CPU; None for a class of layer that no format knows."""
    bias = None if layer.bias is None else layer.bias.detach().cpu()
    if isinstance(layer, QuantizedLinearInt4):
        weight = layer.int4_weight
        q = unpack_nibbles(weight.packed.cpu(), weight.in_features)
        grid = weight.scales.cpu(), weight.zero_points.cpu()
        return IntegerLayer(q, *grid, weight.group_size, 4, weight.symmetric, bias)
    if isinstance(layer, QuantizedLinearInt8):
        q = (layer._weight_int8.cpu().to(torch.int16) + int(INT8_ZERO_POINT)).to(torch.uint8)
        scales = layer._scales.cpu().float()[:, None]
        zero_points = torch.full_like(scales, INT8_ZERO_POINT)
        return IntegerLayer(q, scales, zero_points, q.shape[1], 8, True, bias)
    return None
