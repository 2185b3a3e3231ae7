"""The float weight of a quantized layer, computed when it is used and not when it is looked at.

Models' own code reads `layer.weight.dtype`, `.device` or `.shape` in each call. That must not
dequantize the matrix.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class LazyWeight(torch.Tensor):
    """A tensor [out, in] whose values are made the first time an op reads them.

    Args:
        make: makes the values, float32 [out, in].
        shape: of the weight.
        dtype: what the weight is used in; the values are rounded to it.
        device: where the layer is.
    """

    _make: Callable[[], Tensor]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, make: Callable[[], Tensor], shape: Any, dtype: torch.dtype, device: torch.device
    ) -> "LazyWeight":
        """A wrapper without memory of its own."""
        made: LazyWeight = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=device, requires_grad=False
        )
        made._make = make
        return made

    def materialize(self) -> Tensor:
        """The values as a plain tensor."""
        return self._make().to(self.dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run any op on the values."""

        def unwrap(value: Any) -> Any:
            return value.materialize() if isinstance(value, LazyWeight) else value

        return func(*pytree.tree_map(unwrap, args), **pytree.tree_map(unwrap, kwargs or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.materialize()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.materialize().__reduce_ex__(protocol)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"LazyWeight({list(self.shape)}, {self.dtype}: dequantized when it is used)"
