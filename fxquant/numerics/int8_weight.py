"""Per-channel INT8 weights: one symmetric scale for each output row."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.numerics.integers import INT8, dequantize_affine, quantize_affine, safe_scale
from fxquant.numerics.weights import SCALE_DTYPE, check_weight


@dataclass(frozen=True)
class Int8Weight:
    """A matrix of 8-bit integers: x ≈ scale · q.

    Attributes:
        q: int8 [out, in].
        scales: float32 [out], representable in bfloat16.
    """

    q: Tensor
    scales: Tensor

    def dequantize(self) -> Tensor:
        """The float32 weight [out, in]."""
        return dequantize_affine(self.q, self.scales.float()[:, None], torch.zeros(()))


def quantize_weight_int8(weight: Tensor) -> Int8Weight:
    """Round `weight` [out, in] to nearest, each row's largest magnitude on level 127.

    Raises:
        WeightError: the weight is not a finite matrix.
    """
    check_weight(weight)
    largest = weight.abs().amax(dim=1).float()
    scales = safe_scale((largest / INT8.quant_max).to(SCALE_DTYPE).float())
    q = quantize_affine(weight.float(), scales[:, None], torch.zeros(()), INT8)
    return Int8Weight(q.to(torch.int8), scales)
