"""What rounding and fitting have in common: a float layer in, its form's quantized layer out."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fxquant.errors import WeightError
from fxquant.graph.parameters import memory_of
from fxquant.modules.layer import QuantizedLayer
from fxquant.modules.linear import QuantizedLinear
from fxquant.modules.weight_forms import chosen_form
from fxquant.numerics.quantized_weight import QuantizedWeight

_Key = tuple[int, int, tuple[int, ...], tuple[int, ...], int]


class TiedTables:
    """The packed weights that several layers read: an embedding, and the head that is tied to it.

    Whoever comes first is quantized; the other reads the same integers.
    """

    def __init__(self) -> None:
        self._tables: dict[_Key, tuple[QuantizedLinear, str, bool]] = {}
        self.notes: dict[str, str] = {}

    def find(self, name: str, layer: nn.Module, bits: int) -> QuantizedLinear | None:
        """The layer whose packed weight the layer called `name` can read, or None."""
        found = self._tables.get(_key(layer, bits))
        if found is None or found[1] == name or not (found[2] or chosen_form(layer).is_lookup):
            return None
        self.notes[name] = f"it reads the packed weight of {found[1]}"
        return found[0]

    def add(self, name: str, layer: nn.Module, bits: int, made: QuantizedLayer) -> None:
        """Let others read the packed weight of a layer that was made."""
        table = made if isinstance(made, QuantizedLinear) else getattr(made, "table", None)
        if table is not None:
            self._tables.setdefault(_key(layer, bits), (table, name, chosen_form(layer).is_lookup))


def tied_readers(layers: Sequence[tuple[str, nn.Module, int]]) -> set[str]:
    """The names of layers that will read the packed weight of one before them.

    Args:
        layers: `(name, layer, bits)`, in the order in which they will be made.
    """
    first: dict[_Key, bool] = {}  # whether the first layer of a weight looks rows up
    readers = set()
    for name, layer, bits in layers:
        key, is_lookup = _key(layer, bits), chosen_form(layer).is_lookup
        if key in first and (first[key] or is_lookup):
            readers.add(name)
        first.setdefault(key, is_lookup)
    return readers


def _key(layer: nn.Module, bits: int) -> _Key:
    weight = layer._parameters["weight"]
    assert weight is not None  # layers with a form have one
    place = 0 if weight.is_meta else weight.data_ptr()
    return memory_of(weight), place, tuple(weight.shape), weight.stride(), bits


class Blocks:
    """The blocks of rows of a float layer: matrices [rows, inputs], each with its own inputs.

    Args:
        layer: a layer that has a form.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.form = layer, chosen_form(layer)
        self.matrix = self.form.matrix(layer).detach()
        self.count = self.form.blocks(layer)
        self.rows, self.inputs = self.matrix.shape[0] // self.count, self.matrix.shape[1]
        self.matrices = self.matrix.split(self.rows)
        bias = None if self.form.bias is None else self.form.bias(layer)
        self.bias = None if bias is None else bias.detach()
        self.biases: Sequence[Tensor | None] = [None] * self.count
        if self.bias is not None:
            self.biases = self.bias.split(self.rows)

    def joined(
        self, weights: Sequence[QuantizedWeight], biases: Sequence[Tensor | None]
    ) -> QuantizedLayer:
        """The quantized layer of quantized blocks and the biases [rows] that belong to them."""
        bias, given = None, [bias for bias in biases if bias is not None]
        if given:
            zeros = given[0].new_zeros(self.rows)
            bias = torch.cat([zeros if bias is None else bias for bias in biases])
        return self.finish(QuantizedWeight.joined(weights), bias)

    def finish(
        self, weight: QuantizedWeight, bias: Tensor | None, table: QuantizedLinear | None = None
    ) -> QuantizedLayer:
        """The quantized layer of all quantized rows, their bias, and a layer that holds them."""
        return self.form.quantized(self.layer, weight, bias, table)


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Let a `WeightError` name the layer whose weight it is about."""
    try:
        yield
    except WeightError as error:
        raise WeightError(
            f"{name}.weight", found=error.found, needed=error.needed, remedy=error.remedy
        ) from error
