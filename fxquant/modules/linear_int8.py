"""A Linear layer with per-channel INT8 weights: the wider choice, and the one for narrow layers."""

from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import OptionError
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
from fxquant.numerics.quantized_weight import SCALE_DTYPE, QuantizedWeight, symmetric_zero_point
from fxquant.numerics.weights import quantize_weight_int8

ACTIVATION_GROUP = 128  # inputs of a token that share a scale, if activations are quantized
_TOP_BIT = 0x80  # flips 0..255 to -128..127


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
        weight: QuantizedWeight,
        bias: Tensor | None,
        activation: str = "float",
        weight_dtype: torch.dtype = torch.float32,
    ) -> None:
        out_features, in_features = weight.shape
        form = weight.bits, weight.symmetric, weight.scales.shape[1]
        if form != (self.bits, True, 1):
            raise OptionError(
                "QuantizedLinearInt8",
                found=f"a weight of {weight.bits} bits with {weight.scales.shape[1]} groups a row",
                needed="a symmetric one of 8 bits with one group a row",
                remedy="Use QuantizedLinearIntN for other weights.",
            )
        super().__init__(in_features, out_features, bias, activation, weight_dtype)
        q = (weight.packed ^ _TOP_BIT).view(torch.int8)
        self.register_buffer("_weight_int8", q.contiguous())
        self.register_buffer("_scales", detached(weight.scales[:, 0], SCALE_DTYPE))
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

    @property
    def quantized_weight(self) -> QuantizedWeight:
        """The integers, plus 128, with a scale for each row."""
        return _as_weight(self._weight_int8, self._scales)

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
        return cls(_as_weight(q, scales), tensors.get("bias"), activation, FLOAT_DTYPES[dtype])


def _as_weight(q: Tensor, scales: Tensor) -> QuantizedWeight:
    """The weight of integers int8 [out, in] and scales [out]."""
    grid = scales.float()[:, None]
    middle = torch.full_like(grid, symmetric_zero_point(QuantizedLinearInt8.bits))
    packed = q.view(torch.uint8) ^ _TOP_BIT
    in_features = q.shape[1]
    return QuantizedWeight(packed, grid, middle, in_features, in_features, True, 8)
