"""Layers fitted in several widths to the same inputs, of which one is put in place."""

from collections.abc import Iterable, Sequence

from torch import nn

from fxquant.modules.layer import QuantizedLayer
from fxquant.observers.moments import LayerMoments
from fxquant.passes.fitted_layers import FittedBlock, FittedLayers
from fxquant.passes.layer_maker import Blocks

_ByWidth = dict[int, FittedBlock]


class FittedWidths:
    """Fits each layer as `layers` does, and in other widths besides.

    Args:
        layers: makes the layers that are put in place, in the width that is asked for.
        also: the other widths.

    Attributes:
        others: the layers of the other widths, by name and width.
    """

    def __init__(self, layers: FittedLayers, also: Iterable[int]) -> None:
        self.others: dict[tuple[str, int], QuantizedLayer] = {}
        self._layers = layers
        self._by_width = {
            bits: FittedLayers(layers.config, refined=layers.refined, bare=layers.bare)
            for bits in also
        }

    def fit(
        self, name: str, blocks: Blocks, index: int, bits: int, moments: LayerMoments
    ) -> _ByWidth:
        """A block of rows in all widths; the arguments are those of `FittedLayers.fit`."""
        made = {b: m.fit(name, blocks, index, b, moments) for b, m in self._by_width.items()}
        return made | {bits: self._layers.fit(name, blocks, index, bits, moments)}

    def make(
        self, name: str, layer: nn.Module, bits: int, fitted: Sequence[_ByWidth]
    ) -> QuantizedLayer:
        """The layer in `bits` bits; the arguments are those of `FittedLayers.make`."""
        for width, maker in self._by_width.items():
            own = [blocks[width] for blocks in fitted]
            self.others[name, width] = maker.make(name, layer, width, own).eval()
        return self._layers.make(name, layer, bits, [blocks[bits] for blocks in fitted])
