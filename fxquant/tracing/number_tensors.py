"""Numbers that a model keeps as tensors, and what is computed of them, as numbers.

A buffer such as a kernel's size is one number in a tensor. What an export knows of a tensor is its
shape, so a padding that is computed of it would be of unknown size, and a branch on it cannot be
exported. Here such a number goes beside its tensor through sums, products and roundings, with sizes
of the inputs where they come in, and takes its place where the forward asks for a number.

before: pad(x, (0, tensor))                  # of a size that nobody knows
after:  pad(x, (0, ceil((n - 7) / 2) * 2))   # of a size that depends on the input's
"""

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import SymInt, Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_Number = Any  # an int, float or bool, or one of torch's that depend on sizes

_BY_NAME: dict[str, Callable[..., _Number]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv,
    "true_divide": operator.truediv, "floor_divide": operator.floordiv,
    "remainder": operator.mod, "neg": operator.neg, "ceil": math.ceil, "floor": math.floor,
    "maximum": torch.sym_max, "minimum": torch.sym_min,
    "gt": operator.gt, "ge": operator.ge, "lt": operator.lt, "le": operator.le,
    "eq": operator.eq, "ne": operator.ne,
    "__add__": operator.add, "__radd__": operator.add, "__sub__": operator.sub,
    "__rsub__": lambda a, b: b - a, "__mul__": operator.mul, "__rmul__": operator.mul,
    "__truediv__": operator.truediv, "__rdiv__": lambda a, b: b / a,
    "__floordiv__": operator.floordiv, "__rfloordiv__": lambda a, b: b // a,
    "__mod__": operator.mod, "__neg__": operator.neg, "__gt__": operator.gt,
    "__ge__": operator.ge, "__lt__": operator.lt, "__le__": operator.le,
    "__eq__": operator.eq, "__ne__": operator.ne,
}  # fmt: skip
_COMPUTES: dict[Any, Callable[..., _Number]] = {
    function: compute
    for name, compute in _BY_NAME.items()
    for function in (getattr(torch, name, None), getattr(Tensor, name, None))
    if function is not None
}
_CASTS = {Tensor.to, Tensor.long, Tensor.int, Tensor.float, Tensor.double, Tensor.clone}
_ASKS: dict[Any, Callable[[_Number], _Number]] = {
    Tensor.item: lambda number: number, Tensor.__bool__: bool, Tensor.__int__: int,
    Tensor.__index__: int, Tensor.__float__: float,
}  # fmt: skip
_TAKES_SIZES = {
    functional.pad, Tensor.__getitem__, Tensor.view, Tensor.reshape, torch.reshape, Tensor.expand,
    Tensor.narrow, torch.narrow, Tensor.new_zeros, Tensor.new_ones, torch.zeros, torch.ones,
    torch.full, torch.empty, torch.arange,
}  # fmt: skip


class NumberTensors(TorchFunctionMode):
    """Exports inside know what is in tensors that hold one number.

    Args:
        numbers: what is in buffers of the model, by name.
        module: which has these buffers, as it is exported.
    """

    def __init__(self, numbers: dict[str, int], module: nn.Module) -> None:
        super().__init__()
        # By identity, with the tensors themselves, so that no other gets the identity of one.
        self._known: dict[int, tuple[Tensor, _Number]] = {}
        for name, buffer in module.named_buffers() if numbers else ():
            if name in numbers:
                self._known[id(buffer)] = (buffer, numbers[name])

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._known:
            return func(*args, **kwargs)
        first: Any = args[0] if args else None
        if func in _ASKS and id(first) in self._known:
            return _ASKS[func](self._known[id(first)][1])
        if func in _TAKES_SIZES:
            args = (first, *map(self._in_numbers, args[1:]))
            kwargs = {key: self._in_numbers(value) for key, value in kwargs.items()}
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor) or result.ndim:
            return result
        if result is first:  # what an op wrote in place is another number from now on
            self._known.pop(id(first), None)
        elif func in _CASTS and id(first) in self._known:
            number = self._known[id(first)][1]
            self._known[id(result)] = (result, _cast(number, result.dtype))
        elif func in _COMPUTES and not kwargs and any(id(a) in self._known for a in args):
            operands = [self._known[id(a)][1] if id(a) in self._known else a for a in args]
            if not any(isinstance(a, Tensor) for a in operands):
                number = _cast(_COMPUTES[func](*operands), result.dtype)
                self._known[id(result)] = (result, number)
        return result

    def _in_numbers(self, value: Any) -> Any:
        """The value with numbers in place of tensors that hold one, also inside of it."""
        if isinstance(value, Tensor):
            return self._known[id(value)][1] if id(value) in self._known else value
        if isinstance(value, slice):
            ends = (self._in_numbers(end) for end in (value.start, value.stop, value.step))
            return slice(*ends)
        if type(value) in (tuple, list):
            return type(value)(map(self._in_numbers, value))
        return value


def _cast(number: _Number, dtype: torch.dtype) -> _Number:
    """The number as a tensor of that dtype holds it; a whole number may stay one."""
    if dtype == torch.bool or dtype.is_floating_point or isinstance(number, int | SymInt):
        return number
    return torch.sym_int(number)


def numbers_in(module: nn.Module) -> dict[str, int]:
    """What is in buffers of the model that hold one whole number, by name."""
    return {
        name: int(buffer)
        for name, buffer in module.named_buffers()
        if not buffer.ndim and not buffer.is_meta and buffer.dtype in (torch.int64, torch.int32)
    }
