"""Copies of module trees: their structure is their own, their tensors are shared or copied."""

import copy
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import Tensor, nn

from fxquant.errors import TraceError

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


def _copy(module: M, is_own: Callable[[Tensor], bool], frozen: bool) -> M:
    memo: dict[int, Any] = {}
    memory: dict[int, Tensor] = {}
    for tensor in _tensors_behind(module):
        if id(tensor) not in memo:
            memo[id(tensor)] = _copied(tensor, is_own(tensor), frozen, memory)
    try:
        return copy.deepcopy(module, dict(memo))
    except Exception:  # an attribute that cannot be copied, such as a lock: it is shared
        for part in module.modules():
            for name, value in vars(part).items():
                if name.startswith("_") and name in vars(nn.Module()):
                    continue
                _share_uncopyable(value, memo)
    try:
        return copy.deepcopy(module, dict(memo))
    except Exception as error:
        raise TraceError(
            type(module).__name__,
            found=f"that it cannot be copied: {type(error).__name__}: {error}",
            needed="a model that copy.deepcopy can copy",
            remedy=f"Look at {_first_uncopyable(module, memo)}; let its class define "
            "__deepcopy__, or make the attribute after loading.",
        ) from error


def _copied(tensor: Tensor, is_own: bool, frozen: bool, memory: dict[int, Tensor]) -> Tensor:
    """A new object for `tensor`; views of one memory stay views of one memory."""
    data = tensor.detach()
    if is_own or tensor.is_inference():  # which cannot be a parameter outside of inference mode
        data = data.clone()
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
