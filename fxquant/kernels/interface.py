"""The one interface of the product with a quantized weight: what every backend offers."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fxquant.errors import OptionError
from fxquant.numerics.code_books import integer_type
from fxquant.numerics.quantized_weight import QuantizedWeight


@dataclass(frozen=True)
class LinearSpec:
    """What a backend must know of a layer.

    Attributes:
        out_features: rows of the weight.
        in_features: columns of the weight.
        group_size: columns a group; the last group may be short.
        symmetric: whether every zero point is `middle`.
        activation: `"float"`, or `"int8"` for activations quantized on the fly.
        bits: of what is stored of an integer of the weight.
        code_book: as in `QuantizedWeight`.
    """

    out_features: int
    in_features: int
    group_size: int
    symmetric: bool
    activation: str = "float"
    bits: int = 4
    code_book: str | None = None

    @property
    def middle(self) -> float:
        """The zero point of symmetric weights."""
        return integer_type(self.bits, self.code_book).middle

    def weight(self, packed: Tensor, scales: Tensor, zero_points: Tensor) -> QuantizedWeight:
        """The weight of these tensors, which are as `QuantizedWeight` has them."""
        return QuantizedWeight(
            packed, scales, zero_points, self.group_size, self.in_features, self.symmetric,
            self.bits, self.code_book,
        )  # fmt: skip


def check_input(x: Tensor, in_features: int, bits: int) -> None:
    """Refuse what a float linear layer refuses.

    Raises:
        OptionError: `x` is not floating, or its last dimension is not `in_features`.
    """
    if not x.is_floating_point() or not x.ndim or x.shape[-1] != in_features:
        raise OptionError(
            f"INT{bits} linear layer",
            found=f"an input of {x.dtype} and shape {list(x.shape)}",
            needed=f"a floating tensor whose last dimension is {in_features}",
            remedy="Pass what the float layer takes.",
        )


class LinearBackend(Protocol):
    """A way to compute x · weightᵀ + bias.

    The same inputs and number of threads give the same bits at each call, and `pack` derives the
    same bits from the same weight.
    """

    name: str

    def unsupported(self, spec: LinearSpec, device: torch.device) -> str | None:
        """Why this backend cannot serve the layer, or None."""

    def pack(self, weight: QuantizedWeight, spec: LinearSpec) -> tuple[Tensor, ...]:
        """The backend's own layout of a weight."""

    def unpack(self, tensors: tuple[Tensor, ...], spec: LinearSpec) -> QuantizedWeight:
        """Undo `pack`, exactly."""

    def rows(
        self, tensors: tuple[Tensor, ...], spec: LinearSpec, places: Tensor
    ) -> QuantizedWeight:
        """Some rows of what `unpack` gives; `places` are whole numbers [n] in 0..out - 1."""

    def matmul(
        self,
        x: Tensor,
        tensors: tuple[Tensor, ...],
        spec: LinearSpec,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Map `x` [..., in], float32, bfloat16 or float16, to [..., out] in the dtype of `x`.

        Args:
            x: the activations.
            tensors: what `pack` returned.
            spec: what `pack` was given.
            bias: [out] in any float dtype, added to the product.
        """
