"""Layers quantized without looking at other layers, made once and kept."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fxquant.algorithms.hqq import half_quadratic
from fxquant.algorithms.rtn import round_to_nearest
from fxquant.config.quant_config import QuantConfig
from fxquant.modules.linear import QuantizedLinear
from fxquant.modules.linear_int4 import linear_of
from fxquant.numerics.quantized_weight import (
    ONE_GROUP,
    QuantizedWeight,
    is_per_channel,
    rows_of_block,
)
from fxquant.observers.input_statistics import InputStatistics
from fxquant.passes.decide import Decision, add_notes
from fxquant.passes.target_limits import bias_in_target, exact_in_target, int8_layer


class RoundedLayers:
    """Makes quantized layers; the same layer and width give the same object.

    Args:
        config: how layers are quantized.
        rounding: `"rtn"` or `"hqq"`.
        statistics: of the layers' inputs, by name, where they are known: the mean square weighs
            errors in the clip search, and the mean corrects the bias.
    """

    def __init__(
        self,
        config: QuantConfig,
        rounding: str = "rtn",
        statistics: Mapping[str, InputStatistics] | None = None,
    ) -> None:
        self.config, self.rounding = config, rounding
        self.statistics = statistics or {}
        self.without_groups: set[str] = set()
        self._made: dict[tuple[str, int], QuantizedLinear] = {}

    def quantize(self, name: str, linear: nn.Linear, bits: int) -> QuantizedLinear:
        """The layer called `name` in `bits` bits."""
        if (name, bits) not in self._made:
            self._made[name, bits] = self._quantize(name, linear, bits)
        return self._made[name, bits]

    def explain(self, decisions: Iterable[Decision]) -> list[Decision]:
        """The decisions, with a word on layers that were rounded in another way than was asked."""
        why = "one group a row, where hqq is known to fail: rounded to nearest"
        return add_notes(decisions, dict.fromkeys(self.without_groups, why))

    def _quantize(self, name: str, linear: nn.Linear, bits: int) -> QuantizedLinear:
        if is_per_channel(bits, self.config.group_size, linear.in_features):
            return int8_layer(linear, self.config)
        weight = self._round(name, linear.weight.detach(), bits)
        weight = exact_in_target(weight, linear, self.config)
        bias = bias_in_target(self._bias(name, linear, weight), linear, self.config)
        return linear_of(weight, bias)

    def _round(self, name: str, weight: Tensor, bits: int) -> QuantizedWeight:
        if self.rounding == "hqq":
            if self.config.group_size not in (ONE_GROUP, weight.shape[1]):
                return half_quadratic(weight, bits=bits, **self.config.form)
            self.without_groups.add(name)
        statistics = self.statistics.get(name)
        importance = None if statistics is None else statistics.mean_square
        return round_to_nearest(weight, bits=bits, **self.config.form, importance=importance)

    def _bias(self, name: str, linear: nn.Linear, weight: QuantizedWeight) -> Tensor | None:
        """The bias with which the mean output is the float layer's."""
        statistics = self.statistics.get(name)
        if statistics is None:
            return linear.bias
        rows = rows_of_block(linear.in_features)
        parts = zip(linear.weight.detach().split(rows), weight.split(rows), strict=True)
        lost = torch.cat([(w.float() - q.dequantize()) @ statistics.mean for w, q in parts])
        base = 0 if linear.bias is None else linear.bias.detach().float()
        return (base + lost).to(linear.weight.dtype)
