"""What the quantized linear layers have in common."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import OptionError, WeightError, check_choice, check_type
from fxquant.modules.layer import QuantizedLayer
from fxquant.modules.packed_tensor import PackedTensor
from fxquant.numerics.quantized_weight import SCALE_DTYPE

ACTIVATIONS = ("float", "int8")
LARGEST_ZERO_POINT = 4096.0  # one beyond would leave scale · zero point without precision
FLOAT_DTYPES = {str(t).removeprefix("torch."): t for t in (
    torch.float32, torch.float64, torch.bfloat16, torch.float16
)}  # fmt: skip


class QuantizedLinear(QuantizedLayer):
    """A linear layer with integer weights and an optional float bias.

    Attributes:
        in_features: columns of the weight.
        out_features: rows of the weight.
        bits: bits of a weight element.
        bias: float [out] or None.
    """

    replaces = (nn.Linear,)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: Tensor | None,
        activation: str = "float",
        weight_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        check_choice("activation", activation, ACTIVATIONS)
        self.in_features, self.out_features = in_features, out_features
        self._activation, self._weight_dtype = activation, weight_dtype
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """`(out, in)`."""
        return self.out_features, self.in_features

    @property
    def weight(self) -> Tensor:
        """The weight: code that multiplies with it multiplies on the integers.

        To look at its shape, dtype and device costs nothing; for what is not a product, its values
        are computed at each use.
        """
        return PackedTensor(self)

    def without_bias(self) -> "QuantizedLinear":
        """See `QuantizedLayer`."""
        return self if self.bias is None else self.with_bias(None)

    @property
    def _device(self) -> torch.device:
        return next(iter(self.buffers())).device

    def rows(self, places: Tensor) -> Tensor:
        """Some rows of the float32 weight: `places` [n] in 0..out - 1, the result [n, in]."""
        return self.quantized_weight.rows(places).values()

    @property
    def packed_memory(self) -> Tensor:
        """The tensor that holds the integers in memory: the same object in tied layers."""
        raise NotImplementedError(type(self).__name__)

    def with_bias(self, bias: Tensor | None) -> "QuantizedLinear":
        """A layer that shares this one's packed weight and has another bias [out]."""
        made = type(self).__new__(type(self))
        state = vars(self).items()
        vars(made).update({k: copy.copy(v) if isinstance(v, dict | set) else v for k, v in state})
        made._buffers["bias"] = None if bias is None else bias.detach().clone()
        return made

    @property
    def activation(self) -> str:
        """`"float"`, or `"int8"`: activations quantized on the fly, a scale a token and group."""
        return self._activation

    @activation.setter
    def activation(self, value: str) -> None:
        check_choice("activation", value, ACTIVATIONS)
        self._activation = value
        self._prepare()

    def _prepare(self) -> None:
        """Choose a kernel and derive its layout; it is never saved."""

    def to_float(self) -> nn.Linear:
        """A float `nn.Linear` with the same weights."""
        shape = (self.in_features, self.out_features)
        linear = nn.Linear(*shape, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.dequantize(), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias, requires_grad=False)
        return linear.eval()

    def extra_repr(self) -> str:
        """The shape, for printing a model."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantizedLinear":
        """Move between devices; a change of float dtype leaves integers and their grid alone."""
        before = dict(self._buffers)
        self._weight_dtype = fn(torch.empty(0, dtype=self._weight_dtype, device=self._device)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if name != "bias" and old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


def check_saved(where: str, holds: bool, found: str, needed: str) -> None:
    """Refuse parts of a saved layer that do not belong together.

    Raises:
        OptionError: they do not.
    """
    if not holds:
        remedy = "The file is damaged: save the model again."
        raise OptionError(where, found=found, needed=needed, remedy=remedy)


def check_names(where: str, found: Iterable[str], needed: set[str], more: set[str]) -> None:
    """Refuse a saved layer that lacks something, or has something unknown.

    Raises:
        OptionError: it does.
    """
    names = set(found)
    holds = needed <= names <= needed | more
    check_saved(where, holds, f"parts {sorted(names)!r:.200}", f"{sorted(needed)}")


def check_grid(where: str, bias: object, scales: Tensor, zero_points: Tensor | None) -> None:
    """Refuse scales, zero points and a bias of a saved layer that no layer can have.

    Raises:
        OptionError: they are not finite, a scale is zero, or a shape or dtype does not fit.
    """
    rows = scales.shape[0]
    check_saved(where, scales.dtype == SCALE_DTYPE, f"scales of {scales.dtype}", f"{SCALE_DTYPE}")
    is_usable = bool((torch.isfinite(scales) & (scales != 0)).all())
    check_saved(where, is_usable, "a scale that is 0, NaN or Inf", "finite scales other than 0")
    if zero_points is not None:
        is_usable = zero_points.is_floating_point() and bool(
            (zero_points.abs() <= LARGEST_ZERO_POINT).all()
        )
        needed = f"finite zero points up to {LARGEST_ZERO_POINT}"
        check_saved(where, is_usable, "a zero point that is NaN or very large", needed)
    if bias is not None:
        fits = isinstance(bias, Tensor) and bias.is_floating_point() and bias.shape == (rows,)
        check_saved(where, fits, "a bias of another shape or dtype", f"a floating bias [{rows}]")


def moved_only(fn: Any, tensor: Tensor) -> Tensor:
    """What `fn` makes of `tensor`, without a change of dtype."""
    new: Tensor = fn(tensor)
    return new if new.dtype == tensor.dtype else tensor.to(new.device)


def check_linear(linear: object) -> nn.Linear:
    """`linear` itself, or a `WeightError` if it is no Linear layer, or does more than one."""
    check_type("from_float", linear, nn.Linear, "Pass the Linear layer itself.", WeightError)
    assert isinstance(linear, nn.Linear)  # for type checkers
    more = None
    if type(linear).forward is not nn.Linear.forward or "forward" in vars(linear):
        more = "a forward of its own"
    elif linear._forward_hooks or linear._forward_pre_hooks:
        more = "hooks, which the quantized layer would not run"
    if more is not None:
        raise WeightError(
            "from_float",
            found=f"a {type(linear).__name__} with {more}",
            needed="a layer that computes x · weightᵀ + bias and nothing else",
            remedy="Quantize the model with fxquant.quantize, which looks at its code.",
        )
    if nn.parameter.is_lazy(linear.weight):
        raise WeightError(
            "from_float",
            found="a lazy parameter without a shape",
            needed="a weight with values",
            remedy="Run the layer once on real inputs, then quantize it.",
        )
    return linear
