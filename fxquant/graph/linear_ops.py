"""The one table of ops that are a linear layer: to support a new op, add a row and a test model.

Before: any op that multiplies an activation with a parameter, such as `F.linear(x, self.w)`,
`x @ self.w`, `torch.addmm(self.b, x, self.w)` or their `aten` forms.
After: a `call_module` node on an `nn.Linear`, named after the module that owns the parameter.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

aten = torch.ops.aten


@dataclass(frozen=True)
class LinearOperands:
    """The arguments of an op that is a linear layer: input · weightᵀ + bias.

    `weight` is an expression node; `is_transposed` says it is laid out [in, out].
    """

    input: Any
    weight: Any
    bias: Any
    is_transposed: bool


def _linear(input: Any, weight: Any, bias: Any = None) -> LinearOperands:
    return LinearOperands(input, weight, bias, is_transposed=False)


def _matmul(input: Any, other: Any) -> LinearOperands:
    return LinearOperands(input, other, None, is_transposed=True)


def _addmm(
    input: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1
) -> LinearOperands | None:
    if beta != 1 or alpha != 1:
        return None
    return LinearOperands(mat1, mat2, input, is_transposed=True)


Row = Callable[..., LinearOperands | None]

FUNCTIONS: dict[Any, Row] = {
    F.linear: _linear,
    aten.linear.default: _linear,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    operator.matmul: _matmul,
    aten.matmul.default: _matmul,
    aten.mm.default: _matmul,
    torch.addmm: _addmm,
    aten.addmm.default: _addmm,
}

METHODS: dict[str, Row] = {"matmul": _matmul, "mm": _matmul, "__matmul__": _matmul, "addmm": _addmm}


def linear_operands(node: Node) -> LinearOperands | None:
    """The operands of `node` if the table has its op and its arguments fit, else None."""
    row: Row | None = None
    if node.op == "call_function":
        row = FUNCTIONS.get(node.target)
    elif node.op == "call_method":
        row = METHODS.get(str(node.target))
    if row is None:
        return None
    try:
        return row(*node.args, **node.kwargs)
    except TypeError:  # an overload with other arguments, such as `out=`
        return None


def transposed_source(node: Any) -> Node | None:
    """The node that `node` transposes (its last two dimensions of two), or None."""
    if not isinstance(node, Node) or not node.args:
        return None
    source: Any = node.args[0]
    rest: list[Any] = list(node.args[1:])
    if not isinstance(source, Node):
        return None
    if node.op == "call_function" and node.target is getattr:
        return source if rest in (["T"], ["mT"]) else None
    if node.target in ("t", torch.t, aten.t.default, aten.numpy_T.default):
        return source
    if node.target in ("transpose", torch.transpose, aten.transpose.int):
        return source if sorted(rest) in ([0, 1], [-2, -1]) else None
    if node.target in ("permute", torch.permute, aten.permute.default):
        order = rest[0] if len(rest) == 1 else rest
        return source if list(order) in ([1, 0], [-1, -2]) else None
    return None


ADDITIONS = (operator.add, torch.add, aten.add.Tensor, "add", operator.iadd)
