"""The one interface of the INT4 matrix product, and the choice of a backend."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fxquant.numerics.weights import Int4Weight


@dataclass(frozen=True)
class LinearSpec:
    """What a backend must know of a layer.

    Attributes:
        out_features: rows of the weight.
        in_features: columns of the weight.
        group_size: columns a group; the last group may be short.
        symmetric: whether every zero point is 8.
        activation: `"float"`, or `"int8"` for activations quantized on the fly.
    """

    out_features: int
    in_features: int
    group_size: int
    symmetric: bool
    activation: str = "float"


class Int4Backend(Protocol):
    """A way to compute x · weightᵀ."""

    name: str

    def unsupported(self, spec: LinearSpec, device: torch.device) -> str | None:
        """Why this backend cannot serve the layer, or None."""

    def pack(self, weight: Int4Weight, spec: LinearSpec) -> tuple[Tensor, ...]:
        """The backend's own layout of a weight."""

    def matmul(self, x: Tensor, tensors: tuple[Tensor, ...], spec: LinearSpec) -> Tensor:
        """Map `x` [..., in] to [..., out] in the dtype of `x`."""
