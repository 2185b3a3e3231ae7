"""A Linear layer with per-channel INT8 weights: the wider choice, and the one for narrow layers."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.kernels.int8 import COLUMNS, matmul_int8, pad_int8
from fxquant.kernels.interface import check_input
from fxquant.kernels.reference import quantize_tokens
from fxquant.modules.linear import (
    FLOAT_DTYPES,
    QuantizedLinear,
    add_bias,
    check_grid,
    check_linear,
    check_names,
    check_saved,
    detached,
)
from fxquant.numerics.int8_weight import Int8Weight, quantize_weight_int8
from fxquant.numerics.weights import SCALE_DTYPE, rows_of_block

ACTIVATION_GROUP = 128  # inputs of a token that share a scale, if activations are quantized


class QuantizedLinearInt8(QuantizedLinear):
    """`nn.Linear` with weights x ≈ scale · q, q in -127..127, one scale a row.

    Attributes:
        _weight_int8: int8 [out, in].
        _scales: bfloat16 [out].
    """

    bits = 8
    _weight_int8: Tensor
    _scales: Tensor

    def __init__(
        self,
        weight: Int8Weight,
        bias: Tensor | None,
        activation: str = "float",
        weight_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(weight.q.shape[1], weight.q.shape[0], bias, activation, weight_dtype)
        self.register_buffer("_weight_int8", weight.q.contiguous())
        self.register_buffer("_scales", detached(weight.scales, SCALE_DTYPE))
        self._padded: tuple[Tensor, Tensor] | None = None

    @property
    def _kernel_weight(self) -> Tensor:
        """The layout of the kernel, never saved: columns are filled up where that is needed."""
        weight = self._weight_int8
        if weight.shape[1] % COLUMNS == 0:
            return weight
        if self._padded is None or self._padded[0] is not weight:
            self._padded = weight, pad_int8(weight)
        return self._padded[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_padded": None}

    @classmethod
    def from_float(cls, linear: nn.Linear) -> "QuantizedLinearInt8":
        """Round the weights of `linear` to nearest.

        Raises:
            WeightError: `linear` is no Linear, or its weight is not finite.
        """
        linear = check_linear(linear)
        weight = quantize_weight_int8(linear.weight.detach())
        return cls(weight, linear.bias, weight_dtype=linear.weight.dtype)

    def dequantize(self) -> Tensor:
        """The values of the weight, float32 [out, in]."""
        return Int8Weight(self._weight_int8, self._scales).dequantize()

    def weight_parts(self) -> Iterator[Tensor]:
        """The rows of `weight` in order, some at a time."""
        rows = rows_of_block(self.in_features)
        for q, scales in zip(self._weight_int8.split(rows), self._scales.split(rows), strict=True):
            yield Int8Weight(q, scales).dequantize()

    def forward(self, input: Tensor) -> Tensor:
        """Map `input` [..., in], of any floating dtype, to [..., out] of the same dtype.

        float64 is computed in float32: the weight has no more precision than that.

        Raises:
            OptionError: `input` is not floating, or has another last dimension.
        """
        if input.dtype is torch.float64:
            return self.forward(input.float()).double()
        check_input(input, self.in_features, self.bits)
        if self._activation == "int8":
            input = quantize_tokens(input.float(), ACTIVATION_GROUP).to(input.dtype)
        y = matmul_int8(input, self._kernel_weight, self._scales)
        return add_bias(y, self.bias)

    def describe(self) -> dict[str, Any]:
        """Plain data from which `rebuild` makes the layer again, with `saved_tensors`."""
        dtype = str(self._weight_dtype).removeprefix("torch.")
        return {"activation": self._activation, "dtype": dtype}

    def saved_tensors(self) -> dict[str, Tensor]:
        """The tensors to save."""
        tensors = {"weight_int8": self._weight_int8, "scales": self._scales}
        return tensors if self.bias is None else {**tensors, "bias": self.bias}

    @classmethod
    def rebuild(
        cls, description: dict[str, Any], tensors: dict[str, Tensor]
    ) -> "QuantizedLinearInt8":
        """Make a saved layer again.

        Raises:
            OptionError: the tensors do not fit each other.
        """
        where = "QuantizedLinearInt8"
        check_names(where, description, {"activation", "dtype"}, set())
        check_names(where, tensors, {"weight_int8", "scales"}, {"bias"})
        q: Any = tensors.get("weight_int8")
        scales: Any = tensors.get("scales")
        fits = isinstance(q, Tensor) and isinstance(scales, Tensor)
        check_saved(where, fits, "no weight and scales", "both")
        fits = q.dtype == torch.int8 and q.ndim == 2 and scales.shape == q.shape[:1]
        found = f"{q.dtype} of shape {list(q.shape)}, scales {list(scales.shape)}"
        check_saved(where, fits, found, "an int8 matrix and one scale a row")
        check_grid(where, tensors.get("bias"), scales, None)
        dtype = description["dtype"]
        check_saved(where, dtype in FLOAT_DTYPES, f"the dtype {dtype!r:.40}", "a floating dtype")
        activation = description["activation"]
        weight = Int8Weight(q, scales.float())
        return cls(weight, tensors.get("bias"), activation, FLOAT_DTYPES[dtype])
