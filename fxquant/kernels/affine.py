"""Rounding floats to uint8 with known scales, and back, in C++ (csrc/affine.h) or as torch's ops.

Both give the same bits: the C++ goes through memory once, torch once for each of its operations.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fxquant.kernels.eager import is_plain
from fxquant.kernels.extension import FLOAT_TYPES, NOT_BUILT, _native
from fxquant.numerics.integers import UINT8, dequantize_affine, quantize_affine

IMAGE_DIMS = 4


def quantize_uint8(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """The uint8 q with x ≈ scale · (q − zero_point).

    Args:
        x: [..., channels], or any shape where there is one scale.
        scale: float32 [channels], or one number.
        zero_point: whole numbers as float32, of the same shape.
    """
    if FAULT is None and _is_served(x, x.dtype, scale, zero_point):
        return _quantize(x, scale, zero_point)
    return _quantize_in_torch(x, scale, zero_point)


def dequantize_uint8(q: Tensor, scale: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Tensor:
    """The floats scale · (q − zero_point) in `dtype`; shapes as for `quantize_uint8`."""
    if FAULT is None and q.dtype == torch.uint8 and _is_served(q, dtype, scale, zero_point):
        return _dequantize(q, scale, zero_point, dtype)
    return _dequantize_in_torch(q, scale, zero_point, dtype)


def quantize_samples(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """As `quantize_uint8`, with a grid for each sample.

    Args:
        x: [batch, *sample], or one sample.
        scale: float32, as many dimensions as `x`: [batch, 1, ...], or all 1 for one sample.
        zero_point: the same shape.
    """
    return _by_sample(quantize_uint8, _quantize_in_torch, x, scale, zero_point)


def dequantize_samples(q: Tensor, scale: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Tensor:
    """As `dequantize_uint8`, with a grid for each sample; shapes as for `quantize_samples`."""
    one, whole = (partial(f, dtype=dtype) for f in (dequantize_uint8, _dequantize_in_torch))
    return _by_sample(one, whole, q, scale, zero_point)


def _by_sample(
    one_grid: Callable[[Tensor, Tensor, Tensor], Tensor],
    in_torch: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
) -> Tensor:
    """`one_grid` of each sample; where nothing is gained by that, `in_torch` of all."""
    if scale.numel() == 1:
        return one_grid(x, scale.flatten(), zero_point.flatten())
    if not is_plain(x) or not len(scale):
        return in_torch(x, scale, zero_point)
    # With all its dimensions a sample shows how it lies, and so does what is made of it.
    grids = zip(x.split(1), scale.flatten(), zero_point.flatten(), strict=True)
    return torch.cat([one_grid(sample, s, z) for sample, s, z in grids])


def _is_served(x: Tensor, dtype: torch.dtype, scale: Tensor, zero_point: Tensor) -> bool:
    return (
        dtype in FLOAT_TYPES
        and is_plain(x)
        and (x.is_contiguous() or (scale.numel() == 1 and lies_last(x)))
        and x.numel() > 0
        and scale.shape == zero_point.shape
        and (scale.numel() == 1 or scale.shape == x.shape[-1:])
        and all(
            t.is_cpu and t.dtype == torch.float32 and t.is_contiguous() for t in (scale, zero_point)
        )
    )


def lies_last(x: Tensor) -> bool:
    """Whether it is one piece of memory with channels last."""
    return x.ndim == IMAGE_DIMS and x.is_contiguous(memory_format=torch.channels_last)


def _quantize(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    q = torch.empty_like(x, dtype=torch.uint8)
    _native.quantize_uint8(*_arguments(x, q, scale, zero_point))
    return q


def _dequantize(q: Tensor, scale: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Tensor:
    x = torch.empty_like(q, dtype=dtype)
    _native.dequantize_uint8(*_arguments(x, q, scale, zero_point))
    return x


def _arguments(x: Tensor, q: Tensor, scale: Tensor, zero_point: Tensor) -> tuple[Any, ...]:
    one_grid = scale.numel() == 1
    columns = x.numel() if one_grid else x.shape[-1]
    return (
        x.data_ptr(), FLOAT_TYPES[x.dtype], q.data_ptr(), x.numel() // columns, columns,
        scale.data_ptr(), zero_point.data_ptr(), one_grid, torch.get_num_threads(),
    )  # fmt: skip


def _quantize_in_torch(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return quantize_affine(x.float(), scale, zero_point, UINT8).to(torch.uint8)


def _dequantize_in_torch(
    q: Tensor, scale: Tensor, zero_point: Tensor, dtype: torch.dtype
) -> Tensor:
    return dequantize_affine(q.float(), scale, zero_point).to(dtype)


def self_test() -> str | None:
    """Round a small known tensor: why the extension cannot be trusted here, or None."""
    if NOT_BUILT is not None:
        return NOT_BUILT
    x = torch.arange(3 * 21, dtype=torch.float32, device="cpu").sin().view(3, 21)
    for scale, zero_point in (
        (x[0].abs() + 0.01, (x[1] * 100).round()),
        (x[2, 1], x.new_zeros(())),
    ):
        q = _quantize_in_torch(x, scale, zero_point)
        found = _dequantize(q, scale, zero_point, torch.float32)
        is_same = torch.equal(_quantize(x, scale, zero_point), q)
        if not is_same or not torch.equal(
            found, _dequantize_in_torch(q, scale, zero_point, torch.float32)
        ):
            return f"it computes wrong results on this CPU ({_native.instruction_sets()[0]})"
    return None


FAULT = self_test()  # once: later calls may run under a fake or meta device
