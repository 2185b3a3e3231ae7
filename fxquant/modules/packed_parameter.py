"""A parameter of a user's module as packed integers, for modules that keep their own code.

A linear layer is replaced by a quantized one. A mixture's experts, or `x @ self.table`, are code of
the user's that reads a parameter and cannot be replaced. There the parameter is: it leaves the
module, a `PackedParameter` becomes the module's child, and a property with the parameter's name
gives a `PackedTensor` on it.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import Tensor, nn

from fxquant.modules.grouped_linear import QuantizedGroupedLinear
from fxquant.modules.layer import LayerOver, QuantizedLayer
from fxquant.modules.packed_tensor import PackedTensor

PREFIX = "packed_"  # of the child's name: in front, since libraries find parameters by their ends


class PackedParameter(LayerOver):
    """The integers of a parameter that code of the user's multiplies with.

    Args:
        experts: how many matrices the parameter consists of; None for one that is a matrix.
        in_features: the width of the input.
        out_features: the width of the output.
        is_transposed: whether the parameter is the layer's weight with the last two dimensions
            swapped.
        layer: the quantized layer that multiplies by it.
    """

    def __init__(
        self,
        experts: int | None,
        in_features: int,
        out_features: int,
        is_transposed: bool,
        layer: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.experts, self.in_features, self.out_features = experts, in_features, out_features
        self.is_transposed = is_transposed
        if layer is None and experts is not None:
            layer = QuantizedGroupedLinear(experts, in_features, out_features)
        empty = nn.Linear(in_features, out_features, bias=False, device="meta")
        self.add_module("layer", empty if layer is None else layer)

    @classmethod
    def of(cls, layer: QuantizedLayer, is_transposed: bool) -> "PackedParameter":
        """The parameter that `layer` multiplies by; what the layer adds does not belong to it."""
        layer = layer.without_bias()
        *leading, out_features, in_features = layer.weight_shape
        experts = leading[0] if leading else None
        return cls(experts, in_features, out_features, is_transposed, layer)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the parameter."""
        return tuple(self.weight.shape)

    @property
    def weight(self) -> Tensor:
        """What the user's code gets where it reads the parameter."""
        return PackedTensor(self.layer, self.is_transposed)

    def dequantize(self) -> Tensor:
        """The values of the parameter, float32."""
        values = self.layer.dequantize()
        return values.transpose(-2, -1) if self.is_transposed else values

    def weight_parts(self) -> Iterator[Tensor]:
        """The rows of the layer's float32 matrix."""
        return self.layer.weight_parts()

    def forward(self, *args: Any) -> Tensor:
        """Multiply."""
        product: Tensor = self.layer(*args)
        return product


class FloatParameter(nn.Module):
    """The float side: holds the parameter in the place of the child.

    Args:
        weight: the parameter.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


def child_name(parameter: str) -> str:
    """The path of the child that holds the parameter at a path.

    >>> child_name("mlp.experts.down_proj"), child_name("table")
    ('mlp.experts.packed_down_proj', 'packed_table')
    """
    owner, dot, name = parameter.rpartition(".")
    return f"{owner}{dot}{PREFIX}{name}"


def parameter_name(child: str) -> str | None:
    """Undo `child_name`; None for the path of another module."""
    owner, dot, name = child.rpartition(".")
    return f"{owner}{dot}{name.removeprefix(PREFIX)}" if name.startswith(PREFIX) else None


def hand_over(model: nn.Module, parameter: str) -> FloatParameter:
    """Let the module that has a parameter read it from a child, which may then become packed.

    Args:
        model: is changed: the parameter's module gets a subclass of its class.
        parameter: the path of the parameter.
    """
    path, _, name = parameter.rpartition(".")
    owner = model.get_submodule(path)
    weight = owner._parameters.pop(name)
    assert weight is not None  # chosen parameters are there
    child = FloatParameter(weight)
    owner.add_module(PREFIX + name, child)
    base: Any = type(owner)
    owner.__class__ = _reader(getattr(base, "_float_class", base), (*_names(owner), name))
    return child


def _names(owner: nn.Module) -> tuple[str, ...]:
    return getattr(type(owner), "_packed_names", ())


@cache
def _reader(base: Any, names: tuple[str, ...]) -> Any:
    """A subclass of `base` that reads parameters from children; it looks like `base`."""

    def reads(name: str) -> property:
        return property(lambda module: module._modules[PREFIX + name].weight)

    def reduced(module: Any, protocol: Any) -> Any:
        """Pickle by the base: the subclass is in no module where pickle could find it."""
        made: tuple[Any, ...] = base.__reduce_ex__(module, protocol)
        return (_empty_reader, (base, names), *made[2:])

    own = {
        **{name: reads(name) for name in names},
        "_packed_names": names, "_float_class": base, "__reduce_ex__": reduced,
        "__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__,
    }  # fmt: skip
    return type(base.__name__, (base,), own)


def _empty_reader(base: Any, names: tuple[str, ...]) -> nn.Module:
    cls = _reader(base, names)
    made: nn.Module = cls.__new__(cls)
    return made
