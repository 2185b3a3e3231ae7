"""What the quantized linear layers have in common."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import WeightError, check_choice

ACTIVATIONS = ("float", "int8")


class QuantizedLinear(nn.Module):
    """A linear layer with integer weights and an optional float bias.

    Attributes:
        in_features: columns of the weight.
        out_features: rows of the weight.
        bits: bits of a weight element.
        bias: float [out] or None.
    """

    bits: int
    bias: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, bias: Tensor | None, activation: str = "float"
    ) -> None:
        super().__init__()
        check_choice("activation", activation, ACTIVATIONS)
        self.in_features, self.out_features = in_features, out_features
        self._activation = activation
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @property
    def weight(self) -> Tensor:
        """The dequantized weight [out, in], float32."""
        raise TypeError(f"{type(self).__name__} has no weight")

    def weight_parts(self) -> Iterator[Tensor]:
        """The rows of `weight` in order, some at a time: what is in memory stays small."""
        yield self.weight

    @property
    def activation(self) -> str:
        """`"float"`, or `"int8"`: activations quantized on the fly, a scale a token and group."""
        return self._activation

    @activation.setter
    def activation(self, value: str) -> None:
        check_choice("activation", value, ACTIVATIONS)
        self._activation = value
        self._prepare()

    def _prepare(self) -> None:
        """Choose a kernel and derive its layout; it is never saved."""

    def to_linear(self) -> nn.Linear:
        """A float `nn.Linear` with the same weights."""
        shape = (self.in_features, self.out_features)
        linear = nn.Linear(*shape, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias, requires_grad=False)
        return linear.eval()

    def extra_repr(self) -> str:
        """The shape, for printing a model."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantizedLinear":
        """Move between devices; a change of float dtype leaves integers and their grid alone."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if name != "bias" and old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


def moved_only(fn: Any, tensor: Tensor) -> Tensor:
    """What `fn` makes of `tensor`, without a change of dtype."""
    new: Tensor = fn(tensor)
    return new if new.dtype == tensor.dtype else tensor.to(new.device)


def check_linear(linear: object) -> nn.Linear:
    """`linear` itself, or a `WeightError` if it is no Linear layer."""
    if isinstance(linear, nn.Linear):
        return linear
    raise WeightError(
        "from_float",
        found=type(linear).__name__,
        needed="a torch.nn.Linear",
        remedy="Pass the Linear layer itself.",
    )


def add_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """`y` + `bias` in the dtype of `y`."""
    return y if bias is None else y + bias.to(y.dtype)


def detached(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous buffer without gradient."""
    return tensor.detach().to(dtype).contiguous()
