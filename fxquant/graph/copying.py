"""Copies of module trees: their structure is their own, their tensors are shared or copied.

A function that was set on a module or hooked to it (`module.forward = lambda x: old(x) + 1`) may
hold modules of the tree in its closure. `copy.deepcopy` shares functions, so a copy would go on
calling the original: such functions are made again around the copies of what they hold.
"""

import copy
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import Tensor, nn

from fxquant.errors import TraceError
from fxquant.graph.parameters import memory_of
from fxquant.kernels.large_pages import cloned

M = TypeVar("M", bound=nn.Module)
DEPTH = 6  # of containers in which tensors are looked for


def copy_sharing_tensors(
    module: M, *, frozen: bool = False, is_own: Callable[[Tensor], bool] | None = None
) -> M:
    """A deep copy of `module` on the same memory; parameters and buffers are new objects.

    Args:
        module: any module; it is not changed.
        frozen: make parameters that need no gradient.
        is_own: says for which tensors the copy gets memory of its own; None: for none.

    Raises:
        TraceError: an attribute cannot be copied; it is named.
    """
    return _copy(module, lambda tensor: bool(is_own and is_own(tensor)), frozen)


def copy_owning_tensors(module: M, *, keep: Callable[[nn.Module], bool] | None = None) -> M:
    """A deep copy of `module` with memory of its own.

    Args:
        module: any module; it is not changed.
        keep: parts whose tensors are shared all the same, since they will be replaced.
    """
    shared: set[int] = set()
    for part in module.modules():
        if keep is not None and keep(part):
            shared |= {id(p) for p in part.parameters(recurse=False)}
    return _copy(module, lambda tensor: id(tensor) not in shared, frozen=False)


def own_memory(module: nn.Module, *, apart_from: nn.Module) -> None:
    """Move parameters and buffers that lie in the memory of another module's to their own.

    Args:
        module: whose tensors stay the same objects.
        apart_from: the other module.
    """
    others = (*apart_from.parameters(), *apart_from.buffers())
    taken = {memory_of(tensor) for tensor in others}
    for tensor in (*module.parameters(), *module.buffers()):
        if memory_of(tensor) in taken:
            tensor.data = tensor.data.clone()


def _copy(module: M, is_own: Callable[[Tensor], bool], frozen: bool) -> M:
    memo: dict[int, Any] = {}
    memory: dict[int, Tensor] = {}
    for tensor in _tensors_behind(module):
        if id(tensor) not in memo:
            memo[id(tensor)] = _copied(tensor, is_own(tensor), frozen, memory)
    try:
        return _copy_with_closures(module, dict(memo))
    except Exception:  # an attribute that cannot be copied, such as a lock: it is shared
        for part in module.modules():
            for name, value in vars(part).items():
                if name.startswith("_") and name in vars(nn.Module()):
                    continue
                _share_uncopyable(value, memo)
    try:
        return _copy_with_closures(module, dict(memo))
    except Exception as error:
        raise TraceError(
            type(module).__name__,
            found=f"that it cannot be copied: {type(error).__name__}: {error}",
            needed="a model that copy.deepcopy can copy",
            remedy=f"Look at {_first_uncopyable(module, memo)}; let its class define "
            "__deepcopy__, or make the attribute after loading.",
        ) from error


def _copy_with_closures(module: M, memo: dict[int, Any]) -> M:
    made = copy.deepcopy(module, memo)
    closures = _Closures(memo)
    for part in made.modules():
        hooks = (v for k, v in vars(part).items() if k.endswith("_hooks") and isinstance(v, dict))
        for owner in (vars(part), *hooks):
            for name, value in list(owner.items()):
                if isinstance(value, types.FunctionType):
                    owner[name] = closures.rebound(value)
    return made


