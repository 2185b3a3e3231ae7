"""Operators of torch that exported programs call, so that tracers and compilers see one op.

In a process that has opened the C++ library of csrc/torch, that library has registered them.
"""

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("fxquant", "FRAGMENT")


def implements(schema: str, key: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as an operator, unless there is one already.

    Args:
        schema: name, arguments and what is returned; csrc/torch/schemas.h has the same.
        key: torch's dispatch key of the function.
    """
    name = schema.partition("(")[0]

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        if not hasattr(torch.ops.fxquant, name):
            LIBRARY.define(schema)
            LIBRARY.impl(name, function, key)
        return function

    return register
