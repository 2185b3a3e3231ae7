"""The largest value of each window of an image with channels last, in C++ (csrc/pooling.h).

torch's own loops take several times as long there, on float32. Both give the same bits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.kernels.affine import lies_last
from fxquant.kernels.convolution import Steps
from fxquant.kernels.eager import is_plain
from fxquant.kernels.extension import FLOAT_TYPES, NOT_BUILT, _native

Pair = tuple[int, int]


def max_pool(x: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """What `F.max_pool2d` gives, laid out as `x` is.

    Args:
        x: [batch, channels, height, width], or one sample.
        kernel: height and width, as are all that follow.
        stride: from place to place.
        padding: on both sides; at most half of the kernel.
        dilation: from column to column of the kernel.
    """
    steps = Steps(stride, dilation, padding, padding)
    needs_gradient = torch.is_grad_enabled() and x.requires_grad
    is_served = FAULT is None and is_plain(x) and x.dtype in FLOAT_TYPES and lies_last(x)
    # A file may hold any sizes: torch says what is wrong with those that do not fit each other.
    fits = all(0 <= 2 * side <= size for side, size in zip(padding, kernel, strict=True))
    fits = fits and min(*kernel, *stride, *dilation) > 0
    is_served = is_served and fits and x.numel() > 0 and not needs_gradient
    if not is_served or min(steps.places(x.shape, kernel)) < 1:
        return F.max_pool2d(x, kernel, stride, padding, dilation)
    return _natively(x, kernel, steps)


def _natively(x: Tensor, kernel: Pair, steps: Steps) -> Tensor:
    batch, channels, *size = x.shape
    places = steps.places(x.shape, kernel)
    shape = batch, channels, *places
    y = torch.empty(shape, dtype=x.dtype, device="cpu", memory_format=torch.channels_last)
    is_sound = _native.pool_largest(
        x.data_ptr(),
        FLOAT_TYPES[x.dtype],
        (batch, *size, channels),
        (*kernel, *steps.stride, *steps.dilation, *steps.before),
        places,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    assert is_sound  # a pooling that torch would do
    return y


def self_test() -> str | None:
    """Pool a small known image: why the extension cannot be trusted here, or None."""
    if NOT_BUILT is not None:
        return NOT_BUILT
    x = torch.arange(2 * 5 * 6 * 7, dtype=torch.float32, device="cpu").sin().view(2, 5, 6, 7)
    x = x.contiguous(memory_format=torch.channels_last)
    found = _natively(x, (3, 2), Steps((2, 1), (1, 2), (1, 0), (1, 0)))
    if not torch.equal(found, F.max_pool2d(x, (3, 2), (2, 1), (1, 0), (1, 2))):
        return f"it computes wrong results on this CPU ({_native.instruction_sets()[0]})"
    return None


FAULT = self_test()  # once: later calls may run under a fake or meta device
