"""Layers quantized without looking at other layers, made once and kept."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from fxquant.algorithms.hqq import half_quadratic
from fxquant.algorithms.rtn import round_to_nearest
from fxquant.config.quant_config import QuantConfig
from fxquant.distributed.processes import Processes
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
from fxquant.passes.layer_maker import Blocks, TiedTables, naming, tied_readers
from fxquant.passes.target_limits import bias_in_target, exact_in_target, int8_in_target


class RoundedLayers:
    """Makes quantized layers; the same layer and width give the same object.

    Args:
        config: how layers are quantized.
        rounding: `"rtn"` or `"hqq"`.
        statistics: of what each block of rows multiplies, by its name (see `block_names`), where
            that is known: the mean square weighs errors in the clip search, and the mean corrects
            the bias.
        bare: names of layers that keep their bias: see `bias_in_target`.
    """

    def __init__(
        self,
        config: QuantConfig,
        rounding: str = "rtn",
        statistics: Mapping[str, InputStatistics] | None = None,
        *,
        bare: Collection[str] = (),
    ) -> None:
        self.config, self.rounding = config, rounding
        self.statistics, self.bare = statistics or {}, bare
        self.without_groups: set[str] = set()
        self._tied = TiedTables()
        self._made: dict[tuple[str, int], QuantizedLayer] = {}
        self._ready: dict[tuple[str, int], list[QuantizedWeight]] = {}  # rounded beforehand

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

    def weights(self, name: str, layer: nn.Module, bits: int) -> list[QuantizedWeight]:
        """The rounded blocks of a layer that is not tied to another one.

        Args:
            name: of the layer.
            layer: a float layer that has a form.
            bits: of an integer.

        Raises:
            WeightError: a weight cannot be quantized; the layer is named.
        """
        with naming(name):
            return self._weights(name, Blocks(layer), bits)

    def share(self, layers: Sequence[tuple[str, nn.Module, int]], processes: Processes) -> None:
        """Round the weights of layers beforehand, each in one of several processes.

        Args:
            layers: `(name, layer, bits)`, in the order in which they will be made.
            processes: all of them get all weights.

        Raises:
            WeightError: a weight cannot be quantized; the layer is named.
        """
        own = [layer for layer in layers if layer[0] not in tied_readers(layers)]
        costs = [layer.get_parameter("weight").numel() for _, layer, _ in own]
        weights = processes.share(costs, [partial(self.weights, *layer) for layer in own])
        self._ready |= {
            (layer[0], layer[2]): made for layer, made in zip(own, weights, strict=True)
        }

    def _quantize(self, name: str, layer: nn.Module, bits: int) -> QuantizedLayer:
        blocks, table = Blocks(layer), self._tied.find(name, layer, bits)
        is_alone = is_per_channel(bits, self.config.group_size, blocks.inputs)
        weights = self._ready.pop((name, bits), None)
        if table is not None and not is_alone:
            weights = [table.quantized_weight] * blocks.count
        elif self._lacks_groups(blocks) and not is_alone:
            self.without_groups.add(name)
        if weights is None:
            weights = self._weights(name, blocks, bits)
        weight = QuantizedWeight.joined(weights)
        made = blocks.finish(weight, self._corrected_bias(name, blocks, weight), table)
        self._tied.add(name, layer, bits, made)
        return made

    def _weights(self, name: str, blocks: Blocks, bits: int) -> list[QuantizedWeight]:
        """The rounded blocks of a layer that is not tied to another one."""
        if is_per_channel(bits, self.config.group_size, blocks.inputs):
            return int8_in_target(blocks.matrix, self.config).split(blocks.rows)
        rounded = zip(block_names(name, blocks.count), blocks.matrices, strict=True)
        return [
            exact_in_target(self._round(blocks, part, matrix, bits), matrix, self.config)
            for part, matrix in rounded
        ]

    def _round(self, blocks: Blocks, part: str, matrix: Tensor, bits: int) -> QuantizedWeight:
        if self.rounding == "hqq" and not self._lacks_groups(blocks):
            return half_quadratic(matrix, bits=bits, **self.config.form(bits))
        statistics = self.statistics.get(part)
        importance = None if statistics is None else statistics.mean_square
        return round_to_nearest(matrix, bits=bits, **self.config.form(bits), importance=importance)

    def _lacks_groups(self, blocks: Blocks) -> bool:
        """Whether `"hqq"` cannot be taken, as rows have one group."""
        return self.rounding == "hqq" and self.config.group_size in (ONE_GROUP, blocks.inputs)

    def _corrected_bias(self, name: str, blocks: Blocks, weight: QuantizedWeight) -> Tensor | None:
        """The bias of a layer, of which `weight` are all rows, that the target can hold."""
        seen = [self.statistics.get(part) for part in block_names(name, blocks.count)]
        means = [statistics.mean for statistics in seen if statistics is not None]
        corrected = _corrected(blocks, weight, torch.stack(means)) if means else blocks.bias
        return bias_in_target(corrected, blocks.bias, self.config, is_bare=name in self.bare)


def _corrected(blocks: Blocks, weight: QuantizedWeight, means: Tensor) -> Tensor:
    """The bias with which the mean output of each row is the float one's.

    Args:
        blocks: of a layer.
        weight: its quantized rows.
        means: of what each block multiplies, [blocks, inputs].
    """
    size = rows_of_block(blocks.inputs)
    places = torch.arange(len(blocks.matrix)) // blocks.rows
    parts = zip(blocks.matrix.split(size), weight.parts(), places.split(size), strict=True)
    lost = torch.cat([torch.linalg.vecdot(w.float() - q, means[block]) for w, q, block in parts])
    base = 0 if blocks.bias is None else blocks.bias.float()
    return (base + lost).to(blocks.matrix.dtype)
