"""The class that holds a quantized matrix: each width in the layout of its kernel."""

import torch
from torch import Tensor

from fxquant.modules.linear import QuantizedLinear
from fxquant.modules.linear_int4 import QuantizedLinearInt4
from fxquant.modules.linear_int8 import QuantizedLinearInt8
from fxquant.modules.linear_intn import QuantizedLinearIntN
from fxquant.numerics.quantized_weight import QuantizedWeight


def linear_of(
    weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype = torch.float32
) -> QuantizedLinear:
    """The layer of a quantized matrix.

    Args:
        weight: of any width and group size.
        bias: float [out], or None.
        dtype: of the float layer's weight.
    """
    if weight.bits == QuantizedLinearInt4.bits:
        return QuantizedLinearInt4(weight, bias, weight_dtype=dtype)
    is_per_channel = weight.symmetric and weight.scales.shape[1] == 1
    if weight.bits == QuantizedLinearInt8.bits and is_per_channel:
        return QuantizedLinearInt8(weight, bias, weight_dtype=dtype)
    return QuantizedLinearIntN(weight, bias, weight_dtype=dtype)
