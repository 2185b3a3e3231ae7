"""What all quantized layers have in common, whatever they do with their weight."""

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from fxquant.modules.lazy_weight import LazyWeight
from fxquant.numerics.quantized_weight import QuantizedWeight


class QuantizedLayer(nn.Module):
    """A layer that keeps the integers of its weight: the quantized side of a `LayerForm`.

    Attributes:
        replaces: the classes of float layers in whose place it can stand.
        bits: of an integer of the weight.
        bias: float, or None.
    """

    replaces: ClassVar[tuple[type[nn.Module], ...]] = ()
    bits: int
    bias: Tensor | None
    _weight_dtype: torch.dtype

    @property
    def quantized_weight(self) -> QuantizedWeight:
        """The integers with their scales and zero points, as the matrix of the layer's form."""
        raise NotImplementedError(type(self).__name__)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the float layer's weight."""
        raise NotImplementedError(type(self).__name__)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight in the shape and dtype of the float layer's.

        To look at its shape, dtype and device costs nothing; its values are computed at each use.
        """
        device = next(self.buffers()).device
        return LazyWeight(self.dequantize, self.weight_shape, self._weight_dtype, device)

    @property
    def matrices(self) -> int | None:
        """How many matrices the weight consists of, as that of experts does; None: it is one."""
        return None

    def expert(self, number: int) -> "QuantizedLayer":
        """The layer of one of these matrices."""
        raise NotImplementedError(type(self).__name__)

    def without_bias(self) -> "QuantizedLayer":
        """A layer that shares the packed weight and adds nothing."""
        raise NotImplementedError(type(self).__name__)

    def dequantize(self) -> Tensor:
        """The values of the weight, float32, in the shape of the float layer's."""
        return self.quantized_weight.dequantize().view(self.weight_shape)

    @property
    def activation_arithmetic(self) -> str | None:
        """How the layer multiplies by an input that it rounds to 8 bits while it runs.

        `"integers"`, or `"simulated"`: the rounded values as floats; None where it rounds none.
        """
        return None

    def weight_parts(self) -> Iterator[Tensor]:
        """The rows of the form's float32 matrix in order, some at a time: memory stays small."""
        yield from self.quantized_weight.parts()

    def to_float(self) -> nn.Module:
        """The float layer with the same values."""
        raise NotImplementedError(type(self).__name__)


class LayerAround(QuantizedLayer):
    """A quantized layer whose integers are those of another one inside it."""

    @property
    def inner(self) -> QuantizedLayer:
        """The layer inside, or the first of several alike."""
        raise NotImplementedError(type(self).__name__)

    @property
    def bits(self) -> int:  # type: ignore[override]
        """Bits of an integer of the weight."""
        return self.inner.bits

    @property
    def _weight_dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.inner._weight_dtype

    @property
    def quantized_weight(self) -> QuantizedWeight:
        """The integers with their scales and zero points, as the matrix of the layer's form."""
        return self.inner.quantized_weight

    @property
    def activation_arithmetic(self) -> str | None:
        """See `QuantizedLayer`."""
        return self.inner.activation_arithmetic


class LayerOver(LayerAround):
    """A quantized layer that stands for another one, its only child, with all that this adds."""

    layer: QuantizedLayer

    @property
    def inner(self) -> QuantizedLayer:
        """The layer that multiplies."""
        return self.layer

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """What the layer adds."""
        return self.layer.bias


def has_quantized_layer(module: nn.Module) -> bool:
    """Whether a quantized layer is in `module`, or is it."""
    return any(isinstance(part, QuantizedLayer) for part in module.modules())
