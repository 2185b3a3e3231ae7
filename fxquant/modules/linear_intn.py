"""A Linear layer with packed group-wise weights of 2 to 8 bits."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from fxquant.kernels.choose import choose_backend, explain_backend
from fxquant.kernels.functions import FUNCTIONS, gate
from fxquant.kernels.interface import LinearSpec
from fxquant.kernels.large_pages import cloned
from fxquant.kernels.native import NATIVE
from fxquant.kernels.reference import REFERENCE
from fxquant.modules.layer import QuantizedLayer
from fxquant.modules.linear import (
    FLOAT_DTYPES,
    QuantizedLinear,
    check_linear,
    check_names,
    moved_only,
)
from fxquant.modules.saved_weight import CODE_BOOK, FORM, weight_of_saved
from fxquant.numerics.quantized_weight import QuantizedWeight, saved_bytes
from fxquant.numerics.weights import quantize_weight

_PICKLED = "_saved_weight"
_Source = TypeVar("_Source", bound=QuantizedLayer)
_Made = TypeVar("_Made")


class QuantizedLinearIntN(QuantizedLinear):
    """`nn.Linear` with weights x ≈ scale · (q − zero_point), q of 2 to 8 bits, one scale a group.

    Only the layout of the layer's kernel is in memory, about 4.2 bits a weight at 4 bits. The
    layout that files and `state_dict` hold is derived from it, exactly, whenever one of these is
    read:

    - `_packed_weight`: uint8 [out, ceil(in · bits / 8)], lowest bit first (see `numerics/packing`).
    - `_scales`: bfloat16 [out, groups].
    - `_zero_points`: float16 [out, groups]; symmetric weights share one element, 2 ** (bits - 1),
      or 128 with a code book.

    Attributes:
        bits: of what is stored of an integer: 2, 3, 4, 5, 6 or 8.
        group_size: columns a group; the last group may be short.
        symmetric: whether all zero points are that one number.
        code_book: the name of the 16 levels that q is one of, see `numerics/code_books`; None: q is
            any integer of the width.
    """

    _options: tuple[str, ...] = ("bits", *FORM, "activation", "dtype")

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None,
        activation: str = "float",
        weight_dtype: torch.dtype = torch.float32,
    ) -> None:
        out_features, in_features = weight.shape
        super().__init__(in_features, out_features, bias, activation, weight_dtype)
        self.bits = weight.bits
        self.group_size, self.symmetric = weight.group_size, weight.symmetric
        self.code_book = weight.code_book
        self._kernel_names: tuple[str, ...] = ()
        self._derived: dict[Any, Any] = {}
        self._hold(weight)

    @classmethod
    def rounded(
        cls,
        linear: nn.Linear,
        bits: int,
        group_size: int = 128,
        symmetric: bool = True,
        code_book: str | None = None,
    ) -> Self:
        """Round the weights of `linear` to nearest, over the full range of each group.

        Args:
            linear: a float Linear; it is not changed.
            bits: of an integer: 2, 3, 4, 5, 6 or 8.
            group_size: columns a group; the last group may be short. -1: one group a row.
            symmetric: one fixed zero point, or one for each group.
            code_book: a name of `numerics.code_books.CODE_BOOKS`, or None for integers.

        Raises:
            WeightError: `linear` is no Linear, or its weight is not finite.
            OptionError: `group_size` or `bits` is not usable, or not with the code book.
        """
        linear = check_linear(linear)
        weight = quantize_weight(
            linear.weight.detach(), bits, group_size, symmetric, code_book=code_book
        )
        return cls(weight, linear.bias, weight_dtype=linear.weight.dtype)

    def _prepare(self) -> None:
        """Go on with the kernel for the present kind of activation."""
        backend, _ = choose_backend(self.spec, self._device)
        if backend.name == self.backend:
            self._spec = self.spec  # every kind of activation reads one layout
        else:
            self._hold(self.quantized_weight)

    @property
    def spec(self) -> LinearSpec:
        """What a kernel has to compute."""
        return LinearSpec(
            out_features=self.out_features,
            in_features=self.in_features,
            group_size=self.group_size,
            symmetric=self.symmetric,
            activation=self._activation,
            bits=self.bits,
            code_book=self.code_book,
        )

    @property
    def backend(self) -> str:
        """The name of the kernel this layer uses."""
        return self._backend.name

    @property
    def activation_arithmetic(self) -> str | None:
        """See `QuantizedLayer`."""
        if self.activation == "float":
            return None
        return "simulated" if self.backend == REFERENCE.name else "integers"

    def explain_backend(self) -> dict[str, str]:
        """For each backend, in order of preference, why this layer uses it or does not.

        Raises:
            OptionError: the environment variable FXQUANT_BACKEND names no backend that serves it.
        """
        return explain_backend(self._spec, self._device)

    @property
    def quantized_weight(self) -> QuantizedWeight:
        """The integers with their scales and zero points, derived from the kernel's layout."""
        return self._backend.unpack(self._kernel_tensors(), self._spec)

    def _saved(self) -> dict[str, Tensor]:
        """What a `state_dict` holds, by name."""
        packed, scales, zero_points = self.quantized_weight.to_saved()
        return {"_packed_weight": packed, "_scales": scales, "_zero_points": zero_points}

    def _saved_tensor(self, name: str) -> Tensor:
        """One of the tensors of `_saved`; a subclass may save others than this class."""
        saved = self._saved()
        if name not in saved:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return saved[name]

    def _from_saved(self, saved: dict[str, Tensor]) -> QuantizedWeight:
        """Undo `_saved`, for a layer of this form."""
        grid = saved["_scales"].float(), saved["_zero_points"].float()
        return self.spec.weight(saved["_packed_weight"], *grid)

    def _misfit(self, prefix: str, saved: dict[str, Tensor]) -> str | None:
        """Why tensors of the right shapes are no weight of this layer's form, or None."""
        zero_points, middle = saved["_zero_points"], self.spec.middle
        if self.symmetric and not zero_points.is_meta and (zero_points != middle).any():
            return f"{prefix}_zero_points is not {middle:g} everywhere; this layer is."
        return None

    @property
    def packed_memory(self) -> Tensor:
        """The kernel's layout."""
        return self._kernel_tensors()[0]

    def dequantize(self) -> Tensor:
        """See `QuantizedLayer`."""
        if self._backend is NATIVE:
            return NATIVE.dequantize(self._kernel_tensors(), self._spec)
        return super().dequantize()

    def rows(self, places: Tensor) -> Tensor:
        """Some rows of the float32 weight: `places` [n] in 0..out - 1, the result [n, in]."""
        return self._backend.rows(self._kernel_tensors(), self._spec, places).values()

    @property
    def _packed_weight(self) -> Tensor:
        return self._saved_tensor("_packed_weight")

    @property
    def _scales(self) -> Tensor:
        return self._saved_tensor("_scales")

    @property
    def _zero_points(self) -> Tensor:
        return self._saved_tensor("_zero_points")

    @property
    def saved_bytes(self) -> int:
        """Bytes of the weight in a file."""
        shape = (self.out_features, self.in_features)
        return saved_bytes(shape, self.bits, self.group_size, self.symmetric)

    def forward(self, input: Tensor) -> Tensor:
        """Map `input` [..., in], of any floating dtype, to [..., out] of the same dtype.

        float64 is computed in float32: the weight has no more precision than that.
        """
        if input.dtype is torch.float64:
            return self.forward(input.float()).double()
        return self._backend.matmul(
            input, self._kernel_tensors(), self._spec, self._buffers["bias"]
        )

    def forward_then(self, input: Tensor, function: str, is_gated: bool = False) -> Tensor:
        """One of `kernels.functions.FUNCTIONS` of the output, in one step where the kernel can.

        Gated, it is that of one half of the output times the other: see `kernels.functions.gate`.
        """
        if self._backend is NATIVE and input.dtype is not torch.float64:
            tensors, bias = self._kernel_tensors(), self._buffers["bias"]
            return NATIVE.matmul_then(function, input, tensors, self._spec, bias, is_gated)
        output = self.forward(input)
        return gate(output, function) if is_gated else FUNCTIONS[function](output)

    def product_at(
        self,
        x: Tensor,
        rows: Tensor,
        columns: Tensor,
        scales: Tensor | None,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """The product with rows that are picked out of `x`: see `NativeBackend.matmul_at`."""
        tensors = self._kernel_tensors()
        return NATIVE.matmul_at(x, rows, columns, scales, tensors, self._spec, bias, dtype)

    def row_sums(self) -> Tensor:
        """The sum of each row of the weight, float32 [out]."""
        return self.derived(_row_sums, self)

    def derived(self, make: Callable[[_Source], _Made], source: _Source) -> _Made:
        """What `make` gives of `source`, made once for the weight that the layer has.

        Args:
            make: a function; what it gives depends on the weight and the shape of `source`.
            source: this layer, or the one around it.
        """
        key = make, tuple(source.weight_shape)
        if key not in self._derived:
            self._derived[key] = make(source)
        made: _Made = self._derived[key]
        return made

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
        state["_derived"] = {}
        state[_PICKLED] = {name: tensor.contiguous() for name, tensor in self._saved().items()}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        saved = state.pop(_PICKLED)
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._hold(self._from_saved(saved))

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantizedLinearIntN":
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        memo[id(self._backend)] = self._backend
        for tensor in self._kernel_tensors():
            if id(tensor) not in memo:
                memo[id(tensor)] = cloned(tensor)
        vars(made).update(copy.deepcopy(vars(self), memo))
        return made

    @property
    def _device(self) -> torch.device:
        return self._kernel_tensors()[0].device

    def _kernel_tensors(self) -> tuple[Tensor, ...]:
        buffers: dict[str, Any] = self._buffers  # sooner read than attributes of a module
        return tuple(map(buffers.__getitem__, self._kernel_names))

    def _hold(self, weight: QuantizedWeight) -> None:
        """Choose a kernel and keep `weight` in its layout."""
        self._spec = self.spec
        self._backend, _ = choose_backend(self._spec, weight.packed.device)
        for name in self._kernel_names:
            del self._buffers[name]
        self._derived = {}  # of this weight
        layout = self._backend.pack(weight, self._spec)
        self._kernel_names = tuple(f"_kernel_{i}" for i in range(len(layout)))
        for name, tensor in zip(self._kernel_names, layout, strict=True):
            self.register_buffer(name, tensor, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantizedLinearIntN":
        is_moved = fn(torch.empty(0, dtype=torch.uint8, device=self._device)).device != self._device
        if not is_moved:
            super()._apply(fn, recurse)
            return self
        # Another device may have another kernel, and only this one can unpack its layout.
        weight = self.quantized_weight
        moved = replace(
            weight,
            packed=moved_only(fn, weight.packed),
            scales=moved_only(fn, weight.scales),
            zero_points=moved_only(fn, weight.zero_points),
        )
        super()._apply(fn, recurse)
        self._hold(moved)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Each a tensor of its own: other libraries refuse to save elements that share memory.
        destination.update({prefix + name: t.contiguous() for name, t in self._saved().items()})

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
        old = self._saved()
        rest = {k: v for k, v in state_dict.items() if k.removeprefix(prefix) not in old}
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        missing = [prefix + name for name in old if prefix + name not in state_dict]
        missing_keys += missing if strict else []
        if len(missing) == len(old):
            return
        new = {name: state_dict.get(prefix + name, tensor) for name, tensor in old.items()}
        for name, tensor in new.items():
            if tensor.shape != old[name].shape or tensor.dtype != old[name].dtype:
                error_msgs.append(
                    f"{prefix}{name} is {tensor.dtype} {list(tensor.shape)}; this layer, with "
                    f"group_size {self.group_size}, needs {old[name].dtype} "
                    f"{list(old[name].shape)}."
                )
                return
        misfit = self._misfit(prefix, new)
        if misfit is not None:
            error_msgs.append(misfit)
            return
        assign = local_metadata.get("assign_to_params_buffers", False)
        kept = {name: t if assign else t.to(self._device) for name, t in new.items()}
        self._hold(self._from_saved(kept))

    def describe(self) -> dict[str, Any]:
        """Plain data from which `rebuild` makes the layer again, with `saved_tensors`."""
        values = {
            "bits": self.bits,
            "in_features": self.in_features,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "activation": self._activation,
            "dtype": str(self._weight_dtype).removeprefix("torch."),
        }
        book = {} if self.code_book is None else {CODE_BOOK: self.code_book}
        return {**{name: values[name] for name in self._options}, **book}

    def saved_tensors(self) -> dict[str, Tensor]:
        """The tensors to save."""
        packed, scales, zero_points = self.quantized_weight.to_saved()
        tensors = {"packed_weight": packed, "scales": scales}
        if not self.symmetric:
            tensors["zero_points"] = zero_points
        if self.bias is not None:
            tensors["bias"] = self.bias
        return tensors

    @classmethod
    def rebuild(
        cls, description: dict[str, Any], tensors: dict[str, Tensor]
    ) -> "QuantizedLinearIntN":
        """Make a saved layer again.

        Raises:
            OptionError: the tensors do not fit the description.
        """
        where = cls.__name__
        check_names(where, description, set(cls._options), {CODE_BOOK})
        bits = description["bits"] if "bits" in cls._options else cls.bits
        weight = weight_of_saved(where, bits, description, tensors)
        dtype = FLOAT_DTYPES[description["dtype"]]
        return cls(weight, tensors.get("bias"), description["activation"], dtype)

    def extra_repr(self) -> str:
        """The shape and format, for printing a model."""
        kind = self.code_book or ("symmetric" if self.symmetric else "asymmetric")
        shape = f"{super().extra_repr()}, bits={self.bits}"
        return f"{shape}, group_size={self.group_size}, {kind}, {self.backend}"


def _row_sums(layer: QuantizedLinearIntN) -> Tensor:
    return layer.dequantize().sum(1)
