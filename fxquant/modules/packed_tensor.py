"""A weight that other code multiplies with: its products run on the packed integers.

The code of a mixture's experts picks matrices out of a parameter and multiplies by them in its own
way: expert by expert, all that were chosen at once, or sorted by expert. A `PackedTensor` goes
along with that as long as it can. Whatever else is done with it is done with its float values.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.modules.layer import QuantizedLayer
from fxquant.modules.lazy_weight import LazyWeight

Shortcut = Callable[..., Any]  # gives NotImplemented where the float values are needed


class PackedTensor(LazyWeight):
    """The weight of a quantized layer, [out, in] or [experts, out, in], or that with both swapped.

    Attributes:
        layer: multiplies by it; a bias of its own is left out.
        is_transposed: whether the last two dimensions are those of the layer's weight, swapped.
        numbers: int64 [n], which experts it consists of; None: all of them in order.
        repeats: how often a matrix is repeated, in front of its dimensions; None: it is not.
    """

    layer: QuantizedLayer
    is_transposed: bool
    numbers: Tensor | None
    repeats: int | None

    @staticmethod
    def __new__(
        cls,
        layer: QuantizedLayer,
        is_transposed: bool = False,
        numbers: Tensor | None = None,
        dtype: torch.dtype | None = None,
        repeats: int | None = None,
    ) -> "PackedTensor":
        """A weight without memory of its own; `dtype` is by default that of the layer's weight."""
        *leading, rows, columns = layer.weight_shape
        if numbers is not None:
            leading = [len(numbers)]
        if repeats is not None:
            leading = [repeats]
        last = (columns, rows) if is_transposed else (rows, columns)
        made = torch.Tensor._make_wrapper_subclass(
            cls, (*leading, *last), dtype=dtype or layer._weight_dtype,
            device=next(layer.buffers()).device, requires_grad=False,
        )  # fmt: skip
        made.layer, made.is_transposed, made.numbers = layer, is_transposed, numbers
        made.repeats = repeats
        return made

    def swapped(self) -> "PackedTensor":
        """The same with its last two dimensions swapped."""
        is_transposed = not self.is_transposed
        return PackedTensor(self.layer, is_transposed, self.numbers, self.dtype, self.repeats)

    def cast(self, dtype: torch.dtype) -> "PackedTensor":
        """The same in another dtype."""
        return PackedTensor(self.layer, self.is_transposed, self.numbers, dtype, self.repeats)

    def materialize(self) -> Tensor:
        """The values as a plain tensor; of experts only those that it consists of."""
        if self.numbers is None:
            values = self.layer.dequantize()
        else:
            kinds = self.numbers.unique(return_inverse=True)
            values = torch.stack([self.layer.expert(i).dequantize() for i in kinds[0].tolist()])[
                kinds[1]
            ]
        values = values.transpose(-2, -1) if self.is_transposed else values
        if self.repeats is not None:
            values = values.expand(self.repeats, -1, -1)
        return values.to(self.dtype)

    @classmethod
    def __torch_function__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a function on the integers where there is a way, else on the values."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            shortcut = None if kwargs and func not in _TAKE_KEYWORDS else SHORTCUTS.get(func)
            result = NotImplemented if shortcut is None else shortcut(*args, **kwargs)
            return func(*args, **kwargs) if result is NotImplemented else result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """The same for what functions of torch's do inside, such as multi-head attention."""
        shortcut = None if kwargs else SHORTCUTS_INSIDE.get(func)
        result = NotImplemented if shortcut is None else shortcut(*args)
        if result is NotImplemented:
            return super().__torch_dispatch__(func, types, args, kwargs)
        return result


def _pick(weight: Any, key: Any) -> Any:
    """`weight[key]` of experts: one of them, or those of some numbers."""
    if not isinstance(weight, PackedTensor) or weight.numbers is not None:
        return NotImplemented
    layer, experts = weight.layer, weight.layer.matrices
    if experts is None or isinstance(key, bool):
        return NotImplemented
    if isinstance(key, Tensor) and key.dtype in (torch.int32, torch.int64):
        if key.ndim == 1:
            numbers = torch.where(key < 0, key + experts, key)  # counted from the end
            if ((numbers < 0) | (numbers >= experts)).any():
                raise IndexError(f"an expert outside of 0 to {experts - 1} is picked")
            return PackedTensor(layer, weight.is_transposed, numbers, weight.dtype)
        key = key.item() if key.ndim == 0 else key
    if not isinstance(key, int):
        return NotImplemented
    return PackedTensor(layer.expert(key), weight.is_transposed, dtype=weight.dtype)


def _each(weight: Any, dim: int = 0) -> Any:
    """The matrices of all experts."""
    if dim != 0 or weight.numbers is not None or weight.ndim != 3:
        return NotImplemented
    return tuple(_pick(weight, i) for i in range(len(weight)))


def _iterate(weight: Any) -> Any:
    found = _each(weight)
    return found if found is NotImplemented else iter(found)


def _swap(weight: Any, *dims: Any) -> Any:
    """The weight with its last two dimensions swapped."""
    last = {weight.ndim - 2, weight.ndim - 1}
    if dims and {d % weight.ndim for d in dims if isinstance(d, int)} != last:
        return NotImplemented
    return weight.swapped()


def _turn(weight: Any) -> Any:
    """`weight.T` and `weight.t()` of a matrix."""
    return _swap(weight) if weight.ndim == 2 else NotImplemented


