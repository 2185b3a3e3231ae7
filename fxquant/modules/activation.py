"""Static activation quantization: two functions that a graph calls.

before: `fc = self.fc(x)`
after:  `q = quantize_activation(x, scale, zero_point)`
        `fc = self.fc(dequantize_activation(q, scale, zero_point, x))`
"""

import torch
from torch import Tensor

from fxquant.numerics.integers import UINT8, dequantize_affine, quantize_affine


def quantize_activation(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """Round `x`, any shape, to uint8 on a per-tensor grid: x ≈ scale · (q − zero_point)."""
    grid = torch.tensor(scale), torch.tensor(float(zero_point))
    return quantize_affine(x.float(), *grid, UINT8).to(torch.uint8)


def dequantize_activation(q: Tensor, scale: float, zero_point: int, like: Tensor) -> Tensor:
    """The float values of `q` in the dtype of `like`, the tensor that was quantized."""
    values = dequantize_affine(q.float(), torch.tensor(scale), torch.tensor(float(zero_point)))
    return values.to(like.dtype)
