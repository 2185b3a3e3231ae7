"""A Linear layer with packed group-wise INT4 weights."""

import copy
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from fxquant.kernels.choose import choose_backend, explain_backend
from fxquant.kernels.interface import LinearSpec
from fxquant.modules.linear import (
    FLOAT_DTYPES,
    QuantizedLinear,
    check_grid,
    check_linear,
    check_names,
    check_saved,
    moved_only,
)
from fxquant.numerics.grouping import group_count
from fxquant.numerics.weights import (
    SYMMETRIC_ZERO_POINT,
    Int4Weight,
    quantize_weight_int4,
    rows_of_block,
)

SAVED = ("_packed_weight", "_scales", "_zero_points")  # in a state_dict
LARGEST_SIZE = 1 << 31
_PICKLED = "_saved_weight"


class QuantizedLinearInt4(QuantizedLinear):
    """`nn.Linear` with weights x ≈ scale · (q − zero_point), q in 0..15, one scale a group.

    Only the layout of the layer's kernel is in memory, about 4.2 bits a weight. The layout that
    files and `state_dict` hold is derived from it, exactly, whenever one of these is read:

    - `_packed_weight`: uint8 [out, ceil(in / 2)], low nibble first.
    - `_scales`: bfloat16 [out, groups].
    - `_zero_points`: float16 [out, groups]; symmetric weights share one element, 8.

    Attributes:
        group_size: columns a group; the last group may be short.
        symmetric: whether every zero point is 8.
    """

    bits = 4

    def __init__(
        self,
        weight: Int4Weight,
        bias: Tensor | None,
        activation: str = "float",
        weight_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(weight.in_features, weight.packed.shape[0], bias, activation, weight_dtype)
        self.group_size, self.symmetric = weight.group_size, weight.symmetric
        self._kernel_names: tuple[str, ...] = ()
        self._hold(weight)

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
        return cls(weight, linear.bias, weight_dtype=linear.weight.dtype)

    def _prepare(self) -> None:
        """Go on with the kernel for the present kind of activation."""
        backend, _ = choose_backend(self._current_spec(), self._device)
        if backend.name == self.backend:
            self._spec = self._current_spec()  # every kind of activation reads one layout
        else:
            self._hold(self.int4_weight)

    @property
    def backend(self) -> str:
        """The name of the kernel this layer uses."""
        return self._backend.name

    def explain_backend(self) -> dict[str, str]:
        """For each backend, in order of preference, why this layer uses it or does not.

        Raises:
            OptionError: the environment variable FXQUANT_BACKEND names no backend that serves it.
        """
        return explain_backend(self._spec, self._device)

    def dequantize(self) -> Tensor:
        """The values of the weight, float32 [out, in]."""
        return self.int4_weight.dequantize()

    def weight_parts(self) -> Iterator[Tensor]:
        """The rows of `weight` in order, some at a time."""
        for part in self.int4_weight.split(rows_of_block(self.in_features)):
            yield part.dequantize()

    @property
    def int4_weight(self) -> Int4Weight:
        """The integers with their scales and zero points, derived from the kernel's layout."""
        return self._backend.unpack(self._kernel_tensors(), self._spec)

    @property
    def _packed_weight(self) -> Tensor:
        return self.int4_weight.to_saved()[0]

    @property
    def _scales(self) -> Tensor:
        return self.int4_weight.to_saved()[1]

    @property
    def _zero_points(self) -> Tensor:
        return self.int4_weight.to_saved()[2]

    @property
    def saved_bytes(self) -> int:
        """Bytes of the weight in a file."""
        groups = self.out_features * group_count(self.in_features, self.group_size)
        zero_points = 1 if self.symmetric else groups
        return self.out_features * -(-self.in_features // 2) + 2 * groups + 2 * zero_points

    def forward(self, input: Tensor) -> Tensor:
        """Map `input` [..., in], of any floating dtype, to [..., out] of the same dtype.

        float64 is computed in float32: the weight has no more precision than that.
        """
        if input.dtype is torch.float64:
            return self.forward(input.float()).double()
        return self._backend.matmul(
            input, self._kernel_tensors(), self._spec, self._buffers["bias"]
        )

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle holds: the saved layout, not that of this CPU's kernel."""
        state = dict(vars(self))
        kept = {k: v for k, v in self._buffers.items() if k not in self._kernel_names}
        left_out = set(self._kernel_names)
        state["_buffers"] = kept
        state["_non_persistent_buffers_set"] = self._non_persistent_buffers_set - left_out
        state["_kernel_names"] = ()
        for name in ("_backend", "_spec"):
            del state[name]
        packed, scales, zero_points = self.int4_weight.to_saved()
        state[_PICKLED] = (packed, scales, zero_points.contiguous())
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        packed, scales, zero_points = state.pop(_PICKLED)
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        grid = scales.float(), zero_points.float()
        self._hold(Int4Weight(packed, *grid, self.group_size, self.in_features, self.symmetric))

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantizedLinearInt4":
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        memo[id(self._backend)] = self._backend
        vars(made).update(copy.deepcopy(vars(self), memo))
        return made

    @property
    def _device(self) -> torch.device:
        return self._kernel_tensors()[0].device

    def _kernel_tensors(self) -> tuple[Tensor, ...]:
        buffers: dict[str, Any] = self._buffers  # sooner read than attributes of a module
        return tuple(map(buffers.__getitem__, self._kernel_names))

    def _current_spec(self) -> LinearSpec:
        return LinearSpec(
            out_features=self.out_features,
            in_features=self.in_features,
            group_size=self.group_size,
            symmetric=self.symmetric,
            activation=self._activation,
        )

    def _hold(self, weight: Int4Weight) -> None:
        """Choose a kernel and keep `weight` in its layout."""
        self._spec = self._current_spec()
        self._backend, _ = choose_backend(self._spec, weight.packed.device)
        for name in self._kernel_names:
            del self._buffers[name]
        layout = self._backend.pack(weight, self._spec)
        self._kernel_names = tuple(f"_kernel_{i}" for i in range(len(layout)))
        for name, tensor in zip(self._kernel_names, layout, strict=True):
            self.register_buffer(name, tensor, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantizedLinearInt4":
        is_moved = fn(torch.empty(0, dtype=torch.uint8, device=self._device)).device != self._device
        if not is_moved:
            super()._apply(fn, recurse)
            return self
        # Another device may have another kernel, and only this one can unpack its layout.
        weight = self.int4_weight
        packed = moved_only(fn, weight.packed)
        grid = moved_only(fn, weight.scales), moved_only(fn, weight.zero_points)
        super()._apply(fn, recurse)
        self._hold(Int4Weight(packed, *grid, self.group_size, self.in_features, self.symmetric))
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        saved = self.int4_weight.to_saved()
        # Each a tensor of its own: other libraries refuse to save elements that share memory.
        named = zip(SAVED, saved, strict=True)
        destination.update({prefix + name: t.contiguous() for name, t in named})

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = [prefix + name for name in SAVED]
        rest = {key: value for key, value in state_dict.items() if key not in names}
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        missing = [name for name in names if name not in state_dict]
        missing_keys += missing if strict else []
        if len(missing) == len(names):
            return
        old = self.int4_weight.to_saved()
        new = [state_dict.get(name, tensor) for name, tensor in zip(names, old, strict=True)]
        for name, one, other in zip(names, old, new, strict=True):
            if one.shape != other.shape or one.dtype != other.dtype:
                error_msgs.append(
                    f"{name} is {other.dtype} {list(other.shape)}; this layer, with group_size "
                    f"{self.group_size}, needs {one.dtype} {list(one.shape)}."
                )
                return
        if self.symmetric and not other.is_meta and (other != SYMMETRIC_ZERO_POINT).any():
            error_msgs.append(f"{name} is not {SYMMETRIC_ZERO_POINT:g} everywhere; this layer is.")
            return
        assign = local_metadata.get("assign_to_params_buffers", False)
        packed, scales, zero_points = (t if assign else t.to(self._device) for t in new)
        grid = scales.float(), zero_points.float()
        self._hold(Int4Weight(packed, *grid, self.group_size, self.in_features, self.symmetric))

    def describe(self) -> dict[str, Any]:
        """Plain data from which `rebuild` makes the layer again, with `saved_tensors`."""
        return {
            "in_features": self.in_features,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "activation": self._activation,
            "dtype": str(self._weight_dtype).removeprefix("torch."),
        }

    def saved_tensors(self) -> dict[str, Tensor]:
        """The tensors to save."""
        packed, scales, zero_points = self.int4_weight.to_saved()
        tensors = {"packed_weight": packed, "scales": scales}
        if not self.symmetric:
            tensors["zero_points"] = zero_points
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
        where = "QuantizedLinearInt4"
        options = {"in_features", "group_size", "symmetric", "activation", "dtype"}
        check_names(where, description, options, set())
        check_names(where, tensors, {"packed_weight", "scales"}, {"zero_points", "bias"})
        names = ("in_features", "group_size", "symmetric")
        in_features, group_size, symmetric = (cast(Any, description.get(name)) for name in names)
        dtype = description["dtype"]
        numbers = (in_features, group_size)
        are_numbers = all(type(n) is int and 0 < n <= LARGEST_SIZE for n in numbers)
        is_usable = are_numbers and type(symmetric) is bool and dtype in FLOAT_DTYPES
        is_usable = is_usable and symmetric is ("zero_points" not in tensors)
        check_saved(where, is_usable, f"the description {description!r:.200}", "sizes and options")
        packed: Any = tensors.get("packed_weight")
        scales: Any = tensors.get("scales")
        fits = isinstance(packed, Tensor) and isinstance(scales, Tensor) and packed.ndim == 2
        check_saved(where, fits, "no packed weight and scales", "both, as matrices")
        zero_points: Any = tensors.get("zero_points")
        if zero_points is None:
            zero_points = torch.full_like(scales, SYMMETRIC_ZERO_POINT)
        groups = group_count(in_features, group_size)
        shapes = [list(packed.shape), list(scales.shape), list(zero_points.shape)]
        needed = [[len(packed), -(-in_features // 2)], *[[len(packed), groups]] * 2]
        fits = shapes == needed and packed.dtype == torch.uint8
        found = f"{packed.dtype} tensors of shapes {shapes}"
        needed_text = f"a uint8 weight and scales and zero points of shapes {needed}"
        check_saved(where, fits, found, needed_text)
        check_grid(where, tensors.get("bias"), scales, zero_points)
        is_eight = not symmetric or bool((zero_points == SYMMETRIC_ZERO_POINT).all())
        check_saved(where, is_eight, "other zero points", f"{SYMMETRIC_ZERO_POINT:g} everywhere")
        grid = scales.float(), zero_points.float()
        weight = Int4Weight(packed, *grid, group_size, in_features, symmetric)
        activation = description["activation"]
        return cls(weight, tensors.get("bias"), activation, FLOAT_DTYPES[dtype])

    def extra_repr(self) -> str:
        """The shape and format, for printing a model."""
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"{super().extra_repr()}, group_size={self.group_size}, {kind}, {self.backend}"
