"""Layers fitted to the inputs they see: GPTQ toward the float output, with corrected biases."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.algorithms.gptq import corrected_bias, gptq
from fxquant.algorithms.refine import refine
from fxquant.algorithms.rtn import round_to_nearest
from fxquant.algorithms.target import best_shrinkage
from fxquant.config.quant_config import QuantConfig
from fxquant.modules.linear import QuantizedLinear
from fxquant.modules.linear_int4 import linear_of
from fxquant.numerics.quantized_weight import (
    QuantizedWeight,
    is_per_channel,
    rows_of_block,
)
from fxquant.observers.moments import LayerMoments
from fxquant.passes.decide import Decision, add_notes
from fxquant.passes.target_limits import bias_in_target, exact_in_target, int8_layer

FITTED_ELEMENTS = 1 << 22  # of a weight that are fitted at once, with some temporaries of the size


class FittedLayers:
    """Makes quantized layers from weights and the moments of their inputs.

    Args:
        config: how layers are quantized.
        refined: whether integers and scales are then refined in turns.
    """

    def __init__(self, config: QuantConfig, *, refined: bool = False) -> None:
        self.config, self.refined = config, refined
        self.unreached: set[str] = set()
        self.rounded: set[str] = set()
        self.scarce: dict[str, str] = {}

    def quantize(
        self, name: str, linear: nn.Linear, bits: int, moments: LayerMoments
    ) -> QuantizedLinear:
        """The layer called `name` in `bits` bits."""
        if not moments.tokens:
            self.unreached.add(name)
        if is_per_channel(bits, self.config.group_size, linear.in_features):
            return int8_layer(linear, self.config)
        weight = exact_in_target(self._fitted(linear, bits, moments), linear, self.config)
        bias = corrected_bias(linear.weight, weight.dequantize(), linear.bias, moments)
        fitted = weight, bias_in_target(bias, linear, self.config)
        if moments.held_tokens and moments.tokens:
            plain = self._rounded(linear, bits, moments)
            if _held_error(linear, *plain, moments) < _held_error(linear, *fitted, moments):
                self.rounded.add(name)
                fitted = plain
            elif moments.tokens < linear.in_features:
                self.scarce[name] = (
                    f"{moments.tokens} tokens for {linear.in_features} inputs; still better than "
                    f"rounding on {moments.held_tokens} tokens held out"
                )
        return linear_of(*fitted)

    def _fitted(self, linear: nn.Linear, bits: int, moments: LayerMoments) -> QuantizedWeight:
        """The weight fitted to the inputs, some outputs at a time: each is on its own."""
        form = self.config.form
        made = QuantizedWeight.empty(
            linear.weight, bits=bits, group_size=form["group_size"], symmetric=form["symmetric"]
        )
        shrinkage = best_shrinkage(moments)
        rows = rows_of_block(linear.in_features, FITTED_ELEMENTS)
        for number, part in enumerate(made.split(rows)):
            outputs = slice(number * rows, number * rows + len(part.packed))
            target = linear.weight[outputs].detach().float()
            if shrinkage is not None:
                target = shrinkage.applied(target, moments, outputs)
            weight = gptq(target, moments, bits=bits, **form)
            if self.refined:
                whole = form["integer_zero_points"]
                weight = refine(target, weight, moments, integer_zero_points=whole)
            part.copy_(weight)
        return made

    def _rounded(
        self, linear: nn.Linear, bits: int, moments: LayerMoments
    ) -> tuple[QuantizedWeight, Any]:
        """The layer as `rtn` makes it, which learns less from the data."""
        weight = round_to_nearest(
            linear.weight, bits=bits, **self.config.form, importance=moments.importance
        )
        weight = exact_in_target(weight, linear, self.config)
        lost = (linear.weight.detach().double() - weight.dequantize().double()) @ (
            moments.total / moments.tokens
        )
        base = 0 if linear.bias is None else linear.bias.detach().double()
        bias = (base + lost).to(linear.weight.dtype)
        return weight, bias_in_target(bias, linear, self.config)

    def explain(self, decisions: Iterable[Decision]) -> list[Decision]:
        """The decisions, with a word on layers that were rounded in another way than was asked."""
        notes = dict.fromkeys(self.unreached, "no calibration token reached it: rounded to nearest")
        worse = "gptq was worse on tokens that were held out: rounded to nearest"
        return add_notes(decisions, notes | dict.fromkeys(self.rounded, worse) | self.scarce)


def _held_error(
    linear: nn.Linear, weight: QuantizedWeight, bias: Tensor | None, moments: LayerMoments
) -> float:
    base = torch.zeros(linear.out_features) if linear.bias is None else linear.bias.detach()
    offset = torch.zeros_like(base) if bias is None else bias - base
    return moments.held_error(linear.weight, weight.dequantize(), offset)
