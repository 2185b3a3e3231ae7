"""What the format that a model will be exported to asks of a layer that is being made."""

from torch import Tensor, nn

from fxquant.config.quant_config import QuantConfig
from fxquant.config.targets import TARGETS
from fxquant.modules.linear_int8 import QuantizedLinearInt8
from fxquant.numerics.quantized_weight import QuantizedWeight
from fxquant.numerics.weights import quantize_weight_int8, with_exact_scales


def exact_in_target(
    made: QuantizedWeight, linear: nn.Linear, config: QuantConfig
) -> QuantizedWeight:
    """`made`, which approximates the weight of `linear`, with scales that the format stores."""
    if config.target is None:
        return made
    dtype = TARGETS[config.target].stored_dtype(linear.weight.dtype)
    return with_exact_scales(made, linear.weight, dtype)


def int8_layer(linear: nn.Linear, config: QuantConfig) -> QuantizedLinearInt8:
    """The layer in 8 bits, one scale a row."""
    weight = exact_in_target(quantize_weight_int8(linear.weight.detach()), linear, config)
    return QuantizedLinearInt8(weight, linear.bias, weight_dtype=linear.weight.dtype)


def bias_in_target(bias: Tensor | None, linear: nn.Linear, config: QuantConfig) -> Tensor | None:
    """The corrected `bias`, unless the model's class has no place for one and the format needs it.

    Without a target, a graph and a swapped model hold every bias.
    """
    is_new = linear.bias is None and config.target is not None
    return None if is_new and not TARGETS[str(config.target)].adds_biases else bias
