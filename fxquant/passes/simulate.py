"""What quantized layers will hold and see, computed without making them."""

from torch import Tensor

from fxquant.config.quant_config import DYNAMIC
from fxquant.kernels.reference import quantize_tokens
from fxquant.modules.activation import (
    channel_grid,
    dequantize_activation,
    finer_by,
    quantize_activation,
)
from fxquant.numerics.int8_weight import quantize_weight_int8
from fxquant.numerics.weights import dequantize_weight_int4, quantize_weight_int4
from fxquant.observers import create_observer


class SimulatedWeights:
    """Rounds weights to nearest over the full range: quick, and near what other methods give.

    Args:
        group_size: weights that share a scale; narrower ones get INT8 instead of INT4.
        symmetric: one fixed zero point, or one for each group.
    """

    def __init__(self, group_size: int, symmetric: bool) -> None:
        self.group_size, self.symmetric = group_size, symmetric

    def __call__(self, weight: Tensor, bits: int) -> Tensor:
        """The rounded weight, float32 [out, in]."""
        columns = weight.shape[1]
        if bits == 8 or columns < self.group_size:
            return quantize_weight_int8(weight).dequantize()
        parts = quantize_weight_int4(weight, self.group_size, self.symmetric)
        return dequantize_weight_int4(*parts, self.group_size, columns)


class SimulatedActivations:
    """Rounds a layer's input to 8 bits.

    Args:
        observer: a name that `create_observer` knows, or `"dynamic"`.
        group_size: of dynamic ranges.
    """

    def __init__(self, observer: str, group_size: int) -> None:
        self.observer, self.group_size = observer, group_size

    def __call__(self, x: Tensor) -> Tensor:
        """The rounded input, the shape of `x`."""
        if self.observer == DYNAMIC:
            return quantize_tokens(x, self.group_size)
        observer = create_observer(self.observer)
        observer(x)
        ends = x.amin(0), x.amax(0)
        grid = channel_grid(*ends, *observer.clipping_range(finer_by(*ends)))
        return dequantize_activation(quantize_activation(x, *grid), *grid, x)
