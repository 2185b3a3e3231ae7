"""Layers quantized by rounding to nearest, made once and kept."""

from torch import nn

from fxquant.algorithms.rtn import round_to_nearest
from fxquant.modules.linear import QuantizedLinear
from fxquant.modules.linear_int4 import QuantizedLinearInt4
from fxquant.modules.linear_int8 import QuantizedLinearInt8


class RoundedLayers:
    """Makes quantized layers; the same layer and width give the same object.

    Args:
        group_size: weights that share a scale; narrower layers get INT8 instead of INT4.
        symmetric: one fixed zero point, or one for each group.
    """

    def __init__(self, group_size: int, symmetric: bool) -> None:
        self.group_size, self.symmetric = group_size, symmetric
        self._made: dict[tuple[str, int], QuantizedLinear] = {}

    def quantize(self, name: str, linear: nn.Linear, bits: int) -> QuantizedLinear:
        """The layer called `name` in `bits` bits."""
        if (name, bits) not in self._made:
            self._made[name, bits] = self._quantize(linear, bits)
        return self._made[name, bits]

    def _quantize(self, linear: nn.Linear, bits: int) -> QuantizedLinear:
        if bits == QuantizedLinearInt8.bits or linear.in_features < self.group_size:
            return QuantizedLinearInt8.from_float(linear)
        weight = round_to_nearest(
            linear.weight.detach(), group_size=self.group_size, symmetric=self.symmetric
        )
        return QuantizedLinearInt4(weight, linear.bias)
