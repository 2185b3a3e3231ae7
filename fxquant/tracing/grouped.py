"""Products with the matrices of experts as the `GroupedLinear` they are.

Before: `y = grouped_mm(rows, self.down_proj.transpose(1, 2), offsets)`,
`y = torch.bmm(rows, self.down_proj[numbers])`, or `y = torch.bmm(rows, self.down_proj)`.
After: `y = self.down_proj(rows, offsets)`, where `down_proj` is a layer on the same tensor.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.graph.linear_operands import linear_operands
from fxquant.graph.ops import op_name
from fxquant.tracing.constants import Constant, Constants

_GROUPED = ("grouped_matmul", "grouped_mm", "_grouped_mm")
_BATCHED = ("bmm", "matmul", "__matmul__")


@dataclass(frozen=True)
class GroupedProduct:
    """A product of rows with the matrices of experts.

    Attributes:
        weight: the parameter, or what is made of it.
        matrices: the values, as a weight [experts, out, in].
        input: the node of the rows; its last two dimensions are swapped if `is_swapped`.
        offsets: the node of where each expert's rows end, or None.
        numbers: the node of each row's expert, or None.
        is_swapped: whether the product is weight · input instead of input · weightᵀ.
    """

    weight: Constant
    matrices: Tensor
    input: Node
    offsets: Node | None = None
    numbers: Node | None = None
    is_swapped: bool = False


def grouped_product(constants: Constants, node: Node) -> GroupedProduct | None:
    """What `node` multiplies, if it is a product with matrices of experts."""
    if op_name(node) in _GROUPED:
        return _with_offsets(constants, node)
    if op_name(node) not in _BATCHED:
        return None
    operands = linear_operands(node)
    if operands is None:
        return None
    return _batched(constants, operands.input, operands.weight, is_swapped=False) or _batched(
        constants, operands.weight, operands.input, is_swapped=True
    )


def _with_offsets(constants: Constants, node: Node) -> GroupedProduct | None:
    names = ("input", "weight", "offsets", "bias")
    given = dict(zip(names, node.args, strict=False))
    given |= {{"offs": "offsets", "mat2": "weight"}.get(k, k): v for k, v in node.kwargs.items()}
    rows, offsets, bias = given.get("input"), given.get("offsets"), given.get("bias")
    weight = _experts(constants, given.get("weight"))
    if weight is None or bias is not None:
        return None
    if not isinstance(rows, Node) or not isinstance(offsets, Node) or constants.of(rows):
        return None
    return GroupedProduct(weight, weight.value.transpose(1, 2), rows, offsets)


def _batched(
    constants: Constants, rows: Any, weight: Any, *, is_swapped: bool
) -> GroupedProduct | None:
    if not isinstance(rows, Node) or constants.of(rows):
        return None
    found = _experts(constants, weight)
    if found is not None:
        matrices = found.value if is_swapped else found.value.transpose(1, 2)
        return GroupedProduct(found, matrices, rows, is_swapped=is_swapped)
    turned = is_swapped
    while _is_swap(weight):
        weight, turned = weight.args[0], not turned
    if op_name(weight) not in ("index", "getitem") or len(weight.args) != 2:
        return None
    numbers = weight.args[1]
    numbers = numbers[0] if isinstance(numbers, list | tuple) and len(numbers) == 1 else numbers
    found = _experts(constants, weight.args[0])
    if found is None or not isinstance(numbers, Node):
        return None
    matrices = found.value if turned else found.value.transpose(1, 2)
    return GroupedProduct(found, matrices, rows, numbers=numbers, is_swapped=is_swapped)


def _is_swap(node: Any) -> bool:
    """Whether it is a transposition that exchanges the last two of three dimensions."""
    name = op_name(node) if isinstance(node, Node) else ""
    if name in ("mT", "adjoint") or (name == "getattr" and node.args[1] == "mT"):
        return True
    if name not in ("transpose", "swapaxes", "swapdims"):
        return False
    return sorted(int(d) % 3 for d in node.args[1:] if isinstance(d, int)) == [1, 2]


def _experts(constants: Constants, node: Any) -> Constant | None:
    """The constant weight [experts, .., ..] that `node` always has, made of a parameter."""
    weight = constants.of(node)
    if weight is None or not weight.sources or not weight.value.is_floating_point():
        return None
    value = weight.value
    is_repeated = value.ndim == 3 and (value.shape[0] == 1 or value.stride(0) == 0)
    return weight if value.ndim == 3 and value.numel() and not is_repeated else None


def call_grouped(gm: GraphModule, node: Node, target: str, product: GroupedProduct) -> Node:
    """Put a call of the layer at `target` in the place of `node`."""
    with gm.graph.inserting_before(node):
        rows: Any = product.input
        if product.is_swapped:
            rows = gm.graph.call_function(torch.transpose, (rows, -1, -2))
        routing = (product.offsets, product.numbers)
        arguments = (rows, *routing) if any(routing) else (rows,)
        call = gm.graph.create_node("call_module", target, arguments)
        result = call
        if product.is_swapped:
            result = gm.graph.call_function(torch.transpose, (call, -1, -2))
    node.replace_all_uses_with(result)
    gm.graph.erase_node(node)
    return call
