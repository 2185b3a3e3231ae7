"""A convolution whose weight is packed: dequantized for the call, or run as the product it is.

The weight of a convolution is the matrix [out, in / groups · kernel], which multiplies the patches
of the input. That of a transposed one is [out · kernel, in / groups], which multiplies the input at
each place; what it gives is added up in the output.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.errors import OptionError
from fxquant.modules.activation import rounded_samples
from fxquant.modules.conv_integers import (
    Grid,
    as_torch_lays,
    convolved_samples,
    fused_call,
    has_integers,
    runs_on_integers,
)
from fxquant.modules.conv_product import can_pick, is_picked, picked_product
from fxquant.modules.layer import LayerAround
from fxquant.modules.linear import QuantizedLinear
from fxquant.modules.linear_of import linear_of
from fxquant.numerics.quantized_weight import QuantizedWeight

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
MOST_PLACES = 8192  # of a call that moments are made of; neighbours look alike
_RUN = (F.conv1d, F.conv2d, F.conv3d)
_RUN_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_OPTIONS = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation",
            "groups", "output_padding", "padding_mode")  # fmt: skip


class QuantizedConv(LayerAround):
    """`nn.Conv1d` to `nn.ConvTranspose3d` on a packed weight.

    A convolution of one place (kernel 1, no groups, no padding) runs as the linear layer it is, on
    the packed weight, and rounds its input as that does where `matrix` has the activation `"int8"`.
    Others round it with one grid for each sample of the batch, and multiply integers where the
    kernel has that (see `conv_integers`). Those without groups and with many outputs run on the
    packed weight too (see `conv_product`); of the rest the weight is dequantized for the call, and
    rounded inputs are made floats again.

    Args:
        dims: 1, 2 or 3 dimensions of space.
        is_transposed: whether it is a transposed convolution.
        in_channels: as in `nn.Conv2d`, as are all that follow.
        out_channels: see there.
        kernel_size: see there, one for each dimension.
        stride: see there.
        padding: see there; `"same"` and `"valid"` are allowed.
        dilation: see there.
        groups: see there.
        output_padding: as in `nn.ConvTranspose2d`.
        padding_mode: see there.
        bias: the bias [out_channels], or whether there will be one.
        matrix: the weight, as a quantized linear layer without bias.

    Raises:
        OptionError: sizes do not belong together.
    """

    replaces = (*CONVOLUTIONS, *TRANSPOSED)
    matrix: QuantizedLinear

    def __init__(
        self,
        dims: int,
        is_transposed: bool,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, ...],
        stride: tuple[int, ...],
        padding: Any,
        dilation: tuple[int, ...],
        groups: int,
        output_padding: tuple[int, ...],
        padding_mode: str,
        bias: Tensor | bool,
        matrix: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.dims, self.is_transposed = dims, is_transposed
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.padding = tuple(kernel_size), tuple(stride), padding
        self.dilation, self.groups = tuple(dilation), groups
        self.output_padding, self.padding_mode = tuple(output_padding), padding_mode
        tuples = (self.kernel_size, self.stride, self.dilation, self.output_padding)
        if (
            {len(sizes) for sizes in tuples} != {dims}
            or in_channels % groups
            or (out_channels % groups)
        ):
            raise OptionError(
                "QuantizedConv",
                found=f"{in_channels} to {out_channels} channels, {groups} groups, sizes {tuples}",
                needed=f"channels that groups divide, and {dims} sizes each",
                remedy="Pass the attributes of the float layer.",
            )
        own = torch.empty(out_channels) if bias is True else None
        self.register_buffer("bias", bias.detach().clone() if isinstance(bias, Tensor) else own)
        rows = out_channels * (math.prod(self.kernel_size) if is_transposed else 1)
        inputs = in_channels // groups * (1 if is_transposed else math.prod(self.kernel_size))
        empty = nn.Linear(inputs, rows, bias=False, device="meta")
        self.add_module("matrix", empty if matrix is None else matrix)

    @classmethod
    def of(cls, conv: Any, weight: QuantizedWeight, bias: Tensor | None) -> "QuantizedConv":
        """The quantized form of `conv`.

        Args:
            conv: the float layer.
            weight: its matrix.
            bias: [out_channels], or None.
        """
        is_transposed = isinstance(conv, TRANSPOSED)
        options = {name: getattr(conv, name) for name in _OPTIONS}
        matrix = linear_of(weight, None, conv.weight.dtype)
        given: Tensor | bool = False if bias is None else bias
        dims = len(conv.kernel_size)
        return cls(dims, is_transposed, bias=given, matrix=matrix, **options)

    @property
    def inner(self) -> QuantizedLinear:
        """The layer that multiplies by the matrix of the weight."""
        return self.matrix

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the float layer's weight."""
        if self.is_transposed:
            return self.in_channels, self.out_channels // self.groups, *self.kernel_size
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    def dequantize(self) -> Tensor:
        """The float32 weight in the shape of the float layer's."""
        matrix = self.matrix.dequantize()
        if not self.is_transposed:
            return matrix.view(self.weight_shape)
        outputs = self.out_channels // self.groups
        grouped = matrix.view(self.groups, outputs, *self.kernel_size, -1)
        return grouped.movedim(-1, 1).flatten(0, 1).contiguous()

    def forward(
        self,
        input: Tensor,
        output_size: list[int] | None = None,
        *,
        grid: Grid | None = None,
        like: Tensor | None = None,
        residual: Tensor | None = None,
        function: str = "none",
        to_grid: Grid | None = None,
        with_floats: bool = True,
    ) -> Any:
        """Convolve, as the float layer does.

        A fused graph passes what it computes around the convolution, in keywords.

        Args:
            input: [batch, channels, *places], or one sample; with `grid`, its integers as uint8.
            output_size: that of transposed layers.
            grid: scale and zero point of the integers, as `quantize_activation` takes them.
            like: a tensor whose dtype the floats have, with `grid`.
            residual: is added to the output.
            function: one of `kernels.functions.FUNCTIONS`, applied to the sum.
            to_grid: scale and zero point with which the output is rounded to uint8.
            with_floats: whether the floats are wanted beside these integers.

        Returns:
            The output in floats; with `to_grid`, both, or its integers alone.
        """
        around = (grid, residual, to_grid)
        if function != "none" or any(part is not None for part in around):
            return fused_call(self, input, grid, like, residual, function, to_grid, with_floats)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        if self.is_product:
            return self._product(input, bias)
        if self.matrix.activation == "int8" and runs_on_integers(self, input):
            return as_torch_lays(convolved_samples(self, input)[0], input)
        pads = self.pads
        if is_picked(self, input, pads):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            return picked_product(self, input, pads, mode, bias)
        if self.matrix.activation == "int8":
            input = rounded_samples(input, self.dims + 1)
        weight = self.dequantize().to(input.dtype)
        if self.is_transposed:
            output_padding = self._output_padding(input, output_size)
            return _RUN_TRANSPOSED[self.dims - 1](
                input, weight, bias, self.stride, self.padding, output_padding, self.groups,
                self.dilation,
            )  # fmt: skip
        padding = self.padding
        if self.padding_mode != "zeros":
            input, padding = _padded(self, input), 0
        return _RUN[self.dims - 1](
            input, weight, bias, self.stride, padding, self.dilation, self.groups
        )

    @property
    def activation_arithmetic(self) -> str | None:
        """See `QuantizedLayer`."""
        is_product = self.is_product or has_integers(self) or can_pick(self)
        is_float = self.matrix.activation == "float"
        return self.matrix.activation_arithmetic if is_product or is_float else "simulated"

    @property
    def pads(self) -> list[int]:
        """What is padded, the last dimension first, as `F.pad` takes it."""
        return _pads(self)

    @property
    def is_product(self) -> bool:
        """Whether it runs as the linear layer that it is."""
        is_point = math.prod(self.kernel_size) == 1 and not self.is_transposed
        return is_point and self.groups == 1 and not any(_pads(self))

    def _product(self, input: Tensor, bias: Tensor | None) -> Tensor:
        places: tuple[Any, ...] = (..., *(slice(None, None, step) for step in self.stride))
        rows = input[places].movedim(-self.dims - 1, -1)
        y = self.matrix(rows)
        return (y if bias is None else y + bias).movedim(-1, -self.dims - 1)

    def _output_padding(self, input: Tensor, output_size: list[int] | None) -> tuple[int, ...]:
        if output_size is None:
            return self.output_padding
        least = (
            (size - 1) * s - 2 * p + d * (k - 1) + 1
            for size, s, p, d, k in zip(
                input.shape[-self.dims :], self.stride, self.padding, self.dilation,
                self.kernel_size, strict=True,
            )
        )  # fmt: skip
        return tuple(n - m for n, m in zip(output_size[-self.dims :], least, strict=True))

    def to_float(self) -> nn.Module:
        """The float layer with the same weight."""
        kind = (TRANSPOSED if self.is_transposed else CONVOLUTIONS)[self.dims - 1]
        options = {name: getattr(self, name) for name in _OPTIONS}
        if not self.is_transposed:
            del options["output_padding"]
        made: Any = kind(**options, bias=self.bias is not None, device="meta")
        made.weight = nn.Parameter(self.dequantize(), requires_grad=False)
        if self.bias is not None:
            made.bias = nn.Parameter(self.bias, requires_grad=False)
        return made.eval()

    def extra_repr(self) -> str:
        """The shape, for printing a model."""
        kind = ", transposed" if self.is_transposed else ""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, groups={self.groups}{kind}"
        )


