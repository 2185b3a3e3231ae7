"""Static activation quantization: two functions that a graph calls.

before: `fc = self.fc(x)`
after:  `q = quantize_activation(x, scale, zero_point, self.x_divisor)`
        `fc = self.fc(dequantize_activation(q, scale, zero_point, x, self.x_divisor))`

The divisor is a vector that brings all channels to one magnitude before they share a grid. Where a
few channels are much larger than the others, as in many transformers, that is worth 10 dB.
"""

import torch
from torch import Tensor

from fxquant.numerics.integers import UINT8, dequantize_affine, quantize_affine

SMALLEST = 1e-6  # a channel that is smaller, compared to the largest, is as good as zero


def quantize_activation(
    x: Tensor, scale: float, zero_point: int, divisor: Tensor | None = None
) -> Tensor:
    """Round `x` to uint8 on a static grid: x ≈ scale · divisor · (q − zero_point).

    Args:
        x: [..., channels].
        scale: of the grid.
        zero_point: of the grid.
        divisor: [channels], float32, positive; None stands for ones.
    """
    grid = torch.tensor(scale), torch.tensor(float(zero_point))
    values = x.float() if divisor is None else x.float() / divisor
    return quantize_affine(values, *grid, UINT8).to(torch.uint8)


def dequantize_activation(
    q: Tensor, scale: float, zero_point: int, like: Tensor, divisor: Tensor | None = None
) -> Tensor:
    """The float values of `q` in the dtype of `like`, the tensor that was quantized."""
    values = dequantize_affine(q.float(), torch.tensor(scale), torch.tensor(float(zero_point)))
    return (values if divisor is None else values * divisor).to(like.dtype)


def channel_divisor(largest: Tensor) -> Tensor:
    """The divisor [channels] for channels of these largest magnitudes; at most 1, never 0."""
    relative = largest.float() / largest.max().clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(relative > SMALLEST, relative, torch.ones_like(relative))
