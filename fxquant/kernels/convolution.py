"""Convolutions of uint8 activations with int8 weights, in C++ (csrc/convolution.h).

Tensors have torch's shapes, [batch, channels, height, width], and lie with channels last: the runs
of channels that a place of the output reads are copied as vectors, and integers go from layer to
layer without a step in between.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.kernels.eager import is_plain
from fxquant.kernels.extension import FLOAT_TYPES, NOT_BUILT, _native
from fxquant.kernels.functions import FUNCTIONS, NUMBERS

SLAB, LANE, CHUNK, WORD = 32, 16, 64, 4  # as in csrc/convolution.h; inputs of a 32-bit word
MOST_INPUTS = (1 << 31) // (255 * 128)  # whose sums int32 holds
LAST = torch.channels_last
IMAGE_DIMS = 4


@dataclass(frozen=True)
class Kernel:
    """The weight of a convolution as the C++ reads it.

    Attributes:
        weight: int8 [lanes, inputs / 4, 16, 4], padded with zeros.
        scales: float32 [outputs, padded], one for each output.
        sums: int32 [outputs, padded], of the weight's integers.
        outputs: channels of the output.
        size: height and width.
    """

    weight: Tensor
    scales: Tensor
    sums: Tensor
    outputs: int
    size: tuple[int, int]


@dataclass(frozen=True)
class Steps:
    """Where a kernel is put on its input; each for height and width.

    Attributes:
        stride: from place to place.
        dilation: from column to column of the kernel.
        before: padding before the first row and column; it stands for 0.
        after: padding behind the last ones.
    """

    stride: tuple[int, int]
    dilation: tuple[int, int]
    before: tuple[int, int]
    after: tuple[int, int]

    def places(self, shape: torch.Size, kernel: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the output for an input [batch, channels, height, width]."""
        (top, left), (bottom, right) = self.before, self.after
        high, wide = ((k - 1) * d + 1 for k, d in zip(kernel, self.dilation, strict=True))
        rows, columns = shape[2] + top + bottom - high, shape[3] + left + right - wide
        return rows // self.stride[0] + 1, columns // self.stride[1] + 1


def pack_kernel(q: Tensor, scales: Tensor) -> Kernel:
    """Rearrange a weight.

    Args:
        q: int8 [outputs, channels, height, width].
        scales: float32 [outputs].
    """
    outputs, _, *size = q.shape
    rows = q.permute(0, 2, 3, 1).flatten(1)
    rows = F.pad(rows, (0, -rows.shape[1] % CHUNK, 0, -outputs % SLAB))
    lanes = rows.view(-1, LANE, rows.shape[1] // WORD, WORD).transpose(1, 2).contiguous()
    padded = F.pad(scales.float(), (0, -outputs % SLAB))
    return Kernel(lanes, padded, rows.sum(1, dtype=torch.int32), outputs, (size[0], size[1]))


def convolve(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    kernel: Kernel,
    steps: Steps,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    function: str = "none",
    dtype: torch.dtype | None = torch.float32,
    to_grid: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """A function of the convolution of scale · (x − zero point), plus bias and residual.

    Args:
        x: a plain uint8 tensor [batch, channels, height, width].
        scale: float32, one number or [batch], as is `zero_point`, whose numbers are whole.
        zero_point: see there.
        kernel: from `pack_kernel`, for as many channels.
        steps: where it is put; there is at least one place.
        bias: [outputs], or None.
        residual: floats of the shape of the output, added to it, or None.
        function: one of `FUNCTIONS`.
        dtype: of the output, or None where no floats are wanted.
        to_grid: scale and zero point of the output as uint8, float32, or None where that is not
            wanted.

    Returns:
        The output and its integers, [batch, outputs, height, width] with channels last.
    """
    x = x.contiguous(memory_format=LAST)
    batch, channels, *size = x.shape
    height, width = steps.places(x.shape, kernel.size)
    shape = batch, kernel.outputs, height, width
    bias = None if bias is None else _floats(bias).contiguous()
    residual = None if residual is None else _floats(residual).contiguous(memory_format=LAST)
    y = q = None
    if dtype is not None:
        y = torch.empty(shape, dtype=dtype, device="cpu", memory_format=LAST)
    if to_grid is not None:
        q = torch.empty(shape, dtype=torch.uint8, device="cpu", memory_format=LAST)
    is_sound = _native.convolve(
        x.data_ptr(),
        (batch, *size, channels),
        (*kernel.size, *steps.stride, *steps.dilation, *steps.before),
        (height, width, kernel.outputs),
        kernel.weight.data_ptr(),
        kernel.scales.data_ptr(),
        kernel.sums.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else FLOAT_TYPES[bias.dtype],
        scale.data_ptr(),
        zero_point.data_ptr(),
        scale.numel(),
        0 if residual is None else residual.data_ptr(),
        0 if residual is None else FLOAT_TYPES[residual.dtype],
        NUMBERS[function],
        0 if y is None else y.data_ptr(),
        0 if dtype is None else FLOAT_TYPES[dtype],
        0 if q is None else q.data_ptr(),
        0 if to_grid is None else to_grid[0].data_ptr(),
        0 if to_grid is None else to_grid[1].data_ptr(),
        torch.get_num_threads(),
    )
    assert is_sound  # a layer's own kernel, which fits its input
    return y, q


def is_served(x: Tensor, residual: Tensor | None, kernel: tuple[int, int], steps: Steps) -> bool:
    """Whether `convolve` computes a call: plain tensors, and a kernel that fits into its input."""
    return (
        FAULT is None
        and is_plain(x)
        and x.ndim == IMAGE_DIMS
        and x.numel() > 0
        and min(steps.places(x.shape, kernel)) > 0
        and (residual is None or is_plain(residual))
    )


def _floats(x: Tensor) -> Tensor:
    return x if x.dtype in FLOAT_TYPES else x.float()


def self_test() -> str | None:
    """Convolve a small known tensor: why the extension cannot be trusted here, or None."""
    if NOT_BUILT is not None:
        return NOT_BUILT
    numbers = torch.arange(2 * 40 * 3 * 7, dtype=torch.int32, device="cpu") * 2654435
    x = (numbers[: 2 * 5 * 6 * 7] >> 7 & 255).view(2, 5, 6, 7).to(torch.uint8)
    q = ((numbers[: 40 * 5 * 2] >> 5 & 127) - 60).view(40, 5, 2, 1).to(torch.int8)
    steps = Steps((2, 1), (1, 1), (1, 0), (0, 0))
    scale, zero_point = numbers.new_tensor([[1], [3]]).float()
    residual = numbers.view(2, 40, 3, 7).float() % 7
    scales = numbers[:40].float() % 3 + 1
    found = convolve(
        x, scale, zero_point, pack_kernel(q, scales), steps, None, residual, "relu",
        torch.float32, tuple(numbers.new_tensor([[4096], [8]]).float()),
    )  # fmt: skip
    padded = F.pad(x.float() - 3, (0, 0, 1, 0))
    product = F.conv2d(padded.double(), q.double(), stride=steps.stride).float()
    expected = FUNCTIONS["relu"](product * scales[:, None, None] + residual)
    rounded = (expected / 4096 + 8).round().clamp(0, 255)
    for part, wanted in zip(found, (expected, rounded), strict=True):
        if part is None or not torch.equal(part.float(), wanted):
            return f"it computes wrong results on this CPU ({_native.instruction_sets()[0]})"
    return None


FAULT = self_test()  # once: later calls may run under a fake or meta device