def matrix_of_convolution(conv: Any) -> Tensor:
    """The weight as the matrix of the docstring of this file; groups are blocks of rows."""
    if not isinstance(conv, TRANSPOSED):
        return conv.weight.flatten(1)
    grouped = conv.weight.unflatten(0, (conv.groups, -1)).movedim(1, -1)
    return grouped.flatten(0, -2)


def patches(conv: Any, input: Tensor) -> list[Tensor]:
    """What each group multiplies at some evenly spaced places: [places, in / groups · kernel]."""
    dims = len(conv.kernel_size)
    x = _padded(conv, _batched(conv, input))
    for axis, (size, step, spread) in enumerate(
        zip(conv.kernel_size, conv.stride, conv.dilation, strict=True), start=2
    ):
        x = x.unfold(axis, (size - 1) * spread + 1, step)[..., ::spread]
    x = _some_places(x, dims)  # [batch, channels, *places, *kernel]
    x = x.unflatten(1, (conv.groups, -1)).movedim((1, 2), (0, 2 + dims))
    return list(x.flatten(2 + dims).flatten(1, 1 + dims))


def outputs_at_patches(conv: Any, output: Tensor, *_: Any) -> list[Tensor]:
    """What each group gives at the places of `patches`: [places, out / groups]."""
    dims = len(conv.kernel_size)
    y = _some_places(_batched(conv, output), dims).movedim(1, -1)
    return list(y.flatten(0, dims).chunk(conv.groups, -1))


