"""Many matrices of one shape, of which each row of the input meets one: a mixture's experts.

Rows find their expert in one of three ways, which are those of the models that have experts:

- `offsets`: rows [rows, in] are sorted by expert, and the rows of each expert end at its offset
  (`grouped_mm`); rows behind the last offset give 0.
- `numbers`: row i of [rows, ..., in] meets expert `numbers[i]` (a batched product with weights that
  are picked by number).
- neither: the third last dimension of [..., experts, rows, in] counts experts (`bmm`); an input of
  fewer dimensions, or with 1 there, meets all of them.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.modules.float_linear import as_parameter
from fxquant.modules.layer import LayerAround, QuantizedLayer
from fxquant.modules.linear import QuantizedLinear
from fxquant.modules.linear_of import linear_of
from fxquant.numerics.quantized_weight import QuantizedWeight


class GroupedLinear(nn.Module):
    """Matrices [experts, out, in], of which each row of the input meets one.

    Args:
        experts: how many matrices.
        in_features: the width of the input.
        out_features: the width of the output.
        bias: whether there is one, [experts, out].
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self, experts: int, in_features: int, out_features: int, bias: bool = False
    ) -> None:
        super().__init__()
        self.experts, self.in_features, self.out_features = experts, in_features, out_features
        self.weight = nn.Parameter(torch.empty(experts, out_features, in_features))
        shape = (experts, out_features)
        self.register_parameter("bias", nn.Parameter(torch.empty(shape)) if bias else None)

    @classmethod
    def on(cls, weight: Tensor, bias: Tensor | None = None) -> "GroupedLinear":
        """A layer around a weight [experts, out, in] and a bias [experts, out]; nothing is copied.

        Its parameters need no gradient, unless `weight` is one that does.
        """
        experts, out_features, in_features = weight.shape
        with torch.device("meta"):
            made = cls(experts, in_features, out_features, bias is not None)
        made.weight = as_parameter(weight)
        if bias is not None:
            made.bias = as_parameter(bias)
        return made.eval()

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, numbers: Tensor | None = None
    ) -> Tensor:
        """Multiply; see the docstring of this file for how rows find their expert."""
        parts = split_by_expert(self.experts, input, offsets, numbers)
        biases = [None] * self.experts if self.bias is None else self.bias.unbind()
        products = (
            F.linear(x, w, b) for x, w, b in zip(parts, self.weight, biases, strict=True)
        )  # fmt: skip
        return _join(products, input, self.out_features, offsets, numbers)

    def extra_repr(self) -> str:
        """The shape, for printing a model."""
        return f"{self.experts}, {self.in_features}, {self.out_features}"


class QuantizedGroupedLinear(LayerAround):
    """`GroupedLinear` with an own packed matrix for each expert; only those that are met run.

    Args:
        experts: how many matrices.
        in_features: the width of the input.
        out_features: the width of the output.
        layers: the quantized layer of each expert.
    """

    replaces = (GroupedLinear,)

    def __init__(
        self,
        experts: int,
        in_features: int,
        out_features: int,
        layers: list[QuantizedLinear] | None = None,
    ) -> None:
        super().__init__()
        self.experts, self.in_features, self.out_features = experts, in_features, out_features
        for i in range(experts):
            empty = nn.Linear(in_features, out_features, bias=False, device="meta")
            self.add_module(str(i), empty if layers is None else layers[i])

    @classmethod
    def of(
        cls, layer: GroupedLinear, weight: QuantizedWeight, bias: Tensor | None
    ) -> "QuantizedGroupedLinear":
        """The quantized form of `layer`.

        Args:
            layer: the float layer.
            weight: its rows [experts · out, in].
            bias: [experts · out], or None.
        """
        count, rows = layer.experts, layer.out_features
        biases = [None] * count if bias is None else bias.split(rows)
        layers = [
            linear_of(part.clone(), b, layer.weight.dtype)
            for part, b in zip(weight.split(rows), biases, strict=True)
        ]
        return cls(count, layer.in_features, rows, layers)

    @property
    def layers(self) -> list[QuantizedLinear]:
        """The quantized layer of each expert."""
        return list(self.children())  # type: ignore[arg-type]

    @property
    def matrices(self) -> int:
        """See `QuantizedLayer`."""
        return self.experts

    def expert(self, number: int) -> QuantizedLayer:
        """See `QuantizedLayer`."""
        return self.layers[number]

    def without_bias(self) -> "QuantizedGroupedLinear":
        """See `QuantizedLayer`."""
        if self.bias is None:
            return self
        sizes = self.experts, self.in_features, self.out_features
        return type(self)(*sizes, [layer.without_bias() for layer in self.layers])

    @property
    def inner(self) -> QuantizedLinear:
        """The layer of the first expert."""
        return self.layers[0]

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """[experts, out], or None."""
        biases = [layer.bias for layer in self.layers if layer.bias is not None]
        return torch.stack(biases) if biases else None

    @property
    def quantized_weight(self) -> QuantizedWeight:
        """The rows of all experts."""
        return QuantizedWeight.joined([layer.quantized_weight for layer in self.layers])

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """`(experts, out, in)`."""
        return self.experts, self.out_features, self.in_features

    def weight_parts(self) -> Iterator[Tensor]:
        """The rows of the float32 weight, expert by expert."""
        for layer in self.layers:
            yield from layer.weight_parts()

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, numbers: Tensor | None = None
    ) -> Tensor:
        """Multiply; see the docstring of this file for how rows find their expert."""
        is_exported = torch.compiler.is_exporting()
        if is_exported and offsets is not None:
            # A program has no places that depend on values, but it can pick rows by them.
            rows = torch.arange(input.shape[0], device=input.device)
            numbers = torch.searchsorted(offsets, rows, right=True)
            offsets = None
        parts = split_by_expert(self.experts, input, offsets, numbers)
        products = (
            layer(x) if is_exported or x.numel() else x.new_zeros(*x.shape[:-1], self.out_features)
            for x, layer in zip(parts, self.layers, strict=True)
        )
        return _join(products, input, self.out_features, offsets, numbers)

    def to_float(self) -> GroupedLinear:
        """A `GroupedLinear` with the same weights."""
        return GroupedLinear.on(self.dequantize(), self.bias)

    def extra_repr(self) -> str:
        """The shape and format, for printing a model."""
        return f"{self.experts}, {self.in_features}, {self.out_features}, bits={self.bits}"


def split_by_expert(
    experts: int, value: Tensor, offsets: Tensor | None = None, numbers: Tensor | None = None
) -> list[Tensor]:
    """The rows of an input or an output that belong to each expert, [..., width] each."""
    if offsets is not None:
        ends = offsets.tolist()
        return [value[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    if numbers is not None:
        return [value[numbers == expert] for expert in range(experts)]
    shape = (*value.shape[:-3], experts, *value.shape[-2:])
    return list(value.expand(shape).unbind(-3))


def _join(
    products: Iterator[Tensor],
    input: Tensor,
    width: int,
    offsets: Tensor | None,
    numbers: Tensor | None,
) -> Tensor:
    """Undo `split_by_expert` for the experts' outputs [..., width]."""
    if offsets is None and numbers is None:
        return torch.stack(list(products), -3)
    output = input.new_zeros(*input.shape[:-1], width)
    start = 0
    for expert, product in enumerate(products):
        if numbers is not None:
            output[numbers == expert] = product
        else:
            output[start : start + len(product)] = product
            start += len(product)
    return output
