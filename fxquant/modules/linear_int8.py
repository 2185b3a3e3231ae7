"""A Linear layer with per-channel INT8 weights: the wider choice, and the one for narrow layers."""

from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import OptionError
from fxquant.modules.linear import (
    FLOAT_DTYPES,
    check_grid,
    check_linear,
    check_names,
    check_saved,
)
from fxquant.modules.linear_intn import QuantizedLinearIntN
from fxquant.numerics.integers import UINT8
from fxquant.numerics.quantized_weight import SCALE_DTYPE, QuantizedWeight
from fxquant.numerics.weights import quantize_weight_int8

_TOP_BIT = 0x80  # flips 0..255 to -128..127


class QuantizedLinearInt8(QuantizedLinearIntN):
    """`nn.Linear` with weights x ≈ scale · q, q in -127..127, one scale a row.

    Files and `state_dict` hold, derived from the kernel's layout as in `QuantizedLinearIntN`:

    - `_weight_int8`: int8 [out, in].
    - `_scales`: bfloat16 [out].
    """

    bits = 8
    _options = ("activation", "dtype")

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None,
        activation: str = "float",
        weight_dtype: torch.dtype = torch.float32,
    ) -> None:
        form = weight.bits, weight.symmetric, weight.scales.shape[1]
        if form != (self.bits, True, 1):
            raise OptionError(
                "QuantizedLinearInt8",
                found=f"a weight of {weight.bits} bits with {weight.scales.shape[1]} groups a row",
                needed="a symmetric one of 8 bits with one group a row",
                remedy="Use QuantizedLinearIntN for other weights.",
            )
        super().__init__(weight, bias, activation, weight_dtype)

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
    def _weight_int8(self) -> Tensor:
        return self._saved_tensor("_weight_int8")

    def _saved(self) -> dict[str, Tensor]:
        weight = self.quantized_weight
        q = (weight.packed ^ _TOP_BIT).view(torch.int8)
        scales = weight.scales.detach()[:, 0].to(SCALE_DTYPE).contiguous()
        return {"_weight_int8": q, "_scales": scales}

    def _from_saved(self, saved: dict[str, Tensor]) -> QuantizedWeight:
        return _as_weight(saved["_weight_int8"], saved["_scales"])

    def _misfit(self, prefix: str, saved: dict[str, Tensor]) -> str | None:
        return None

    @property
    def saved_bytes(self) -> int:
        """Bytes of the weight in a file."""
        return self.out_features * (self.in_features + SCALE_DTYPE.itemsize)

    def saved_tensors(self) -> dict[str, Tensor]:
        """The tensors to save."""
        tensors = {name.removeprefix("_"): tensor for name, tensor in self._saved().items()}
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
        check_names(where, description, set(cls._options), set())
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
    middle = torch.full_like(grid, UINT8.middle)
    packed = q.contiguous().view(torch.uint8) ^ _TOP_BIT
    in_features = q.shape[1]
    return QuantizedWeight(packed, grid, middle, in_features, in_features, True, 8)