def channels_at_places(conv: Any, input: Tensor, *_: Any) -> list[Tensor]:
    """What each group of a transposed convolution multiplies: [places, in / groups]."""
    dims = len(conv.kernel_size)
    x = _some_places(_batched(conv, input), dims).movedim(1, -1)
    return list(x.flatten(0, dims).chunk(conv.groups, -1))


def _batched(conv: Any, value: Tensor) -> Tensor:
    return value if value.ndim == len(conv.kernel_size) + 2 else value[None]


def _some_places(x: Tensor, dims: int) -> Tensor:
    """`x` [batch, channels, *places, ...] at evenly spaced places, `MOST_PLACES` or a few more."""
    count = x.shape[0] * math.prod(x.shape[2 : 2 + dims])
    step = max(1, round((count / MOST_PLACES) ** (1 / dims)))
    return x[(slice(None), slice(None), *(slice(None, None, step),) * dims)]


def _pads(conv: Any) -> list[int]:
    """What is padded, the last dimension first, as `F.pad` takes it."""
    if isinstance(conv.padding, str):
        totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        if conv.padding == "valid":
            totals = [0] * len(totals)
        return [n for total in reversed(totals) for n in (total // 2, total - total // 2)]
    sizes = (conv.padding,) if isinstance(conv.padding, int) else conv.padding
    return [size for size in reversed(sizes) for _ in range(2)]


def _padded(conv: Any, input: Tensor) -> Tensor:
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(input, _pads(conv), mode) if any(_pads(conv)) else input
