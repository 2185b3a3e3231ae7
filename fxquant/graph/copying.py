"""Copies of module trees that share their tensors: structure may change, memory is not spent."""

import copy
from typing import Any, TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def copy_sharing_tensors(module: M, *, frozen: bool = False) -> M:
    """A deep copy of `module` whose parameters, buffers and tensor attributes are the originals.

    Args:
        module: any module; it is not changed.
        frozen: make parameters new objects around the same memory that need no gradient.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        for value in (*part._parameters.values(), *part._buffers.values(), *vars(part).values()):
            if frozen and isinstance(value, nn.Parameter):
                memo.setdefault(id(value), nn.Parameter(value.detach(), requires_grad=False))
            elif isinstance(value, Tensor):
                memo[id(value)] = value
    return copy.deepcopy(module, memo)
