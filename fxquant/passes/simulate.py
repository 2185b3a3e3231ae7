"""What quantized layers will hold and see, computed without making them."""

from torch import Tensor

from fxquant.config.quant_config import DYNAMIC, QuantConfig
from fxquant.kernels.reference import quantize_tokens
from fxquant.modules.activation import (
    channel_qparams,
    dequantize_activation,
    finer_by,
    quantize_activation,
)
from fxquant.numerics.grouping import activation_group
from fxquant.numerics.quantized_weight import is_per_channel, resolved_group_size
from fxquant.numerics.weights import quantize_weight, quantize_weight_int8
from fxquant.observers import create_observer


class SimulatedWeights:
    """Rounds weights to nearest over the full range: quick, and near what other methods give.

    Args:
        config: how layers will be quantized.
    """

    def __init__(self, config: QuantConfig) -> None:
        self.config = config

    def __call__(self, weight: Tensor, bits: int) -> Tensor:
        """The rounded weight, float32 [out, in]."""
        if is_per_channel(bits, self.config.group_size, weight.shape[1]):
            return quantize_weight_int8(weight).dequantize()
        return quantize_weight(weight, bits, **self.config.form(bits)).dequantize()


class SimulatedActivations:
    """Rounds a layer's input to 8 bits.

    Args:
        observer: a name that `create_observer` knows, or `"dynamic"`.
        group_size: of dynamic ranges; -1: one for each token.
    """

    def __init__(self, observer: str, group_size: int) -> None:
        self.observer, self.group_size = observer, group_size

    def __call__(self, x: Tensor) -> Tensor:
        """The rounded input, the shape of `x`."""
        if self.observer == DYNAMIC:
            group_size = resolved_group_size(self.group_size, x.shape[-1])
            return quantize_tokens(x, activation_group(group_size, x.shape[-1]))
        observer = create_observer(self.observer)
        observer(x)
        ends = x.amin(0), x.amax(0)
        grid = channel_qparams(*ends, *observer.clipping_range(finer_by(*ends)))
        return dequantize_activation(quantize_activation(x, *grid), *grid, x)
