"""A convolution on integers: its input is rounded before, its output may be rounded again.

The kernel (`kernels/convolution`) takes weights with one scale for each output, in an order of its
own: channels last. Other weights, and other devices, compute the same in floats.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxquant.errors import OptionError
from fxquant.kernels.affine import dequantize_uint8, lies_last, quantize_uint8
from fxquant.kernels.convolution import MOST_INPUTS, Kernel, Steps, convolve, is_served, pack_kernel
from fxquant.kernels.eager import is_plain
from fxquant.kernels.extension import FLOAT_TYPES
from fxquant.kernels.functions import FUNCTIONS
from fxquant.kernels.gradient import needs_gradient
from fxquant.kernels.native import NATIVE
from fxquant.modules.activation import levels_of_samples
from fxquant.modules.linear_intn import QuantizedLinearIntN

Grid = tuple[Tensor, Tensor]  # scale and zero point, one number each


def has_integers(conv: Any) -> bool:
    """Whether the kernel has products for this layer at all."""
    matrix = conv.matrix
    return (
        isinstance(matrix, QuantizedLinearIntN)
        and matrix.backend == NATIVE.name
        and matrix.symmetric
        and matrix.group_size >= matrix.in_features
        and matrix.in_features <= MOST_INPUTS
        and conv.dims <= 2
        and conv.groups == 1
        and not conv.is_transposed
        and conv.padding_mode == "zeros"
    )


@dataclass(frozen=True)
class PackedConv:
    """A layer's weight as the kernel reads it, and where it is put."""

    kernel: Kernel
    steps: Steps


def runs_on_integers(conv: Any, x: Tensor, residual: Tensor | None = None) -> bool:
    """Whether the kernel computes this call, and not torch, as tracers and gradients need it."""
    if not is_plain(x) or x.ndim not in (conv.dims + 1, conv.dims + 2):
        return False
    packed = _packed(conv)
    if packed is None or needs_gradient(x, conv.bias):
        return False
    if residual is not None and needs_gradient(residual, None):
        return False
    return is_served(_images(conv, x), residual, packed.kernel.size, packed.steps)


def convolved_samples(conv: Any, x: Tensor, **around: Any) -> tuple[Tensor | None, Tensor | None]:
    """The convolution of floats that are rounded with one grid for each sample.

    Args:
        conv: a layer that `runs_on_integers`.
        x: [batch, channels, *places], or one sample.
        around: see `convolved`.
    """
    x = x if x.dtype in FLOAT_TYPES else x.float()
    q, scale, zero_point = levels_of_samples(x, conv.dims + 1)
    grid = scale.flatten(), zero_point.flatten()
    return convolved(conv, q, grid, x.dtype, **around)


