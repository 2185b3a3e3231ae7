"""What the format that a model will be exported to asks of a layer that is being made."""

from torch import Tensor

from fxquant.config.quant_config import QuantConfig
from fxquant.config.targets import TARGETS
from fxquant.numerics.quantized_weight import QuantizedWeight
from fxquant.numerics.weights import quantize_weight_int8, with_exact_scales


def exact_in_target(made: QuantizedWeight, matrix: Tensor, config: QuantConfig) -> QuantizedWeight:
    """`made`, which approximates the float `matrix`, with scales that the format stores."""
    if config.target is None:
        return made
    dtype = TARGETS[config.target].stored_dtype(matrix.dtype)
    return with_exact_scales(made, matrix, dtype)


def int8_in_target(matrix: Tensor, config: QuantConfig) -> QuantizedWeight:
    """The float `matrix` in 8 bits, one scale a row."""
    return exact_in_target(quantize_weight_int8(matrix), matrix, config)


def bias_in_target(
    bias: Tensor | None, own: Tensor | None, config: QuantConfig, *, is_bare: bool = False
) -> Tensor | None:
    """The corrected `bias`, or the layer's `own` where nothing could hold another one.

    Args:
        bias: [out], or None.
        own: that of the float layer.
        config: its target may have no place for a new bias; without one, a graph and a quantized
            layer hold any.
        is_bare: whether the layer may have no other bias than its own (see `bare_layers`):
            that code adds what it always added.
    """
    has_place = config.target is None or TARGETS[config.target].adds_biases
    return own if is_bare or (own is None and not has_place) else bias