def _cast(weight: Any, to: Any, *rest: Any) -> Any:
    """`weight.to(dtype)`, and `weight.to(other)` and `weight.type_as(other)` on the same device."""
    if not isinstance(weight, PackedTensor) or any(rest):
        return NotImplemented
    if isinstance(to, Tensor):
        if to.device != weight.device:
            return NotImplemented
        to = to.dtype
    if not isinstance(to, torch.dtype) or not to.is_floating_point:
        return NotImplemented
    return weight.cast(to)


def _cast_to(dtype: torch.dtype) -> Shortcut:
    return lambda weight: _cast(weight, dtype)


def _same(weight: Any, *shape: Any) -> Any:
    """The weight itself: made contiguous, detached, or viewed in the shape that it has."""
    sizes = shape[0] if shape and isinstance(shape[0], tuple | list) else shape
    return weight if not sizes or tuple(sizes) == tuple(weight.shape) else NotImplemented


def _alias(weight: Any, *shape: Any) -> Any:
    """The same as an object of its own, as torch wants it of a view."""
    same = _same(weight, *shape)
    return same if same is NotImplemented else weight.cast(weight.dtype)


def _repeat(weight: Any, sizes: Any) -> Any:
    """A matrix in a batch, as `linear` of an input whose memory is in another order has it."""
    last = tuple(weight.shape)
    is_matrix = isinstance(weight, PackedTensor) and len(last) == 2
    if not is_matrix or len(sizes) != 3 or tuple(sizes[1:]) != last:
        return NotImplemented
    return PackedTensor(weight.layer, weight.is_transposed, None, weight.dtype, sizes[0])


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    """`input · weightᵀ + bias` of a matrix."""
    if not isinstance(weight, PackedTensor) or weight.ndim != 2 or isinstance(input, PackedTensor):
        return NotImplemented
    if weight.is_transposed:
        return NotImplemented
    product = weight.layer.without_bias()(input)
    return product if bias is None else product + bias


def _matmul(left: Any, right: Any) -> Any:
    """`left · right`, of which one is the weight: its inputs must be what is summed over."""
    if isinstance(right, PackedTensor):
        return _times(left, right)
    turned = right.transpose(-2, -1) if right.ndim > 1 else right
    product = _times(turned, _swap(left))
    return product if product is NotImplemented else product.transpose(-2, -1)


def _times(rows: Any, weight: PackedTensor) -> Any:
    """`rows` [..., in] times the weight [.., in, out]."""
    if isinstance(rows, PackedTensor) or rows.ndim < 2 or not weight.is_transposed:
        return NotImplemented
    if weight.repeats is not None:
        is_batch = rows.ndim == 3 and len(rows) == weight.repeats
        return weight.layer.without_bias()(rows) if is_batch else NotImplemented
    if weight.numbers is None:
        return weight.layer.without_bias()(rows)
    if rows.ndim != 3 or len(rows) != len(weight.numbers):
        return NotImplemented
    return weight.layer.without_bias()(rows, None, weight.numbers)


def _add_product(bias: Any, rows: Any, weight: Any) -> Any:
    """`bias + rows · weight`."""
    product = _times(rows, weight) if isinstance(weight, PackedTensor) else NotImplemented
    return product if product is NotImplemented else product + bias


def _grouped(mat_a: Any, mat_b: Any, offs: Any = None, bias: Any = None, **rest: Any) -> Any:
    """Rows that are sorted by expert, each times the matrix [in, out] of its expert."""
    is_whole = isinstance(mat_b, PackedTensor) and mat_b.numbers is None and mat_b.ndim == 3
    if not is_whole or not mat_b.is_transposed or mat_a.ndim != 2 or offs is None:
        return NotImplemented
    if bias is not None or any(value is not None for value in rest.values()):
        return NotImplemented
    return mat_b.layer.without_bias()(mat_a, offs)


_T, _MT = (vars(torch._C.TensorBase)[name].__get__ for name in ("T", "mT"))
SHORTCUTS: dict[Any, Shortcut] = {
    Tensor.__getitem__: _pick,
    Tensor.__iter__: _iterate,
    **dict.fromkeys((Tensor.unbind, torch.unbind), _each),
    **dict.fromkeys(
        (Tensor.transpose, torch.transpose, Tensor.swapaxes, torch.swapaxes, Tensor.swapdims,
         torch.swapdims, _MT), _swap
    ),
    **dict.fromkeys((Tensor.t, torch.t, _T), _turn),
    **dict.fromkeys((Tensor.to, Tensor.type_as), _cast),
    Tensor.float: _cast_to(torch.float32), Tensor.double: _cast_to(torch.float64),
    Tensor.half: _cast_to(torch.float16), Tensor.bfloat16: _cast_to(torch.bfloat16),
    **dict.fromkeys(
        (Tensor.contiguous, Tensor.detach, torch.detach, Tensor.view, Tensor.reshape), _same
    ),
    F.linear: _linear,
    **dict.fromkeys(
        (torch.matmul, Tensor.matmul, Tensor.__matmul__, operator.matmul, torch.mm, Tensor.mm,
         torch.bmm, Tensor.bmm), _matmul
    ),
    Tensor.__rmatmul__: lambda weight, left: _matmul(left, weight),
    torch._grouped_mm: _grouped,  # what F.grouped_mm calls
}  # fmt: skip
aten = torch.ops.aten
SHORTCUTS_INSIDE: dict[Any, Shortcut] = {
    aten.t.default: _turn,
    aten.transpose.int: _swap,
    **dict.fromkeys((aten.detach.default, aten.view.default, aten._unsafe_view.default), _alias),
    aten.expand.default: _repeat,
    aten.bmm.default: _matmul,
    aten.mm.default: _matmul,
    aten.addmm.default: _add_product,
}
_TAKE_KEYWORDS = (F.linear, torch._grouped_mm)  # by the names of their shortcuts
