"""Layers fitted to the inputs they see: GPTQ toward the float output, with corrected biases."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.algorithms.gptq import corrected_bias, gptq
from fxquant.algorithms.refine import refine
from fxquant.algorithms.rtn import round_to_nearest
from fxquant.algorithms.target import best_shrinkage
from fxquant.modules.linear import QuantizedLinear
from fxquant.modules.linear_int4 import linear_of
from fxquant.modules.linear_int8 import QuantizedLinearInt8
from fxquant.numerics.quantized_weight import (
    QuantizedWeight,
    is_per_channel,
    rows_of_block,
)
from fxquant.observers.moments import LayerMoments
from fxquant.passes.decide import Decision, add_notes

FITTED_ELEMENTS = 1 << 22  # of a weight that are fitted at once, with some temporaries of the size


class FittedLayers:
    """Makes quantized layers from weights and the moments of their inputs.

    Args:
        group_size: weights that share a scale, -1: all of a row; layers with fewer inputs get INT8.
        symmetric: one fixed zero point, or one for each group.
        refined: whether integers and scales are then refined in turns.
    """

    def __init__(self, group_size: int, symmetric: bool, *, refined: bool = False) -> None:
        self.group_size, self.symmetric, self.refined = group_size, symmetric, refined
        self.unreached: set[str] = set()
        self.rounded: set[str] = set()
        self.scarce: dict[str, str] = {}

    def quantize(
        self, name: str, linear: nn.Linear, bits: int, moments: LayerMoments
    ) -> QuantizedLinear:
        """The layer called `name` in `bits` bits."""
        if not moments.tokens:
            self.unreached.add(name)
        if is_per_channel(bits, self.group_size, linear.in_features):
            return QuantizedLinearInt8.from_float(linear)
        weight = self._fitted(linear, bits, moments)
        fitted = weight, corrected_bias(linear.weight, weight.dequantize(), linear.bias, moments)
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
        grid: dict[str, Any] = {
            "bits": bits, "group_size": self.group_size, "symmetric": self.symmetric,
        }  # fmt: skip
        made = QuantizedWeight.empty(linear.weight, **grid)
        shrinkage = best_shrinkage(moments)
        rows = rows_of_block(linear.in_features, FITTED_ELEMENTS)
        for number, part in enumerate(made.split(rows)):
            outputs = slice(number * rows, number * rows + len(part.packed))
            target = linear.weight[outputs].detach().float()
            if shrinkage is not None:
                target = shrinkage.applied(target, moments, outputs)
            weight = gptq(target, moments, **grid)
            part.copy_(refine(target, weight, moments) if self.refined else weight)
        return made

    def _rounded(
        self, linear: nn.Linear, bits: int, moments: LayerMoments
    ) -> tuple[QuantizedWeight, Any]:
        """The layer as `rtn` makes it, which learns less from the data."""
        weight = round_to_nearest(
            linear.weight, bits=bits, group_size=self.group_size, symmetric=self.symmetric,
            importance=moments.importance,
        )  # fmt: skip
        lost = (linear.weight.detach().double() - weight.dequantize().double()) @ (
            moments.total / moments.tokens
        )
        base = 0 if linear.bias is None else linear.bias.detach().double()
        return weight, (base + lost).to(linear.weight.dtype)

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
