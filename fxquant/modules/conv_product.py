"""A convolution as the product that it is: rows are picked out of its input, never written down.

A row of the product is the patch that one place of the output reads, in the order of the weight's
columns: channels, and in each the places of the kernel. Where its elements lie follows from the
strides of the padded input: the row starts somewhere, and each column lies a fixed way from there.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.kernels.eager import is_plain
from fxquant.kernels.extension import FLOAT_TYPES
from fxquant.kernels.gradient import needs_gradient
from fxquant.kernels.native import NATIVE
from fxquant.modules.activation import integers_of_samples
from fxquant.modules.linear_intn import QuantizedLinearIntN

MOST_AWAY = 2**31 - 1  # a column's way from the start of its row is an int32
# With fewer outputs, torch's convolution on the dequantized weight is faster: to pick an element
# takes the time of about ten multiplications.
FEWEST_OUTPUTS = 128


def is_picked(conv: Any, x: Tensor, pads: list[int]) -> bool:
    """Whether the kernel computes this call, and not torch, as tracers and gradients need it."""
    return (
        can_pick(conv)
        and x.dtype in FLOAT_TYPES
        and is_plain(x)
        and x.numel() > 0
        and _farthest(x, pads, conv.dims) <= MOST_AWAY
        and not needs_gradient(x, conv.bias)
    )


def _farthest(x: Tensor, pads: list[int], dims: int) -> int:
    """How many elements lie between the first and the last of a padded sample."""
    sizes, strides = x.shape[-dims - 1 :], x.stride()[-dims - 1 :]
    if not any(pads):
        return sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True))
    padded = [n + sum(pads[2 * i : 2 * i + 2]) for i, n in enumerate(reversed(sizes[1:]))]
    return int(sizes[0]) * math.prod(padded)


def can_pick(conv: Any) -> bool:
    """Whether the kernel has products for this layer at all."""
    matrix = conv.matrix
    is_native = isinstance(matrix, QuantizedLinearIntN) and matrix.backend == NATIVE.name
    is_plain_layer = conv.groups == 1 and not conv.is_transposed
    return is_native and is_plain_layer and conv.out_channels >= FEWEST_OUTPUTS


def picked_product(conv: Any, x: Tensor, pads: list[int], mode: str, bias: Tensor | None) -> Tensor:
    """The convolution of `x`.

    Args:
        conv: a `QuantizedConv` that `is_picked`.
        x: [batch, channels, *places], or one sample.
        pads: what is padded, as `F.pad` takes it.
        mode: how, as `F.pad` takes it.
        bias: [channels of the output], or None.

    Returns:
        The output in the dtype of `x`, laid out as torch's convolution does.
    """
    dims = conv.dims
    batched = x if x.ndim == dims + 2 else x[None]
    is_contiguous = batched.is_contiguous()
    if conv.matrix.activation == "int8":
        y = _of_integers(conv, batched, pads, mode, bias)
    else:
        padded = F.pad(batched, pads, mode) if any(pads) else batched
        y = _product(conv, padded, bias, None, x.dtype)
    y = y.contiguous() if is_contiguous else y
    return y if x.ndim == dims + 2 else y[0]


def _of_integers(conv: Any, x: Tensor, pads: list[int], mode: str, bias: Tensor | None) -> Tensor:
    """With one grid for each sample: x ≈ scale · (q − zero point)."""
    q, scale, zero_point = integers_of_samples(x, conv.dims + 1)
    if any(pads):
        q = _padded_integers(q, zero_point, pads, mode)
    y = _product(conv, q, bias, scale.flatten(), torch.float32)
    # Σ w (q − zero point) = Σ w q − zero point · Σ w: both may be much larger than what is left.
    sums = conv.matrix.row_sums().view(-1, *(1,) * conv.dims)
    return y.addcmul_(sums, -scale * zero_point).to(x.dtype)


def _padded_integers(q: Tensor, zero_point: Tensor, pads: list[int], mode: str) -> Tensor:
    if mode != "constant":
        return F.pad(q.float(), pads, mode).to(torch.int8)
    sizes = list(q.shape)
    for axis, (before, after) in enumerate(zip(pads[::2], pads[1::2], strict=True), start=1):
        sizes[-axis] += before + after
    padded = q.new_empty(sizes).copy_(zero_point)  # the integer of 0
    inside = padded
    for axis, before in enumerate(pads[::2], start=1):
        inside = inside.narrow(-axis, before, q.shape[-axis])
    inside.copy_(q)
    return padded


def _product(
    conv: Any, x: Tensor, bias: Tensor | None, scales: Tensor | None, dtype: torch.dtype
) -> Tensor:
    places = [
        (size - spread * (width - 1) - 1) // step + 1
        for size, spread, width, step in zip(
            x.shape[2:], conv.dilation, conv.kernel_size, conv.stride, strict=True
        )
    ]
    rows = _starts(x.shape[:1], x.stride()[:1])
    for count, step, stride in zip(places, conv.stride, x.stride()[2:], strict=True):
        rows = rows[..., None] + torch.arange(count) * (step * stride)
    columns = _starts(x.shape[1:2], x.stride()[1:2])
    for width, spread, stride in zip(conv.kernel_size, conv.dilation, x.stride()[2:], strict=True):
        columns = columns[..., None] + torch.arange(width) * (spread * stride)
    if scales is not None:
        scales = scales.repeat_interleave(math.prod(places))
    y = conv.matrix.product_at(x, rows.flatten(), columns.flatten().int(), scales, bias, dtype)
    return y.view(len(x), *places, -1).movedim(-1, 1)


def _starts(sizes: torch.Size, strides: tuple[int, ...]) -> Tensor:
    return torch.arange(sizes[0]) * strides[0]