class _Closures:
    """Makes functions again around the copies of the modules that they hold.

    Args:
        memo: what `copy.deepcopy` has copied, by the original's id.
    """

    def __init__(self, memo: dict[int, Any]) -> None:
        self._memo = memo
        self._cells: dict[int, types.CellType] = {}
        self._functions: dict[int, types.FunctionType] = {}

    def rebound(self, function: types.FunctionType) -> types.FunctionType:
        """The function around the copies; itself where it holds nothing that was copied."""
        if id(function) in self._functions:
            return self._functions[id(function)]
        self._functions[id(function)] = function  # a function may hold itself
        cells = tuple(map(self._cell, function.__closure__ or ()))
        defaults = self._value(function.__defaults__)
        keywords = self._value(function.__kwdefaults__)
        is_same = all(a is b for a, b in zip(cells, function.__closure__ or (), strict=True))
        if is_same and defaults is function.__defaults__ and keywords is function.__kwdefaults__:
            return function
        made = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, defaults, cells or None
        )
        made.__kwdefaults__ = keywords
        made.__qualname__, made.__doc__ = function.__qualname__, function.__doc__
        made.__module__ = function.__module__
        vars(made).update({k: self._value(v) for k, v in vars(function).items()})
        self._functions[id(function)] = made
        return made

    def _cell(self, cell: types.CellType) -> types.CellType:
        if id(cell) not in self._cells:
            self._cells[id(cell)] = cell
            try:
                held = cell.cell_contents
            except ValueError:  # not filled yet
                return cell
            value = self._value(held)
            if value is not held:
                self._cells[id(cell)] = types.CellType(value)
        return self._cells[id(cell)]

    def _value(self, value: Any, depth: int = 0) -> Any:
        """The copy of what a function holds; the value itself where nothing in it was copied."""
        if isinstance(value, nn.Module | Tensor):
            return self._memo.get(id(value), value)
        if isinstance(value, types.MethodType):
            owner = self._memo.get(id(value.__self__))
            return value if owner is None else types.MethodType(value.__func__, owner)
        if isinstance(value, types.FunctionType):
            return self.rebound(value)
        if type(value) in (list, tuple, dict) and depth < DEPTH:
            parts = value.values() if isinstance(value, dict) else value
            changed = [self._value(part, depth + 1) for part in parts]
            if any(a is not b for a, b in zip(changed, parts, strict=True)):
                if isinstance(value, dict):
                    return dict(zip(value, changed, strict=True))
                return type(value)(changed)
        return value


def _copied(tensor: Tensor, is_own: bool, frozen: bool, memory: dict[int, Tensor]) -> Tensor:
    """A new object for `tensor`; views of one memory stay views of one memory."""
    data = tensor.detach()
    if is_own or tensor.is_inference():  # which cannot be a parameter outside of inference mode
        data = cloned(data)
    if not isinstance(tensor, nn.Parameter):
        return data
    made = nn.Parameter(data, requires_grad=tensor.requires_grad and not frozen)
    if type(tensor) is nn.Parameter:
        vars(made).update({k: v for k, v in vars(tensor).items() if k not in vars(made)})
    return made


def _share_uncopyable(value: Any, memo: dict[int, Any]) -> None:
    if isinstance(value, nn.Module | Tensor):
        return
    try:
        copy.deepcopy(value, dict(memo))
    except Exception:  # whatever a class raises there
        memo[id(value)] = value


def _first_uncopyable(module: nn.Module, memo: dict[int, Any]) -> str:
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:
                if not isinstance(value, nn.Module) and name not in vars(nn.Module()):
                    return f"the attribute {name!r} of {path or 'the model'}"
    return "its attributes"


def _tensors_behind(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers and tensors in attributes and in the containers behind them."""
    for part in module.modules():
        for value in (*part._parameters.values(), *part._buffers.values(), *vars(part).values()):
            yield from _tensors_in(value, 0)


def _tensors_in(value: Any, depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple | set) and depth < DEPTH:
        for part in list(value.values() if isinstance(value, dict) else value):
            yield from _tensors_in(part, depth + 1)