def convolved(
    conv: Any,
    q: Tensor,
    grid: Grid,
    dtype: torch.dtype | None,
    residual: Tensor | None = None,
    function: str = "none",
    to_grid: Grid | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The convolution of integers, as `kernels.convolution.convolve` gives it.

    Args:
        conv: a layer that `runs_on_integers`.
        q: uint8 [batch, channels, *places], or one sample.
        grid: scale and zero point of `q`, one number or one for each sample.
        dtype: of the output, or None.
        residual: see `convolve`, as are the others.
        function: see there.
        to_grid: see there.
    """
    packed = _packed(conv)
    assert packed is not None  # it runs on integers
    scale, zero_point = map(_float32, grid)
    found = convolve(
        _images(conv, q),
        scale,
        zero_point,
        packed.kernel,
        packed.steps,
        conv.bias,
        None if residual is None else _images(conv, residual),
        function,
        dtype,
        None if to_grid is None else (_float32(to_grid[0]), _float32(to_grid[1])),
    )
    y, rounded = (_samples(conv, part, q.ndim) for part in found)
    return y, rounded


def fused_call(
    conv: Any,
    x: Tensor,
    grid: Grid | None,
    like: Tensor | None,
    residual: Tensor | None,
    function: str,
    to_grid: Grid | None,
    with_floats: bool,
) -> Any:
    """A convolution with what a graph computes around it: see `QuantizedConv.forward`."""
    dtype = x.dtype if like is None else like.dtype
    if like is not None and needs_gradient(like, None):
        raise OptionError(
            "fused convolution",
            found="an input that requires a gradient",
            needed="one without: between fused layers there are integers, which pass none on",
            remedy="Use the graph that fuse was given, or run under torch.no_grad().",
        )
    # Other residuals are added as torch does: numbers, those of another dtype or shape.
    is_like = residual is None or (isinstance(residual, Tensor) and residual.dtype == dtype)
    is_served = is_like and dtype in FLOAT_TYPES and runs_on_integers(conv, x, residual)
    if is_served and (residual is None or residual.shape == _shape(conv, x)):
        of_floats = dtype if with_floats else None
        if grid is None:
            y, q = convolved_samples(conv, x, residual=residual, function=function, to_grid=to_grid)
        else:
            y, q = convolved(conv, x, grid, of_floats, residual, function, to_grid)
    else:
        values = x if grid is None else dequantize_uint8(x, *grid, dtype)
        y = conv(values)
        y = FUNCTIONS[function](y if residual is None else y + residual)
        q = None if to_grid is None else quantize_uint8(y, *to_grid)
    if to_grid is None:
        return y
    return (y, q) if with_floats else q


def as_torch_lays(y: Tensor | None, x: Tensor) -> Tensor:
    """`y` in memory as torch's convolution of `x` gives it: channels last where `x` has them so."""
    assert y is not None  # floats were wanted
    return y if lies_last(x) and not x.is_contiguous() else y.contiguous()


def _packed(conv: Any) -> PackedConv | None:
    """Made once for a weight; None where the kernel has no products for the layer."""
    matrix = conv._modules["matrix"]  # sooner read than an attribute of a module
    if not isinstance(matrix, QuantizedLinearIntN):
        return None
    return matrix.derived(_packed_of, conv)


def _packed_of(conv: Any) -> PackedConv | None:
    if not has_integers(conv):
        return None
    weight = conv.matrix.quantized_weight
    q = (weight.integers().int() - int(weight.integer.middle)).to(torch.int8)
    height, width = _pair(conv.kernel_size, 1)
    kernel = pack_kernel(q.view(len(q), -1, height, width), weight.scales[:, 0])
    pads = conv.pads
    before, after = tuple(pads[::2][::-1]), tuple(pads[1::2][::-1])
    sides = _pair(conv.stride, 1), _pair(conv.dilation, 1), _pair(before, 0), _pair(after, 0)
    return PackedConv(kernel, Steps(*sides))


def _shape(conv: Any, x: Tensor) -> torch.Size:
    """That of the output."""
    packed, images = _packed(conv), _images(conv, x)
    assert packed is not None  # it runs on integers
    places = packed.steps.places(images.shape, packed.kernel.size)
    sizes = (len(images), conv.out_channels, *places[-conv.dims :])
    return torch.Size(sizes if x.ndim == conv.dims + 2 else sizes[1:])


def _images(conv: Any, x: Tensor) -> Tensor:
    """[batch, channels, height, width]; the height of one dimension is 1."""
    batched = x if x.ndim == conv.dims + 2 else x[None]
    return batched if conv.dims > 1 else batched.unsqueeze(2)


def _samples(conv: Any, x: Tensor | None, dimensions: int) -> Tensor | None:
    """Undo `_images` for a value that had so many dimensions."""
    if x is None:
        return None
    places = x if conv.dims > 1 else x.squeeze(2)
    return places if dimensions == conv.dims + 2 else places[0]


def _pair(sizes: tuple[int, ...], first: int) -> tuple[int, int]:
    """Height and width; of one dimension, `first` and its size."""
    return (first, sizes[0]) if len(sizes) == 1 else (sizes[0], sizes[1])


def _float32(numbers: Tensor) -> Tensor:
    is_so = numbers.dtype is torch.float32 and numbers.is_contiguous()
    return numbers if is_so else numbers.float().contiguous()
