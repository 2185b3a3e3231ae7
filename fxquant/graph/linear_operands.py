"""Which ops are a linear layer written as a function, and where its operands are."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from fxquant.graph.ops import op_name, op_of

LinearRule = Callable[..., "LinearOperands | None"]


@dataclass(frozen=True)
class LinearOperands:
    """The arguments of an op that is a linear layer: input · weightᵀ + bias.

    Attributes:
        input: the node of the activations.
        weight: the node of the weight.
        bias: the node of the bias, or None.
        is_transposed: whether the weight is laid out [in, out].
        weight_scale: a factor of the weight (`alpha` of addmm).
        bias_scale: a factor of the bias (`beta`).
        equation: of an einsum; it then says how the operands lie, instead of `is_transposed`.
    """

    input: Any
    weight: Any
    bias: Any = None
    is_transposed: bool = False
    weight_scale: float = 1.0
    bias_scale: float = 1.0
    equation: str | None = None


def _linear(input: Any, weight: Any, bias: Any = None) -> LinearOperands:
    return LinearOperands(input, weight, bias)


def _matmul(input: Any, other: Any) -> LinearOperands:
    return LinearOperands(input, other, is_transposed=True)


def _addmm(input: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1) -> LinearOperands:
    return LinearOperands(mat1, mat2, input, True, float(alpha), float(beta))


def _einsum(equation: Any, *operands: Any) -> LinearOperands | None:
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        return None
    return LinearOperands(*operands, equation=equation.replace(" ", ""))


_LINEAR_RULES: dict[str, LinearRule] = {
    "linear": _linear,
    "matmul": _matmul,
    "__matmul__": _matmul,
    "mm": _matmul,
    "bmm": _matmul,
    "addmm": _addmm,
    "baddbmm": lambda input, batch1, batch2, **scales: _addmm(input, batch1, batch2, **scales),
    "einsum": _einsum,
}


def linear_operands(node: Node) -> LinearOperands | None:
    """The operands of `node` if the table has its op and its arguments fit, else None."""
    rule = _LINEAR_RULES.get(op_name(node))
    if rule is None or op_of(node).product != "linear":
        return None
    try:
        return rule(*node.args, **node.kwargs)
    except (TypeError, ValueError):  # an overload with other arguments, such as `path=`
        return None
