"""One quantized layer as plain integers: what every format is written from."""

from dataclasses import dataclass, replace

from torch import Tensor

from fxquant.modules.linear import QuantizedLinear
from fxquant.modules.linear_int8 import QuantizedLinearInt8
from fxquant.modules.linear_intn import QuantizedLinearIntN
from fxquant.numerics.grouping import activation_group
from fxquant.numerics.quantized_weight import QuantizedWeight


@dataclass(frozen=True)
class IntegerLayer:
    """A weight x ≈ scale · (q − zero_point), with unsigned integers whatever its width.

    Attributes:
        q: uint8 [out, in], values 0..2^bits − 1.
        scales: float32 [out, groups], of either sign.
        zero_points: float32 [out, groups].
        group_size: columns a group; all of them where a row has one scale.
        bits: of an integer.
        symmetric: whether every zero point is 2^(bits − 1).
        bias: float [out] or None.
        activation_group: inputs of a token that share a scale, where the layer rounds them to 8
            bits while it runs; None where it multiplies floats.
        code_book: the name of the 16 levels that `q` is one of, which no format has integers for.
    """

    q: Tensor
    scales: Tensor
    zero_points: Tensor
    group_size: int
    bits: int
    symmetric: bool
    bias: Tensor | None
    activation_group: int | None = None
    code_book: str | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        return self.q.shape[0], self.q.shape[1]

    @property
    def is_per_row(self) -> bool:
        """Whether a row has one scale."""
        return self.group_size >= self.shape[1]


def integer_layer(layer: QuantizedLinear) -> IntegerLayer | None:
    """The integers of `layer`, on the CPU; None for a class of layer that no format knows."""
    if not isinstance(layer, QuantizedLinearInt8 | QuantizedLinearIntN):
        return None
    found = integer_weight(layer.quantized_weight, layer.bias)
    if layer.activation == "float":
        return found
    size = activation_group(found.group_size, layer.in_features)
    return replace(found, activation_group=min(size, layer.in_features))


def integer_weight(weight: QuantizedWeight, bias: Tensor | None = None) -> IntegerLayer:
    """The integers of a weight that is in no layer, on the CPU.

    Args:
        weight: [out, in].
        bias: [out] or None.
    """
    own = None if bias is None else bias.detach().cpu()
    q, scales = weight.integers().cpu(), weight.scales.cpu()
    return IntegerLayer(
        q, scales, weight.zero_points.cpu(), weight.group_size, weight.bits, weight.symmetric, own,
        code_book=weight.code_book,
    )  # fmt: skip
