"""A Linear layer with packed group-wise INT4 weights."""

from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import OptionError
from fxquant.kernels.choose import choose_backend
from fxquant.kernels.interface import LinearSpec
from fxquant.modules.linear import QuantizedLinear, add_bias, check_linear, detached
from fxquant.numerics.grouping import group_count
from fxquant.numerics.weights import (
    SCALE_DTYPE,
    SYMMETRIC_ZERO_POINT,
    ZERO_POINT_DTYPE,
    Int4Weight,
    quantize_weight_int4,
)


class QuantizedLinearInt4(QuantizedLinear):
    """`nn.Linear` with weights x ≈ scale · (q − zero_point), q in 0..15, one scale a group.

    Attributes:
        _packed_weight: uint8 [out, ceil(in / 2)], low nibble first.
        _scales: bfloat16 [out, groups].
        _zero_points: float16 [out, groups]; symmetric weights share one element, 8.
        group_size: columns a group; the last group may be short.
        symmetric: whether every zero point is 8.
    """

    bits = 4
    _packed_weight: Tensor
    _scales: Tensor
    _zero_points: Tensor

    def __init__(self, weight: Int4Weight, bias: Tensor | None, activation: str = "float") -> None:
        super().__init__(weight.in_features, weight.packed.shape[0], bias, activation)
        self.group_size, self.symmetric = weight.group_size, weight.symmetric
        self.register_buffer("_packed_weight", weight.packed.contiguous())
        self.register_buffer("_scales", detached(weight.scales, SCALE_DTYPE))
        self.register_buffer("_zero_points", _compact_zero_points(weight))
        self._prepare()

    @classmethod
    def from_float(
        cls, linear: nn.Linear, group_size: int = 128, symmetric: bool = True
    ) -> "QuantizedLinearInt4":
        """Round the weights of `linear` to nearest.

        Args:
            linear: a float Linear; it is not changed.
            group_size: columns a group; the last group may be short.
            symmetric: one fixed zero point, or one for each group.

        Raises:
            WeightError: `linear` is no Linear, or its weight is not finite.
            OptionError: `group_size` is not positive.
        """
        linear = check_linear(linear)
        packed = quantize_weight_int4(linear.weight.detach(), group_size, symmetric)
        weight = Int4Weight(*packed, group_size, linear.in_features, symmetric)
        return cls(weight, linear.bias)

    @property
    def backend(self) -> str:
        """The name of the kernel this layer uses."""
        return self._backend.name

    @property
    def weight(self) -> Tensor:
        """The dequantized weight [out, in], float32."""
        return self.int4_weight.dequantize()

    @property
    def int4_weight(self) -> Int4Weight:
        """The integers with their scales and zero points."""
        return Int4Weight(
            self._packed_weight,
            self._scales.float(),
            self._zero_points.float(),
            self.group_size,
            self.in_features,
            self.symmetric,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [..., in], float32, bfloat16 or float16, to [..., out] of the same dtype."""
        tensors = tuple(getattr(self, name) for name in self._kernel_names)
        return add_bias(self._backend.matmul(x, tensors, self._spec), self.bias)

    def _prepare(self) -> None:
        """Choose a kernel and derive its layout; it is never saved."""
        self._spec = LinearSpec(
            out_features=self.out_features,
            in_features=self.in_features,
            group_size=self.group_size,
            symmetric=self.symmetric,
            activation=self._activation,
        )
        self._backend, _ = choose_backend(self._spec, self._packed_weight.device)
        layout = self._backend.pack(self.int4_weight, self._spec)
        self._kernel_names = tuple(f"_kernel_{i}" for i in range(len(layout)))
        for name, tensor in zip(self._kernel_names, layout, strict=True):
            self.register_buffer(name, tensor, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantizedLinearInt4":
        device = self._packed_weight.device
        super()._apply(fn, recurse)
        if self._packed_weight.device != device:
            self._prepare()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._zero_points = self._zero_points.contiguous()  # an expanded one cannot be written to
        super()._load_from_state_dict(*args, **kwargs)
        self._zero_points = _compact_zero_points(self.int4_weight)
        self._prepare()

    def describe(self) -> dict[str, Any]:
        """Plain data from which `rebuild` makes the layer again, with `saved_tensors`."""
        return {
            "in_features": self.in_features,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "activation": self._activation,
        }

    def saved_tensors(self) -> dict[str, Tensor]:
        """The tensors to save."""
        tensors = {"packed_weight": self._packed_weight, "scales": self._scales}
        if not self.symmetric:
            tensors["zero_points"] = self._zero_points
        if self.bias is not None:
            tensors["bias"] = self.bias
        return tensors

    @classmethod
    def rebuild(
        cls, description: dict[str, Any], tensors: dict[str, Tensor]
    ) -> "QuantizedLinearInt4":
        """Make a saved layer again.

        Raises:
            OptionError: the tensors do not fit the description.
        """
        packed, scales = tensors["packed_weight"], tensors["scales"]
        in_features, group_size = description["in_features"], description["group_size"]
        zero_points = tensors.get("zero_points", torch.full_like(scales, SYMMETRIC_ZERO_POINT))
        groups = group_count(in_features, group_size)
        shapes = [list(packed.shape), list(scales.shape), list(zero_points.shape)]
        needed = [[len(packed), -(-in_features // 2)], *[[len(packed), groups]] * 2]
        if shapes != needed or packed.dtype != torch.uint8:
            raise OptionError(
                "QuantizedLinearInt4",
                found=f"{packed.dtype} tensors of shapes {shapes}",
                needed=f"a uint8 weight and scales and zero points of shapes {needed}",
                remedy="The file is damaged: save the model again.",
            )
        weight = Int4Weight(
            packed, scales, zero_points, group_size, in_features, description["symmetric"]
        )
        return cls(weight, tensors.get("bias"), description["activation"])

    def extra_repr(self) -> str:
        """The shape and format, for printing a model."""
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"{super().extra_repr()}, group_size={self.group_size}, {kind}, {self.backend}"


def _compact_zero_points(weight: Int4Weight) -> Tensor:
    if not weight.symmetric:
        return detached(weight.zero_points, ZERO_POINT_DTYPE)
    one = torch.full((1, 1), SYMMETRIC_ZERO_POINT, dtype=ZERO_POINT_DTYPE)
    return one.to(weight.packed.device).expand(weight.scales.shape)
