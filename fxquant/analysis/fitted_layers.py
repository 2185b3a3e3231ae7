"""Layers fitted to the inputs they see: GPTQ toward the float output, with corrected biases."""

from collections.abc import Iterable

from torch import nn

from fxquant.algorithms.gptq import corrected_bias, gptq
from fxquant.algorithms.moments import LayerMoments
from fxquant.algorithms.refine import refine
from fxquant.algorithms.target import float_target
from fxquant.modules.linear import QuantizedLinear
from fxquant.modules.linear_int4 import QuantizedLinearInt4
from fxquant.modules.linear_int8 import QuantizedLinearInt8
from fxquant.passes.decide import Decision, add_notes


class FittedLayers:
    """Makes quantized layers from weights and the moments of their inputs.

    Args:
        group_size: weights that share a scale; narrower layers get INT8 instead of INT4.
        symmetric: one fixed zero point, or one for each group.
        refined: whether integers and scales are then refined in turns.
    """

    def __init__(self, group_size: int, symmetric: bool, *, refined: bool = False) -> None:
        self.group_size, self.symmetric, self.refined = group_size, symmetric, refined
        self.unreached: set[str] = set()

    def quantize(
        self, name: str, linear: nn.Linear, bits: int, moments: LayerMoments
    ) -> QuantizedLinear:
        """The layer called `name` in `bits` bits."""
        if not moments.tokens:
            self.unreached.add(name)
        if bits == QuantizedLinearInt8.bits or linear.in_features < self.group_size:
            return QuantizedLinearInt8.from_float(linear)
        target = float_target(linear.weight, moments)
        weight = gptq(target, moments, group_size=self.group_size, symmetric=self.symmetric)
        if self.refined:
            weight = refine(target, weight, moments)
        bias = corrected_bias(linear.weight, weight.dequantize(), linear.bias, moments)
        return QuantizedLinearInt4(weight, bias)

    def explain(self, decisions: Iterable[Decision]) -> list[Decision]:
        """The ledger, with a word on layers that no calibration token reached."""
        why = "no calibration token reached it: rounded to nearest"
        return add_notes(decisions, dict.fromkeys(self.unreached, why))
