"""Layers quantized without looking at other layers, made once and kept."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fxquant.algorithms.hqq import half_quadratic
from fxquant.algorithms.rtn import round_to_nearest
from fxquant.config.quant_config import QuantConfig
from fxquant.modules.layer import QuantizedLayer
from fxquant.modules.weight_forms import block_names
from fxquant.numerics.quantized_weight import (
    ONE_GROUP,
    QuantizedWeight,
    is_per_channel,
    rows_of_block,
)
from fxquant.observers.input_statistics import InputStatistics
from fxquant.passes.decide import Decision, add_notes
from fxquant.passes.layer_maker import Blocks, TiedTables
from fxquant.passes.target_limits import bias_in_target, exact_in_target, int8_in_target


class RoundedLayers:
    """Makes quantized layers; the same layer and width give the same object.

    Args:
        config: how layers are quantized.
        rounding: `"rtn"` or `"hqq"`.
        statistics: of what each block of rows multiplies, by its name (see `block_names`), where
            that is known: the mean square weighs errors in the clip search, and the mean corrects
            the bias.
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
        self._tied = TiedTables()
        self._made: dict[tuple[str, int], QuantizedLayer] = {}

    def quantize(self, name: str, layer: nn.Module, bits: int) -> QuantizedLayer:
        """The layer called `name` in `bits` bits."""
        if (name, bits) not in self._made:
            self._made[name, bits] = self._quantize(name, layer, bits)
        return self._made[name, bits]

    def is_tied(self, name: str, layer: nn.Module, bits: int) -> bool:
        """Whether the layer called `name` reads the packed weight of one that was made."""
        return self._tied.find(name, layer, bits) is not None

    def explain(self, decisions: Iterable[Decision]) -> list[Decision]:
        """The decisions, with a word on layers that were rounded in another way than was asked."""
        why = "one group a row, where hqq is known to fail: rounded to nearest"
        return add_notes(decisions, dict.fromkeys(self.without_groups, why) | self._tied.notes)

    def _quantize(self, name: str, layer: nn.Module, bits: int) -> QuantizedLayer:
        blocks, table = Blocks(layer), self._tied.find(name, layer, bits)
        if is_per_channel(bits, self.config.group_size, blocks.inputs):
            weights = [int8_in_target(matrix, self.config) for matrix in blocks.matrices]
            made = blocks.finish(weights, blocks.biases, table)
            self._tied.add(name, layer, bits, made)
            return made
        weights, biases = [], []
        for part, matrix, bias in zip(
            block_names(name, blocks.count), blocks.matrices, blocks.biases, strict=True
        ):
            statistics = self.statistics.get(part)
            if table is None:
                weight = self._round(name, matrix, bits, statistics)
                weight = exact_in_target(weight, matrix, self.config)
            else:
                weight = table.quantized_weight
            weights.append(weight)
            corrected = _corrected(matrix, weight, bias, statistics)
            biases.append(bias_in_target(corrected, bias, self.config))
        made = blocks.finish(weights, biases, table)
        self._tied.add(name, layer, bits, made)
        return made

    def _round(
        self, name: str, matrix: Tensor, bits: int, statistics: InputStatistics | None
    ) -> QuantizedWeight:
        if self.rounding == "hqq":
            if self.config.group_size not in (ONE_GROUP, matrix.shape[1]):
                return half_quadratic(matrix, bits=bits, **self.config.form)
            self.without_groups.add(name)
        importance = None if statistics is None else statistics.mean_square
        return round_to_nearest(matrix, bits=bits, **self.config.form, importance=importance)


def _corrected(
    matrix: Tensor, weight: QuantizedWeight, bias: Tensor | None, statistics: InputStatistics | None
) -> Tensor | None:
    """The bias with which the mean output of a block is the float one's."""
    if statistics is None:
        return bias
    rows = rows_of_block(matrix.shape[1])
    parts = zip(matrix.split(rows), weight.split(rows), strict=True)
    lost = torch.cat([(w.float() - q.dequantize()) @ statistics.mean for w, q in parts])
    base = 0 if bias is None else bias.float()
    return (base + lost).to(matrix.dtype)
