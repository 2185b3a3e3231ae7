"""Activation quantization: two functions that a graph calls with ranges that are known before.

before: `fc = self.fc(x)`
after:  `q = quantize_activation(x, self.x_scale, self.x_zero_point)`
        `fc = self.fc(dequantize_activation(q, self.x_scale, self.x_zero_point, x))`

The input of a linear layer has a scale and a zero point for each channel. In many transformers a
few channels are much larger than the others; with one scale for the whole tensor, the others would
use a few levels only. Other layers have one for all channels, as the integer kernels of other
runtimes need it. `rounded_samples` and `rounded_vectors` are for ranges that are found while a
model runs.
"""

import torch
from torch import Tensor

from fxquant.kernels.affine import (
    dequantize_samples,
    dequantize_uint8,
    quantize_samples,
    quantize_uint8,
)
from fxquant.numerics.integers import UINT8, dequantize_affine, quantize_affine, safe_scale

LEAST_SCALE_RATIO = (
    1e-6  # channels narrower than this part of the widest share its scale: negligible
)
LARGEST_INT8 = 127
MOST_TIMES_FINER = 1024  # bounds `finer_by`, whose result multiplies a count of levels


def quantize_activation(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Round `x` to uint8 with given scales: x ≈ scale · (q − zero_point).

    Args:
        x: any shape, for scales of channels [..., channels].
        scale: float32, [channels] or a scalar.
        zero_point: whole numbers in 0..255 as float32, the same shape.
    """
    return quantize_uint8(x, scale, zero_point)


def dequantize_activation(q: Tensor, scale: Tensor, zero_point: Tensor, like: Tensor) -> Tensor:
    """The float values of `q` in the dtype of `like`, the tensor that was quantized.

    A gradient passes to `like` as if nothing was rounded, where nothing was clipped
    (straight-through estimator, Bengio et al., arXiv:1308.3432).
    """
    values = dequantize_uint8(q, scale, zero_point, like.dtype)
    if not (torch.is_grad_enabled() and like.requires_grad):
        return values
    low, high = (scale * (end - zero_point) for end in (UINT8.quant_min, UINT8.quant_max))
    passed = like * ((like >= low) & (like <= high))
    return passed + (values - passed).detach()


def rounded_samples(x: Tensor, dims: int) -> Tensor:
    """Round `x` to 8 bits on the fly, with one scale and zero point for each sample of a batch.

    Zero stays zero, so it does not matter whether padding comes before or after. A sample with NaN
    or Inf has NaN there. A gradient passes as if nothing was rounded.

    Args:
        x: [batch, *sample], or one sample.
        dims: how many dimensions a sample has.

    Returns:
        The rounded values in the dtype of `x`, the shape of `x`.
    """
    q, scale, zero_point = levels_of_samples(x.detach(), dims)
    rounded = dequantize_samples(q, scale, zero_point, x.dtype)
    return x + (rounded - x).detach() if x.requires_grad else rounded


def rounded_vectors(x: Tensor, axis: int | None) -> Tensor:
    """Round `x` to 8 bits on the fly, with one scale and zero point for each vector along an axis.

    Args:
        x: any shape; what holds no floats or has fewer dimensions is returned as it is.
        axis: negative; None: one grid for all of `x`.

    Returns:
        The rounded values in the dtype of `x`, the shape of `x`. A vector with NaN or Inf has NaN
        there. A gradient passes as if nothing was rounded.
    """
    if not x.is_floating_point() or not x.numel() or x.ndim < -(axis or 0):
        return x
    axes = tuple(range(-x.ndim, 0)) if axis is None else (axis,)
    values = x.detach()
    scale, zero_point = _grid_along(values, axes)
    q = quantize_affine(values.float(), scale, zero_point, UINT8).clamp_(max=2 * LARGEST_INT8)
    rounded = dequantize_affine(q, scale, zero_point).to(x.dtype)
    return x + (rounded - x).detach() if x.requires_grad else rounded


def integers_of_samples(x: Tensor, dims: int) -> tuple[Tensor, Tensor, Tensor]:
    """The integers of `rounded_samples`, as the kernel multiplies them.

    Returns:
        q, int8 in -127 to 127, the shape of `x`; scale and zero point, float32, broadcasting to it:
        x ≈ scale · (q - zero point). A sample with NaN or Inf has the scale NaN.
    """
    q, scale, zero_point = levels_of_samples(x, dims)
    return (q - LARGEST_INT8).view(torch.int8), scale, zero_point - LARGEST_INT8


def levels_of_samples(x: Tensor, dims: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same as uint8: 255 levels, as products of bytes have no room for -128 on some CPUs.

    The zero point is in 0 to 254: x ≈ scale · (q - zero point).
    """
    scale, zero_point = _grid_along(x, tuple(range(-dims, 0)))
    q = quantize_samples(x, scale, zero_point).clamp_(max=2 * LARGEST_INT8)
    return q, scale, zero_point


def _grid_along(x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Scale and zero point of 255 levels for what lies along `axes`, which become 1."""
    low, high = x.amin(axes, keepdim=True).float(), x.amax(axes, keepdim=True).float()
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = safe_scale((high - low) / (2 * LARGEST_INT8))
    scale = torch.where(scale.isfinite(), scale, torch.nan)
    return scale, (-low / scale).round()


def channel_qparams(
    lowest: Tensor, highest: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    """A scale and a zero point for each channel.

    Args:
        lowest: the smallest value of each channel, [channels].
        highest: the largest.
        low: what lies below in any channel is clipped, a scalar.
        high: what lies above.

    Returns:
        `(scale, zero_point)`, float32 [channels]; zero is represented exactly.
    """
    zero = torch.zeros_like(lowest)
    low = torch.minimum(torch.maximum(lowest, low.float()), zero)
    high = torch.maximum(torch.minimum(highest, high.float()), zero)
    scale = (high - low) / (UINT8.levels - 1)
    scale = torch.where(scale > scale.max() * LEAST_SCALE_RATIO, scale, scale.max())
    scale = safe_scale(scale)
    return scale, (-low / scale).round().clamp(UINT8.quant_min, UINT8.quant_max)


def finer_by(lowest: Tensor, highest: Tensor) -> int:
    """The ratio of the whole tensor's range to the median range of a channel, at least 1."""
    widths = highest - lowest
    common = highest.max() - lowest.min()
    finer = common / widths.median().clamp(min=torch.finfo(torch.float32).tiny)
    return int(finer.clamp(1, MOST_TIMES_FINER))
