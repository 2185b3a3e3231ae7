"""A Linear layer with per-channel INT8 weights: the wider choice, and the one for narrow layers."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import OptionError
from fxquant.kernels.int8 import matmul_int8, pad_int8
from fxquant.kernels.reference import quantize_tokens
from fxquant.modules.linear import QuantizedLinear, add_bias, check_linear, detached
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
    _kernel_weight: Tensor

    def __init__(self, weight: Int8Weight, bias: Tensor | None, activation: str = "float") -> None:
        super().__init__(weight.q.shape[1], weight.q.shape[0], bias, activation)
        self.register_buffer("_weight_int8", weight.q.contiguous())
        self.register_buffer("_scales", detached(weight.scales, SCALE_DTYPE))
        self._prepare()

    def _prepare(self) -> None:
        """Derive the kernel's layout; it is never saved."""
        self.register_buffer("_kernel_weight", pad_int8(self._weight_int8), persistent=False)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._prepare()

    @classmethod
    def from_float(cls, linear: nn.Linear) -> "QuantizedLinearInt8":
        """Round the weights of `linear` to nearest.

        Raises:
            WeightError: `linear` is no Linear, or its weight is not finite.
        """
        linear = check_linear(linear)
        return cls(quantize_weight_int8(linear.weight.detach()), linear.bias)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight [out, in], float32."""
        return Int8Weight(self._weight_int8, self._scales).dequantize()

    def weight_parts(self) -> Iterator[Tensor]:
        """The rows of `weight` in order, some at a time."""
        rows = rows_of_block(self.in_features)
        for q, scales in zip(self._weight_int8.split(rows), self._scales.split(rows), strict=True):
            yield Int8Weight(q, scales).dequantize()

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [..., in], float32, bfloat16 or float16, to [..., out] of the same dtype."""
        if self._activation == "int8":
            x = quantize_tokens(x.float(), ACTIVATION_GROUP).to(x.dtype)
        return add_bias(matmul_int8(x, self._kernel_weight, self._scales), self.bias)

    def describe(self) -> dict[str, Any]:
        """Plain data from which `rebuild` makes the layer again, with `saved_tensors`."""
        return {"activation": self._activation}

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
        q, scales = tensors["weight_int8"], tensors["scales"]
        if q.dtype != torch.int8 or q.ndim != 2 or scales.shape != q.shape[:1]:
            raise OptionError(
                "QuantizedLinearInt8",
                found=f"{q.dtype} of shape {list(q.shape)}, scales {list(scales.shape)}",
                needed="an int8 matrix and one scale a row",
                remedy="The file is damaged: save the model again.",
            )
        activation = description.get("activation", "float")  # files of version 0.1 have none
        return cls(Int8Weight(q, scales.float()), tensors.get("bias"), activation)
