"""A quantized layer that rounds what it reads to 8 bits with a grid that is known before.

In a graph two nodes in front of the layer do this. A copy of the user's class has no such nodes:
there this layer stands where the float one stood.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fxquant.modules.activation import dequantize_activation, quantize_activation
from fxquant.modules.grouped_linear import QuantizedGroupedLinear
from fxquant.modules.layer import LayerOver, QuantizedLayer
from fxquant.modules.linear import QuantizedLinear
from fxquant.modules.packed_tensor import PackedTensor


class RoundedInput(LayerOver):
    """Round the input as `quantize_activation` does, then call the layer.

    Args:
        channels: of the input, each with a scale and a zero point of its own; None: one grid for
            all values.
        layer: the quantized layer that reads the rounded values.
        scale: float32, [channels] or a scalar; by default without values.
        zero_point: whole numbers in 0..255 as float32, the same shape.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        channels: int | None,
        layer: nn.Module | None = None,
        scale: Tensor | None = None,
        zero_point: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.channels = channels
        shape = () if channels is None else (channels,)
        for name, given in (("scale", scale), ("zero_point", zero_point)):
            self.register_buffer(name, torch.ones(shape) if given is None else given)
        self.add_module("layer", QuantizedLayer() if layer is None else layer)

    @classmethod
    def of(cls, layer: QuantizedLayer, scale: Tensor, zero_point: Tensor) -> "RoundedInput":
        """The layer with its grid; both keep their memory."""
        return cls(len(scale) if scale.ndim else None, layer, scale, zero_point)

    @property
    def weight(self) -> Tensor:
        """The weight; code that multiplies with it rounds its input, as the layer does."""
        is_product = isinstance(self.layer, QuantizedLinear | QuantizedGroupedLinear)
        return PackedTensor(self) if is_product else self.layer.weight

    @property
    def matrices(self) -> int | None:
        """See `QuantizedLayer`."""
        return self.layer.matrices

    def expert(self, number: int) -> "RoundedInput":
        """See `QuantizedLayer`."""
        return RoundedInput.of(self.layer.expert(number), self.scale, self.zero_point)

    def without_bias(self) -> "RoundedInput":
        """See `QuantizedLayer`."""
        if self.bias is None:
            return self
        return RoundedInput.of(self.layer.without_bias(), self.scale, self.zero_point)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the float layer's weight."""
        return self.layer.weight_shape

    @property
    def activation_arithmetic(self) -> str | None:
        """Rounded values are multiplied as floats."""
        return "simulated"

    def dequantize(self) -> Tensor:
        """The values of the weight, float32, in the shape of the float layer's."""
        return self.layer.dequantize()

    def to_float(self) -> nn.Module:
        """The float layer with the same values; it rounds nothing."""
        return self.layer.to_float()

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call the layer on the rounded input; it passes on what else the layer takes."""
        q = quantize_activation(input, self.scale, self.zero_point)
        rounded = dequantize_activation(q, self.scale, self.zero_point, input)
        return self.layer(rounded, *args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> "RoundedInput":
        """Move with the model; the grid stays float32, as `.bfloat16()` would make it coarse."""
        kept = {name: self._buffers[name] for name in ("scale", "zero_point")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in kept.items():
            assert tensor is not None  # for type checkers
            self._buffers[name] = tensor.to(self._buffers[name].device)  # type: ignore[union-attr]
        return self

    def __getattr__(self, name: str) -> Any:
        """What the float layer has beside a weight, such as `in_features`, the layer inside has."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "layer" or name.startswith("_"):  # how it is copied is its own
                raise
            return getattr(self.layer, name)
